"""The training of the embedded model, and what it left in checkpoints/tiny."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import numpy_model, tiny_config
from tokenizers import Tokenizer

from checkpoints import TINY, open_checkpoint
from kernels_pallas.grouped_matmul import expert_mlp
from mtpjax.config import ModelConfig
from mtpjax.loading import load_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import tiny_data
import tiny_loss
import train_tiny
from tiny_state import Plan, Progress, Saves


def run(plan: Plan, steps: int = 3, last: int | None = None) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The parts of the loss of each of the first `last` steps of a run of `steps`, and the state that they leave."""
    cfg = tiny_config(moe=True, repeats=1)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 6000, dtype=np.int32)
    first = train_tiny.new_state(numpy_model(cfg, seed=plan.seed, stack=1), plan)
    each = list(itertools.islice(train_tiny.train(cfg, first, tokens, plan, lambda step: step / steps), last))
    return [parts for _, parts in each], each[-1][0]


def test_same_seed_same_losses() -> None:
    """Two runs of three steps agree to the last bit; another seed does not."""
    plan = Plan(batch=2, mtp_steps=2)
    first, _ = run(plan)
    assert len(first) == 3 and set(first[0]) == {"rate", "lm", "mtp1", "mtp2", "balance"}
    assert first == run(plan)[0]
    assert first != run(replace(plan, seed=1))[0]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """To the last bit: weights, averages, optimiser and the order of the windows come back from the save."""
    plan = Plan(batch=2, mtp_steps=2)
    whole, _ = run(plan, 4)
    begun, state = run(plan, 4, last=2)
    saves = Saves(tmp_path / "state", plan)
    saves.save(state, Progress(2, 1.5, [{"step": 2, "lm": 3.0}]))

    cfg = tiny_config(moe=True, repeats=1)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 6000, dtype=np.int32)
    like = train_tiny.new_state(numpy_model(cfg, seed=7, stack=1), plan)
    found = saves.latest(like)
    assert found is not None
    restored, progress = found
    assert (progress.step, progress.seconds, progress.rows) == (2, 1.5, [{"step": 2, "lm": 3.0}])
    rest = [parts for _, parts in train_tiny.train(cfg, restored, tokens, plan, lambda step: step / 4, progress.step)]
    assert begun + rest == whole

    with pytest.raises(SystemExit, match="has mtp_steps = 2, this one 3"):
        Saves(tmp_path / "state", replace(plan, mtp_steps=3)).latest(like)
    assert Saves(tmp_path / "elsewhere", plan).latest(like) is None


def test_accumulated_parts_are_the_mean_of_the_batch() -> None:
    """The same windows read in two parts; only the balance of experts, not linear in the batch, may differ."""
    plan = Plan(batch=4, mtp_steps=1, optimizer="adamw")
    (first, second), _ = run(plan, 2)
    (halved, after), _ = run(replace(plan, accumulate=2), 2)
    for name in ("lm", "mtp1"):
        np.testing.assert_allclose(halved[name], first[name], rtol=1e-5)
        np.testing.assert_allclose(after[name], second[name], rtol=1e-3)


def test_bfloat16_computes_while_the_weights_stay_float32() -> None:
    plan = Plan(batch=2, mtp_steps=1)
    (wide,), _ = run(plan, 1)
    (narrow,), state = run(replace(plan, dtype="bfloat16"), 1)
    assert narrow["lm"] != wide["lm"]
    np.testing.assert_allclose(narrow["lm"], wide["lm"], rtol=2e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype(jnp.float32)}


def test_the_manifest_names_the_text_that_differs(tmp_path: Path) -> None:
    texts = [tiny_data.Document(domain, f"{domain}-1", "text", "train") for domain in tiny_data.LICENCES]
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(tiny_data.manifest(texts, train_tiny.tiny_config(4096, (1, 2)), {})))
    tiny_data.check_manifest(texts, file)
    with pytest.raises(SystemExit, match="python: python-1 is not the text that is listed there"):
        tiny_data.check_manifest([texts[0], replace(texts[1], text="other"), texts[2]], file)
    with pytest.raises(SystemExit, match="books: books-0 is not listed there"):
        tiny_data.check_manifest([replace(texts[0], name="books-0"), *texts], file)


def test_talk_is_the_same_each_time_and_its_held_out_part_is_new() -> None:
    training, held_out = tiny_data.read_talk()
    listed = json.loads((TINY / "manifest.json").read_text())["domains"]["talk"]["documents"]
    assert [training.manifest_line(), held_out.manifest_line()] == listed
    seen = set(training.text.split(tiny_data.END_OF_TEXT))
    kept = held_out.text.split(tiny_data.END_OF_TEXT)
    assert len(kept) == tiny_data.HELD_OUT_TALKS and not seen & set(kept)


def test_distillation_teaches_the_head_alone() -> None:
    """Least where both distributions are equal, and then the entropy; the target is given no gradient."""
    target = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 9)), jnp.float32)
    p = jax.nn.softmax(target)
    entropy = -jnp.mean(jnp.sum(p * jnp.log(p), axis=-1))
    np.testing.assert_allclose(tiny_loss.distillation(target + 5, target), entropy, rtol=1e-5)
    assert tiny_loss.distillation(0.5 * target, target) > entropy + 1e-3
    to_logits, to_target = jax.grad(tiny_loss.distillation, argnums=(0, 1))(0.5 * target, target)
    assert np.asarray(to_logits).any() and not np.asarray(to_target).any()


def test_gains_are_spread_in_the_two_norms_the_head_reads() -> None:
    model = numpy_model(tiny_config(moe=True, repeats=1), stack=1)
    spread = tiny_loss.spread_gains(model, seed=0).params
    before, after = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (model.params, spread))
    changed = {jax.tree_util.keystr(path) for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"['norm'].value", "['mtp']['norm'].value"}
    gains = np.log1p(np.concatenate([np.asarray(spread["norm"][...]), np.asarray(spread["mtp"]["norm"][...])]))
    assert 0.5 * tiny_loss.GAIN_SPREAD < gains.std() < 1.5 * tiny_loss.GAIN_SPREAD


def test_the_embedded_model_tells_before_a_norm_from_after_it() -> None:
    """Its gains are spread like those of published checkpoints, without which no acceptance could tell."""
    params = load_checkpoint(open_checkpoint(TINY), dtype=jnp.float32).params
    for norm in (params["norm"], params["mtp"]["norm"]):
        gains = 1 + np.asarray(norm[...])
        assert gains.std() > 0.3 * gains.mean()


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_expert_gradients_equal_a_dense_reference(rows: int) -> None:
    """Every expert on every row, then the chosen ones picked: what the sorted blocks must give, gradients included."""
    rng = np.random.default_rng(rows)
    x, target = rng.normal(size=(2, rows, 16)).astype(np.float32)
    gate_up = rng.normal(size=(2, 8, 12, 16)).astype(np.float32)
    down = rng.normal(size=(2, 8, 16, 6)).astype(np.float32)
    chosen = jnp.asarray(np.argsort(rng.random((rows, 8)), axis=1)[:, :2])
    weights = rng.random((rows, 2)).astype(np.float32)
    live = jnp.arange(rows) >= rows // 4

    def grouped(x, gate_up, down, weights):  # type: ignore[no-untyped-def]
        return expert_mlp(x, gate_up, down, jnp.int32(1), chosen, weights, live)

    def dense(x, gate_up, down, weights):  # type: ignore[no-untyped-def]
        gate, up = jnp.split(jnp.einsum("nd,eod->neo", x, gate_up[1]), 2, axis=-1)
        each = jnp.einsum("nei,edi->ned", jax.nn.silu(gate) * up, down[1])
        picked = jnp.take_along_axis(each, chosen[..., None], axis=1)
        return jnp.sum(picked * weights[..., None], axis=1) * live[:, None]

    arguments = (x, gate_up, down, weights)
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sum(f(*a) * target), (0, 1, 2, 3)))(*arguments)
        for f in (grouped, dense)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_the_embedded_files_fit_together() -> None:
    """Manifest, tokenizer, config and generation config name the same ids; the folder stays small."""
    manifest = json.loads((TINY / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    source = open_checkpoint(TINY)
    cfg = ModelConfig.from_hf(source.config)
    ids = manifest["special_tokens"]
    assert tokenizer.get_vocab_size() == manifest["vocab_size"] == cfg.vocab_size == tiny_data.VOCAB
    assert ids == {name: tokenizer.token_to_id(name) for name in tiny_data.SPECIAL}
    assert sorted(ids.values()) == list(range(cfg.vocab_size - len(ids), cfg.vocab_size))
    stops = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert manifest["eos_token_id"] == source.generation_config["eos_token_id"] == list(cfg.stop_tokens) == stops
    assert cfg == train_tiny.tiny_config(cfg.vocab_size, cfg.stop_tokens)
    books = manifest["domains"]["books"]["documents"]
    assert {Path(b["name"]).stem for b in books if b["split"] == "held-out"} == set(tiny_data.HELD_OUT)
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 17_000_000

    text = "“Curiouser and curiouser!” cried Alice; 1865, cafe\u0301.\n\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.replace("e\u0301", "é")  # NFC
    prompts = [json.loads(line) for line in (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = [len(row["prompt"].split()) for row in prompts]
    assert len({row["id"] for row in prompts}) == len(set(lengths)) == 5 and 15 <= min(lengths) <= max(lengths) <= 60


def test_missing_books_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        train_tiny.main(["--books", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    (tmp_path / "somebody_a-book.txt").write_text("Once upon a time.")
    with pytest.raises(SystemExit, match=f"found 1 texts but not {tiny_data.HELD_OUT[1]}.txt"):
        train_tiny.main(["--books", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_deeper_model_starts_with_the_layers_of_a_shallower_one() -> None:
    small = numpy_model(tiny_config(moe=True, repeats=1), stack=1)
    deep = train_tiny.stacked(small, 3 * small.cfg.layers)
    assert deep.cfg == tiny_config(moe=True, repeats=3)
    before, after = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (small.params, deep.params))
    assert len(after) > len(before)
    for path, leaf in after.items():
        name = jax.tree_util.keystr(path)
        for repeat in "12":
            name = name.replace(f"['blocks'][{repeat}]", "['blocks'][0]")
        (source,) = [value for key, value in before.items() if jax.tree_util.keystr(key) == name]
        np.testing.assert_array_equal(leaf, source)


def test_training_like_a_checkpoint_repeats_every_run_that_led_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    train_like = train_tiny.train_like
    monkeypatch.setattr(train_tiny, "main", lambda argv: calls.append(train_tiny.options(argv)))
    train_like(TINY, ["--books", "books"], tmp_path / "out")
    spent = json.loads((TINY / "training.json").read_text())
    assert [run.steps for run in calls] == [spent["start"]["done_steps"], spent["done_steps"]]
    assert [run.layers for run in calls] == [4, 8] and [run.seed for run in calls] == [0, 1]
    assert [run.mtp_steps for run in calls] == [spent["start"]["mtp_steps"], spent["mtp_steps"]]
    assert [run.out for run in calls] == [tmp_path / "out.stage1", tmp_path / "out"]
    assert [run.start for run in calls] == [None, tmp_path / "out.stage1"]
    assert all(train_tiny.plan_of(run).minutes is None and run.manifest == TINY / "manifest.json" for run in calls)

    # Resumed, a stage that is done is not run again.
    (tmp_path / "out.stage1").mkdir()
    (tmp_path / "out.stage1" / "training.json").write_text(json.dumps(spent["start"]))
    calls.clear()
    train_like(TINY, ["--books", "books", "--resume"], tmp_path / "out")
    assert [run.out for run in calls] == [tmp_path / "out"]
