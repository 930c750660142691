"""Shared prefixes: the same bits and texts as without, fewer tokens read, a limit, and files that cannot do harm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mtpjax import LLM, SamplingParams
from mtpjax.engine.prefix_cache import PrefixCache
from mtpjax.engine.prefix_tree import Beginning, beginnings
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.models import cpu_only, make_engine, numpy_model, rounded_to_bfloat16, tiny_config

VOCAB, BUCKETS = 96, (64, 192)
RNG = np.random.default_rng(3)
BASE = RNG.integers(0, VOCAB - 1, 400).tolist()
DRAFTS: dict[str, Any] = {"num_speculative_tokens": 3}
SAMPLED = SamplingParams(max_tokens=6, temperature=0.9, ignore_eos=True)


def tail(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB - 1, length).tolist()


# A tree: prompts that are equal but for the last token, branches at 128 and at 256 tokens, and one that shares none.
TREE = [
    *([*BASE[:369], i] for i in range(4)),
    *([*BASE[:270], *tail(i, 20 + i)] for i in range(3)),
    *([*BASE[:150], *tail(9, 120), *tail(i, 7 + i)] for i in range(3)),
    tail(77, 90),
]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return numpy_model(tiny_config(moe=False, num_superblocks=1))


def make_llm(model: LoadedModel, **options: Any) -> LLM:
    settings: dict[str, Any] = {"max_model_len": 448, "prefill_buckets": BUCKETS, "num_speculative_tokens": 0}
    return LLM(model, **settings | options)


def texts(llm: LLM, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(prompts, SAMPLED, **options)]


@pytest.fixture(scope="module")
def want(model: LoadedModel) -> list[list[int]]:
    return texts(make_llm(model, max_num_seqs=len(TREE), enable_prefix_caching=False), TREE)


class TestExactness:
    @pytest.mark.parametrize(
        "options",
        [
            {"max_num_seqs": 1},
            DRAFTS | {"max_num_seqs": 5},
            pytest.param({"max_num_seqs": 16}, marks=pytest.mark.slow),
            pytest.param({"max_num_seqs": 5, "prefill_buckets": (16, 64)}, marks=pytest.mark.slow),
            pytest.param(DRAFTS | {"max_num_seqs": 1, "mtp_prompt_tokens": 16}, marks=pytest.mark.slow),
            pytest.param(DRAFTS | {"max_num_seqs": 5, "mtp_prompt_tokens": 99}, marks=pytest.mark.slow),
        ],
        ids=str,
    )
    def test_a_tree_of_prompts(self, model: LoadedModel, want: list[list[int]], options: dict[str, Any]) -> None:
        llm = make_llm(model, **options)
        outputs = llm.generate(TREE, SAMPLED)
        assert [output.token_ids for output in outputs] == want
        read = llm.engine.num_prompt_tokens
        cached = [output.num_cached_tokens for output in outputs]
        assert cached == [369] * 4 + [256] * 6 + [0]
        branches = (
            128 + (369 - 128) + (256 - 128)
        )  # 128 rows of all, 256 of seven of them and 369 of four, 256 of three
        assert read == branches + sum(map(len, TREE)) - sum(cached)
        assert texts(llm, TREE) == want  # once more, from entries
        assert llm.engine.num_prompt_tokens - read == sum(map(len, TREE)) - sum(cached)

    @cpu_only
    @pytest.mark.parametrize("mtp_prompt_tokens", [None, pytest.param(16, marks=pytest.mark.slow)])
    def test_every_bit_of_a_sequence(self, model: LoadedModel, mtp_prompt_tokens: int | None) -> None:
        """bfloat16, read at once or in parts: keys, values, states, convolution inputs, the head, hidden state."""
        cache = make_cache(model, mtp_prompt_tokens)
        rows = BASE[:369]
        want = arrays(cache, rows, [])
        assert differing(want, arrays(cache, rows, [128, 256])) == []
        assert differing(want, arrays(cache, rows, [320])) == []
        assert differing(want, arrays(cache, rows, [369])) == []

    @cpu_only
    def test_a_border_off_the_grid_is_found(self, model: LoadedModel) -> None:
        cache = make_cache(model)
        found = differing(arrays(cache, BASE[:369], []), arrays(cache, BASE[:369], [100]))
        assert "state" in found

    @cpu_only
    def test_a_border_without_the_token_after_it_is_found(
        self, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The text would not change, since the trunk decides, but drafts would get worse."""
        cache = make_cache(model)
        want, prefill = arrays(cache, BASE[:369], []), cache.runner.prefill
        monkeypatch.setattr(cache.runner, "prefill", lambda *args, next_tokens=None, **how: prefill(*args, **how))
        assert differing(want, arrays(cache, BASE[:369], [128])) == ["mtp_k", "mtp_v"]


def make_cache(model: LoadedModel, mtp_prompt_tokens: int | None = None) -> PrefixCache:
    options: dict[str, Any] = {"num_speculative_tokens": 1, "mtp_prompt_tokens": mtp_prompt_tokens}
    engine = make_engine(rounded_to_bfloat16(model), max_model_len=448, prefill_buckets=BUCKETS, **options)
    return PrefixCache(engine.runner, 1 << 30)


def arrays(cache: PrefixCache, rows: list[int], borders: list[int]) -> dict[str, np.ndarray]:
    """Return what a sequence remembers whose rows were read in parts that end at these borders."""
    entry = None
    for length in [*borders, len(rows)]:
        if entry is None or entry.past.length < length:
            entry = cache.make(rows, Beginning(b"", length, length == len(rows)), entry)
    assert entry is not None
    sequence, number = entry.sequence, cache.runner.mtp_prompt_tokens
    found = {"k": sequence.k[:, :, :, : len(rows)], "v": sequence.v[:, :, :, : len(rows)]}
    found |= {"state": sequence.state, "conv": sequence.conv, "hidden": entry.hidden}
    assert int(sequence.length[0]) == len(rows) and int(sequence.mtp_start_pos[0]) == entry.past.mtp_start
    if number is None:  # the last row is written anew by the first draft
        found |= {"mtp_k": sequence.mtp_k[:, :, :, : len(rows)], "mtp_v": sequence.mtp_v[:, :, :, : len(rows)]}
    else:
        end = len(rows) - entry.past.mtp_start
        assert end >= number
        found["mtp_v"] = sequence.mtp_v[:, :, :, end - number : end]
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


def differing(want: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> list[str]:
    return [name for name, array in want.items() if not np.array_equal(array, got[name])]


class TestTokensRead:
    def test_many_prompts_that_differ_in_the_last_token(self, model: LoadedModel) -> None:
        llm = make_llm(model, max_num_seqs=8)
        prompts = [[*BASE[:369], i % VOCAB] for i in range(200)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1))
        assert 369 + VOCAB <= llm.engine.num_prompt_tokens <= 369 + 200  # equal prompts that start together count once
        assert {output.num_cached_tokens for output in outputs} == {369}

    def test_few_shots(self, model: LoadedModel) -> None:
        llm = make_llm(model, max_num_seqs=8)
        prompts = [[*BASE[:300], *tail(i, 40)] for i in range(40)]
        for _ in llm.generate_iter((prompt, SamplingParams(max_tokens=1)) for prompt in prompts):
            pass
        assert llm.engine.num_prompt_tokens == 256 + 40 * (340 - 256)

    def test_a_prompt_alone_or_with_little_in_common_is_read_whole(self, model: LoadedModel) -> None:
        llm = make_llm(model, max_num_seqs=8)
        prompts = [BASE[:130], [*BASE[:100], *tail(1, 20)]]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1))
        assert llm.engine.num_prompt_tokens == 250 and not any(o.num_cached_tokens for o in outputs)


class TestLimit:
    def test_entries_stay_under_the_limit(self, model: LoadedModel, want: list[list[int]]) -> None:
        llm = make_llm(model, max_num_seqs=1)
        cache = llm._prefixes
        assert cache is not None
        cache.max_bytes = cache.bytes_of(369) + cache.bytes_of(256)
        largest = []
        read = cache.read

        def watched(*args: Any) -> Any:
            found = read(*args)
            largest.append(cache.nbytes)
            return found

        cache.read = watched  # type: ignore[method-assign, assignment]
        assert texts(llm, TREE) == want
        assert 0 < max(largest) <= cache.max_bytes and len(cache.entries) < 4
        cache.max_bytes = 1  # none fits
        cache.clear()
        assert texts(llm, TREE) == want and not cache.entries

    def test_entries_that_waiting_requests_need_go_last(self, model: LoadedModel) -> None:
        cache = make_cache(model)
        (first, *_), (second, *_), (third, *_) = paths = [beginnings(tail(i, 80)) for i in range(3)]
        cache.max_bytes = 2 * cache.bytes_of(64)
        for i in range(2):
            cache.read(tail(i, 80), paths[i][:1])
        cache.read(tail(2, 80), [third], lambda key: key == first.key)
        assert set(cache.entries) == {first.key, third.key} and second.key not in cache.entries

    def test_requests_of_a_branch_start_together_if_not_all_branches_fit(self, model: LoadedModel) -> None:
        llm = make_llm(model, max_num_seqs=1)
        cache = llm._prefixes
        assert cache is not None
        cache.max_bytes = cache.bytes_of(256)
        branches = [tail(50 + b, 260) for b in range(2)]
        prompts = [[*branches[i % 2], *tail(i, 10 + i)] for i in range(8)]  # longest first, they take turns
        llm.generate(prompts, SamplingParams(max_tokens=0))
        assert llm.engine.num_prompt_tokens == sum(map(len, prompts)) - 8 * 256 + 2 * 256 and len(cache.entries) == 1

    @pytest.mark.parametrize("options", [{"prefix_cache_gb": 0}, {"enable_prefix_caching": False}], ids=str)
    def test_off(self, model: LoadedModel, options: dict[str, Any]) -> None:
        llm = make_llm(model, max_num_seqs=2, **options)
        llm.generate([BASE[:370]] * 2 + [[*BASE[:369], 3]], SamplingParams(max_tokens=0))
        assert llm._prefixes is not None and not llm._prefixes.entries

    @pytest.mark.parametrize("value", [-1, "1", float("inf"), True])
    def test_no_limit(self, model: LoadedModel, value: Any) -> None:
        with pytest.raises(ValueError, match="prefix_cache_gb is .* expected a finite number >= 0"):
            make_llm(model, prefix_cache_gb=value)


class TestPrefix:
    def test_prompts_continue_from_it(self, model: LoadedModel) -> None:
        llm = make_llm(model, max_num_seqs=2, enable_prefix_caching=False)
        whole = [[*BASE[:200], *tail(i, 5)] for i in range(3)]
        want = texts(llm, whole)
        prefix = llm.prefix(BASE[:200])
        before = llm.engine.num_prompt_tokens
        outputs = llm.generate([prompt[200:] for prompt in whole], SAMPLED, prefix=prefix)
        assert [output.token_ids for output in outputs] == want
        assert [output.prompt_token_ids for output in outputs] == whole
        assert llm.engine.num_prompt_tokens - before == 3 * (205 - 192)
        assert texts(llm, [prompt[30:] for prompt in whole], prefix=llm.prefix(BASE[:30])) == want  # too short to share

    def test_that_of_another_model_is_refused(self, model: LoadedModel) -> None:
        llm = make_llm(model)
        for other, name in (
            (make_llm(model, max_model_len=400), "max_model_len 400 where 448 is in use"),
            (make_llm(numpy_model(model.cfg, seed=1)), "weights .* where .* is in use"),
            (make_llm(rounded_to_bfloat16(model)), "compute_dtype bfloat16 where float32"),
        ):
            with pytest.raises(ValueError, match=f"the prefix belongs to another LLM: .*{name}"):
                llm.generate([[1]], prefix=other.prefix(BASE[:10]))

    def test_chunks_without_borders(self, model: LoadedModel) -> None:
        llm = make_llm(model, prefill_buckets=(32,))
        with pytest.raises(ValueError, match="only if one of prefill_buckets is a multiple of 64 and"):
            llm.prefix(BASE[:100])


class TestFiles:
    def test_another_process_starts_warm(self, model: LoadedModel, want: list[list[int]], tmp_path: Path) -> None:
        options: dict[str, Any] = {"max_num_seqs": 1, "prefix_cache_dir": tmp_path / "prefixes"}
        assert texts(make_llm(model, **options), TREE) == want
        files = sorted((tmp_path / "prefixes").iterdir())
        assert files and all(file.name.endswith(".prefix.safetensors") for file in files)
        llm = make_llm(model, **options)
        outputs = llm.generate(TREE, SAMPLED)
        assert [o.token_ids for o in outputs] == want
        assert llm.engine.num_prompt_tokens == sum(map(len, TREE)) - sum(o.num_cached_tokens for o in outputs)

    def test_files_that_cannot_be_used(self, model: LoadedModel, tmp_path: Path) -> None:
        cache = make_cache(model)
        cache.read(BASE[:200], beginnings(BASE[:200])[:2])
        assert cache.save(tmp_path) == 2 and cache.save(tmp_path) == 0
        first, second = sorted(tmp_path.iterdir())
        again = make_cache(model)
        assert again.load(tmp_path) == 2 and set(again.entries) == set(cache.entries)
        for key, entry in again.entries.items():
            same = cache.entries[key]
            assert entry.past == same.past and entry.token_ids == same.token_ids
            assert all(np.array_equal(a, b) for a, b in zip(*map(leaves, (entry, same)), strict=True))
        damaged = bytearray(first.read_bytes())
        damaged[-200] ^= 1
        first.write_bytes(damaged)
        (tmp_path / "x.prefix.safetensors").write_bytes(second.read_bytes())
        second.write_bytes(second.read_bytes()[:-9])
        reasons = "checksum is wrong|bytes|its name is not that of its tokens"
        with pytest.warns(UserWarning, match=reasons) as found:
            assert make_cache(model).load(tmp_path) == 0
        assert len(found) == 3 and all("prefix.safetensors: not a usable prefix" in str(w.message) for w in found)

    def test_files_of_another_model(self, model: LoadedModel, tmp_path: Path) -> None:
        cache = make_cache(model)
        cache.read(BASE[:100], beginnings(BASE[:100])[:1])
        cache.save(tmp_path)
        with pytest.warns(UserWarning, match="it was made with mtp_prompt_tokens None where 16 is in use"):
            assert make_cache(model, 16).load(tmp_path) == 0


def leaves(entry: Any) -> list[np.ndarray]:
    return [np.asarray(jnp.asarray(a, jnp.float32)) for a in (*vars(entry.sequence).values(), entry.hidden)]
