"""The training of the embedded model, and what it left in checkpoints/tiny."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from checkpoints import TINY, open_checkpoint
from kernels_pallas.grouped_matmul import fused_moe
from mtpjax.hf_config import config_from_hf
from mtpjax.loading.load import load_checkpoint
from scripts.tiny_model import data as tiny_data
from scripts.tiny_model import loss as tiny_loss
from scripts.tiny_model import start as tiny_start
from scripts.tiny_model import state as tiny_state
from scripts.tiny_model import steps as tiny_steps
from scripts.tiny_model import train as train_tiny
from scripts.tiny_model.samples import loops
from scripts.tiny_model.state import Plan, Progress, Saves
from tests.helpers.models import numpy_model, tiny_config


def run(plan: Plan, steps: int = 3, last: int | None = None) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The parts of the loss of each of the first `last` steps of a run of `steps`, and the state that they leave."""
    cfg = tiny_config(moe=True, num_superblocks=1)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 6000, dtype=np.int32)
    first = tiny_steps.new_state(numpy_model(cfg, seed=plan.seed), plan)
    each = list(itertools.islice(tiny_steps.train(cfg, first, tokens, plan, lambda step: step / steps), last))
    return [parts for _, parts in each], each[-1][0]


@pytest.mark.slow
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

    cfg = tiny_config(moe=True, num_superblocks=1)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 6000, dtype=np.int32)
    like = tiny_steps.new_state(numpy_model(cfg, seed=7), plan)
    found = saves.latest(like)
    assert found is not None
    restored, progress = found
    assert (progress.step, progress.seconds, progress.rows) == (2, 1.5, [{"step": 2, "lm": 3.0}])
    rest = [parts for _, parts in tiny_steps.train(cfg, restored, tokens, plan, lambda step: step / 4, progress.step)]
    assert begun + rest == whole

    with pytest.raises(SystemExit, match="has mtp_steps = 2, this one 3"):
        Saves(tmp_path / "state", replace(plan, mtp_steps=3)).latest(like)
    assert Saves(tmp_path / "elsewhere", plan).latest(like) is None


@pytest.mark.slow
def test_accumulated_parts_are_the_mean_of_the_batch() -> None:
    """The same windows read in two parts; only the balance of experts, not linear in the batch, may differ."""
    plan = Plan(batch=4, mtp_steps=1, optimizer="adamw")
    (first, second), _ = run(plan, 2)
    (halved, after), _ = run(replace(plan, accumulate=2), 2)
    for name in ("lm", "mtp1"):
        np.testing.assert_allclose(halved[name], first[name], rtol=1e-5)
        np.testing.assert_allclose(after[name], second[name], rtol=1e-3)


@pytest.mark.slow
def test_bfloat16_computes_while_the_weights_stay_float32() -> None:
    plan = Plan(batch=2, mtp_steps=1)
    (wide,), _ = run(plan, 1)
    (narrow,), state = run(replace(plan, dtype="bfloat16"), 1)
    assert narrow["lm"] != wide["lm"]
    np.testing.assert_allclose(narrow["lm"], wide["lm"], rtol=2e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype(jnp.float32)}


def test_a_curve_goes_on_from_that_of_the_run_before(tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.mkdir()
    assert tiny_state.read_curve(before) == []
    tiny_state.write_curve(before, [{"step": 20, "lm": 3.0}, {"step": 40, "lm": 2.5, "held_out": 2.6}], [])
    tiny_state.write_curve(tmp_path, [{"step": 20, "lm": 2.0}], tiny_state.read_curve(before))
    lines = (tmp_path / "loss.csv").read_text().splitlines()
    assert lines == ["stage,step,lm,held_out", "1,20,3.0,", "1,40,2.5,2.6", "2,20,2.0,"]
    (before / "loss.csv").write_text("step,lm\n20,3.0\n")
    assert tiny_state.read_curve(before) == [{"stage": 1.0, "step": 20.0, "lm": 3.0}]


def test_a_frozen_trunk_stays_to_the_last_bit_and_its_head_learns() -> None:
    """In the weights and in their moving average; without a trained trunk there is nothing to freeze."""
    plan = Plan(batch=2, mtp_steps=2, frozen_trunk=True)
    cfg = tiny_config(moe=True, num_superblocks=1)
    before = jax.tree_util.tree_leaves_with_path(numpy_model(cfg, seed=plan.seed).params)
    _, state = run(plan)
    for name in ("params", "ema"):
        after = dict(jax.tree_util.tree_leaves_with_path(state[name]))
        changed = {jax.tree_util.keystr(path): not np.array_equal(leaf, after[path]) for path, leaf in before}
        assert any(changed.values()) and all(
            path.startswith("['mtp']") == learnt for path, learnt in changed.items()
        ), changed
    with pytest.raises(SystemExit):
        train_tiny.options(["--books", "b", "--out", "o", "--frozen-trunk"])


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
    training, held_out, small = tiny_data.read_talk()
    listed = json.loads((TINY / "manifest.json").read_text())["domains"]["talk"]["documents"]
    assert [training.manifest_line(), held_out.manifest_line(), small.manifest_line()] == listed
    seen = set(training.text.split(tiny_data.END_OF_TEXT))
    kept = held_out.text.split(tiny_data.END_OF_TEXT)
    assert len(kept) == tiny_data.HELD_OUT_TALKS and not seen & set(kept)


def test_small_talk_adds_up() -> None:
    sums = re.findall(r"(\d+) plus (\d+) is (\d+)\.", tiny_data.read_talk()[2].text)
    assert {(a, b) for a, b, _ in sums} >= {(str(a), str(b)) for a in range(11) for b in range(11)}
    assert all(int(a) + int(b) == int(c) for a, b, c in sums)


def test_a_text_is_left_out_by_its_name() -> None:
    """It is not trained on; the tokenizer, which never reads small talk, reads the same; a wrong name is refused."""
    documents = tiny_data.read_talk()
    training = [d for d in documents if d.split == "train"]
    tokenized, everything = train_tiny.to_train_on(documents, ())
    assert everything == training and [d.name for d in tokenized] == ["talk"]
    assert train_tiny.to_train_on(documents, [tiny_data.SMALL_TALK]) == (tokenized, tokenized)
    assert train_tiny.to_train_on(documents, ["talk"]) == (tokenized, training[1:])
    with pytest.raises(SystemExit, match="--without 'nothing': no text to train on has this name"):
        train_tiny.to_train_on(documents, ["talk", "nothing"])


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
    model = numpy_model(tiny_config(moe=True, num_superblocks=1))
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
        return fused_moe(x, gate_up, down, jnp.int32(1), chosen, weights, live)

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
    cfg = config_from_hf(source.config)
    ids = manifest["special_tokens"]
    assert tokenizer.get_vocab_size() == manifest["vocab_size"] == cfg.vocab_size == tiny_data.VOCAB
    assert ids == {name: tokenizer.token_to_id(name) for name in tiny_data.SPECIAL}
    assert sorted(ids.values()) == list(range(cfg.vocab_size - len(ids), cfg.vocab_size))
    stops = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert manifest["eos_token_id"] == source.generation_config["eos_token_id"] == list(cfg.stop_token_ids) == stops
    assert cfg == train_tiny.tiny_config(cfg.vocab_size, cfg.stop_token_ids)
    books = manifest["domains"]["books"]["documents"]
    assert {Path(b["name"]).stem for b in books if b["split"] == "held-out"} == set(tiny_data.HELD_OUT)
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 17_000_000

    text = "“Curiouser and curiouser!” cried Alice; 1865, cafe\u0301.\n\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.replace("e\u0301", "é")  # NFC
    prompts = [json.loads(line) for line in (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = [len(row["prompt"].split()) for row in prompts]
    assert len({row["id"] for row in prompts}) == len(set(lengths)) == 5 and 15 <= min(lengths) <= max(lengths) <= 60


def test_a_loop_is_a_stretch_three_times_in_a_row() -> None:
    free = list(range(40))
    assert not loops(free) and not loops(free[:20] * 2) and not loops([]) and not loops(free + [7] * 7)
    assert loops(free + [7] * 8) and loops(free + [1, 2, 3] * 3 + free) and loops(free[:24] * 3)
    assert not loops(free[:25] * 3) and not loops([1, 2, 3] * 2 + [4] + [1, 2, 3])


def test_missing_books_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        train_tiny.main(["--books", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    (tmp_path / "somebody_a-book.txt").write_text("Once upon a time.")
    with pytest.raises(SystemExit, match=f"found 1 texts but not {tiny_data.HELD_OUT[1]}.txt"):
        train_tiny.main(["--books", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_deeper_model_starts_with_the_layers_of_a_shallower_one() -> None:
    small = numpy_model(tiny_config(moe=True, num_superblocks=1))
    deep = tiny_start.stacked(small, 3 * small.cfg.num_layers)
    assert deep.cfg == tiny_config(moe=True, num_superblocks=3)
    before, after = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (small.params, deep.params))
    assert len(after) > len(before)
    for path, leaf in after.items():
        name = jax.tree_util.keystr(path)
        for repeat in "12":
            name = name.replace(f"['blocks'][{repeat}]", "['blocks'][0]")
        (source,) = [value for key, value in before.items() if jax.tree_util.keystr(key) == name]
        np.testing.assert_array_equal(leaf, source)


def test_a_run_begins_between_two_earlier_ones(tmp_path: Path) -> None:
    """The other one must be where the run in --start began: that is what training.json will say."""
    one, other = (numpy_model(tiny_config(moe=True, num_superblocks=1), seed=seed) for seed in (0, 1))
    between = tiny_start.averaged(one, other, 0.75).params
    for a, b, found in zip(*map(jax.tree.leaves, (one.params, other.params, between)), strict=True):
        np.testing.assert_allclose(found, b + 0.75 * (a - b), atol=1e-6)

    given = ["--books", "b", "--out", "o", "--start", str(tmp_path / "start"), "--average", str(tmp_path / "before")]
    for name, spent in (("start", {"seed": 1, "start": {"seed": 0}}), ("before", {"seed": 0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text(json.dumps(spent))
    args = train_tiny.options([*given, "--share", "0.75"])
    assert tiny_start.history(args) == {"start": {"seed": 1, "start": {"seed": 0}}, "share": 0.75}
    said = {name: tmp_path / name / "training.json" for name in ("start", "before")}
    wrong_ones = (
        lambda: said["before"].write_text(json.dumps({"seed": 2})), said["before"].unlink,
        lambda: said["start"].write_text(json.dumps({"seed": 1})), said["start"].unlink,
    )  # fmt: skip
    for make_wrong in wrong_ones:
        make_wrong()
        with pytest.raises(SystemExit, match="before: expected the folder that the run in .*start started from"):
            tiny_start.history(args)
    for wrong in (["--share", "1"], ["--start"]):
        with pytest.raises(SystemExit):
            train_tiny.options([*given, *wrong])


def test_training_like_a_checkpoint_repeats_every_run_that_led_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    train_like = train_tiny.train_like
    monkeypatch.setattr(train_tiny, "main", lambda argv: calls.append(train_tiny.options(argv)))
    train_like(TINY, ["--books", "books"], tmp_path / "out")
    spent = json.loads((TINY / "training.json").read_text())
    stages = [spent["start"]["start"]["start"], spent["start"]["start"], spent["start"], spent]
    outs = [*(tmp_path / f"out.stage{number}" for number in (1, 2, 3)), tmp_path / "out"]
    for name, option in [
        ("done_steps", "steps"),
        *((n, n) for n in ("layers", "seed", "mtp_steps", "without", "rate")),
    ]:
        assert [getattr(run, option) for run in calls] == [stage[name] for stage in stages], name
    assert [run.layers for run in calls] == [4, 8, 8, 8] and [run.frozen_trunk for run in calls] == [False] * 3 + [True]
    assert [run.out for run in calls] == outs and [run.start for run in calls] == [None, *outs[:3]]
    assert [run.average for run in calls] == [None] * 3 + [outs[1]] and calls[3].share == spent["share"]
    assert all(train_tiny.plan_of(run).minutes is None and run.manifest == TINY / "manifest.json" for run in calls)

    # Resumed, a stage that is done is not run again.
    for out, stage in zip(outs[:3], stages, strict=False):
        out.mkdir()
        (out / "training.json").write_text(json.dumps(stage))
    calls.clear()
    train_like(TINY, ["--books", "books", "--resume"], tmp_path / "out")
    assert [run.out for run in calls] == outs[3:] and calls[0].start == outs[2] and calls[0].average == outs[1]
