"""The training of the embedded model, and its files in checkpoints/tiny."""

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
from mtpjax.config import FULL, LINEAR
from mtpjax.hf_config import config_from_hf
from mtpjax.loading.load import load_checkpoint
from scripts.tiny_model import checkpoint, data, loss, start, state, steps, train
from scripts.tiny_model.card import card
from scripts.tiny_model.samples import has_loop
from scripts.tiny_model.state import Plan, Progress, Saves
from tests.helpers.models import numpy_model, tiny_config


def run(
    plan: Plan, num_steps: int = 3, last: int | None = None, layer_pattern: tuple[str, ...] = (LINEAR, FULL)
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Return the parts of the loss of the first `last` steps of a run of `num_steps`, and the state after these."""
    cfg = tiny_config(moe=True, num_superblocks=1, layer_pattern=layer_pattern)
    first = steps.new_state(numpy_model(cfg, seed=plan.seed), plan)
    training = steps.train(cfg, first, random_tokens(), plan, lambda step: step / num_steps)
    states = list(itertools.islice(training, last))
    return [parts for _, parts in states], states[-1][0]


def random_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, tiny_config(moe=True).vocab_size, 6000, dtype=np.int32)


@pytest.mark.slow
def test_a_run_repeats_to_the_last_bit_even_if_it_is_resumed(tmp_path: Path) -> None:
    """The same seed gives the same losses, another seed does not.

    A save brings back weights, averages, optimiser and the order of the windows.
    """
    plan = Plan(batch=2, mtp_steps=2)
    whole, _ = run(plan, 4)
    assert len(whole) == 4 and set(whole[0]) == {"rate", "lm", "mtp1", "mtp2", "balance"}
    assert run(replace(plan, seed=1), 4, last=1)[0] != whole[:1]

    begun, unfinished = run(plan, 4, last=2)
    saves = Saves(tmp_path / "state", plan)
    saves.save(unfinished, Progress(2, 1.5, [{"step": 2, "lm": 3.0}]))
    cfg = tiny_config(moe=True, num_superblocks=1)
    like = steps.new_state(numpy_model(cfg, seed=7), plan)
    found = saves.latest(like)
    assert found is not None
    restored, progress = found
    assert (progress.step, progress.seconds, progress.rows) == (2, 1.5, [{"step": 2, "lm": 3.0}])
    resumed = steps.train(cfg, restored, random_tokens(), plan, lambda step: step / 4, progress.step)
    assert begun + [parts for _, parts in resumed] == whole

    with pytest.raises(SystemExit, match="has mtp_steps = 2, this one 3"):
        Saves(tmp_path / "state", replace(plan, mtp_steps=3)).latest(like)
    assert Saves(tmp_path / "elsewhere", plan).latest(like) is None


@pytest.mark.slow
def test_accumulated_parts_are_the_mean_of_the_batch() -> None:
    """The same windows are read in two parts. Only the balance of experts may differ: it is not linear in the batch."""
    plan = Plan(batch=2, mtp_steps=1, optimizer="adamw")
    (first, second), _ = run(plan, 2, layer_pattern=(FULL,))
    (first_in_parts, second_in_parts), _ = run(replace(plan, accumulate=2), 2, layer_pattern=(FULL,))
    for name in ("lm", "mtp1"):
        np.testing.assert_allclose(first_in_parts[name], first[name], rtol=1e-5)
        np.testing.assert_allclose(second_in_parts[name], second[name], rtol=1e-3)


@pytest.mark.slow
def test_bfloat16_computes_while_the_weights_stay_float32() -> None:
    plan = Plan(batch=2, mtp_steps=1, optimizer="adamw")
    (float32,), _ = run(plan, 1)
    (bfloat16,), trained = run(replace(plan, dtype="bfloat16"), 1)
    assert bfloat16["lm"] != float32["lm"]
    np.testing.assert_allclose(bfloat16["lm"], float32["lm"], rtol=2e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained["params"])} == {jnp.dtype(jnp.float32)}


def test_a_curve_goes_on_from_that_of_the_run_before(tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.mkdir()
    assert state.read_curve(before) == []
    state.write_curve(before, [{"step": 20, "lm": 3.0}, {"step": 40, "lm": 2.5, "held_out": 2.6}], [])
    state.write_curve(tmp_path, [{"step": 20, "lm": 2.0}], state.read_curve(before))
    lines = (tmp_path / "loss.csv").read_text().splitlines()
    assert lines == ["stage,step,lm,held_out", "1,20,3.0,", "1,40,2.5,2.6", "2,20,2.0,"]
    (before / "loss.csv").write_text("step,lm\n20,3.0\n")
    assert state.read_curve(before) == [{"stage": 1.0, "step": 20.0, "lm": 3.0}]


def test_a_frozen_trunk_stays_to_the_last_bit_and_its_head_learns() -> None:
    """That holds for the weights and their moving average. Without a trained trunk there is nothing to freeze."""
    plan = Plan(batch=2, mtp_steps=1, frozen_trunk=True)
    cfg = tiny_config(moe=True, num_superblocks=1)
    before = jax.tree_util.tree_leaves_with_path(numpy_model(cfg, seed=plan.seed).params)
    _, trained = run(plan)
    for name in ("params", "ema"):
        after = dict(jax.tree_util.tree_leaves_with_path(trained[name]))
        changed = {jax.tree_util.keystr(path): not np.array_equal(leaf, after[path]) for path, leaf in before}
        assert any(changed.values()) and all(
            path.startswith("['mtp']") == has_changed for path, has_changed in changed.items()
        ), changed
    with pytest.raises(SystemExit):
        train.options(["--books", "b", "--out", "o", "--frozen-trunk"])


def test_the_manifest_names_the_text_that_differs(tmp_path: Path) -> None:
    texts = [data.Document(domain, f"{domain}-1", "text", "train") for domain in data.LICENCES]
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(data.manifest(texts, checkpoint.tiny_config(4096, (1, 2)), {})))
    data.check_manifest(texts, file)
    with pytest.raises(SystemExit, match="python: python-1 is not the text that is listed there"):
        data.check_manifest([texts[0], replace(texts[1], text="other"), texts[2]], file)
    with pytest.raises(SystemExit, match="books: books-0 is not listed there"):
        data.check_manifest([replace(texts[0], name="books-0"), *texts], file)


def test_talk_is_the_same_each_time_and_its_held_out_part_is_new() -> None:
    training, held_out, small = data.read_talk()
    listed = json.loads((TINY / "manifest.json").read_text())["domains"]["talk"]["documents"]
    assert [training.manifest_entry(), held_out.manifest_entry(), small.manifest_entry()] == listed
    trained = set(training.text.split(data.END_OF_TEXT))
    conversations = held_out.text.split(data.END_OF_TEXT)
    assert len(conversations) == data.HELD_OUT_TALKS and not trained & set(conversations)


def test_small_talk_adds_up() -> None:
    sums = re.findall(r"(\d+) plus (\d+) is (\d+)\.", data.read_talk()[2].text)
    assert {(a, b) for a, b, _ in sums} >= {(str(a), str(b)) for a in range(11) for b in range(11)}
    assert all(int(a) + int(b) == int(c) for a, b, c in sums)


def test_a_text_is_left_out_by_its_name() -> None:
    """The model is not trained on it; the tokenizer, which never reads small talk, is; a wrong name is refused."""
    documents = data.read_talk()
    training = [d for d in documents if d.split == "train"]
    tokenized, everything = checkpoint.training_texts(documents, ())
    assert everything == training and [d.name for d in tokenized] == ["talk"]
    assert checkpoint.training_texts(documents, [data.SMALL_TALK]) == (tokenized, tokenized)
    assert checkpoint.training_texts(documents, ["talk"]) == (tokenized, training[1:])
    with pytest.raises(SystemExit, match="--without 'nothing': no text to train on has this name"):
        checkpoint.training_texts(documents, ["talk", "nothing"])


def test_distillation_teaches_the_head_alone() -> None:
    """The loss is least, namely the entropy, if both distributions are equal; the target gets no gradient."""
    target = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 9)), jnp.float32)
    p = jax.nn.softmax(target)
    entropy = -jnp.mean(jnp.sum(p * jnp.log(p), axis=-1))
    np.testing.assert_allclose(loss.distillation(target + 5, target), entropy, rtol=1e-5)
    assert loss.distillation(0.5 * target, target) > entropy + 1e-3
    to_logits, to_target = jax.grad(loss.distillation, argnums=(0, 1))(0.5 * target, target)
    assert np.asarray(to_logits).any() and not np.asarray(to_target).any()


def test_gains_are_spread_in_the_two_norms_before_the_head() -> None:
    model = numpy_model(tiny_config(moe=True, num_superblocks=1))
    spread = loss.spread_gains(model, seed=0).params
    before, after = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (model.params, spread))
    changed = {jax.tree_util.keystr(path) for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"['norm'].value", "['mtp']['norm'].value"}
    gains = np.log1p(np.concatenate([np.asarray(spread["norm"][...]), np.asarray(spread["mtp"]["norm"][...])]))
    assert 0.5 * loss.GAIN_SPREAD < gains.std() < 1.5 * loss.GAIN_SPREAD


def test_the_embedded_model_tells_before_a_norm_from_after_it() -> None:
    """Its gains are spread like those of published checkpoints; otherwise no acceptance could tell."""
    params = load_checkpoint(open_checkpoint(TINY), dtype=jnp.float32).params
    for norm in (params["norm"], params["mtp"]["norm"]):
        gains = 1 + np.asarray(norm[...])
        assert gains.std() > 0.3 * gains.mean()


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_expert_gradients_equal_a_dense_reference(rows: int) -> None:
    """The reference runs every expert on every row and picks the chosen ones; gradients are compared, too."""
    rng = np.random.default_rng(rows)
    x, target = rng.normal(size=(2, rows, 16)).astype(np.float32)
    gate_up = rng.normal(size=(2, 8, 12, 16)).astype(np.float32)
    down = rng.normal(size=(2, 8, 16, 6)).astype(np.float32)
    topk_ids = jnp.asarray(np.argsort(rng.random((rows, 8)), axis=1)[:, :2])
    weights = rng.random((rows, 2)).astype(np.float32)
    valid = jnp.arange(rows) >= rows // 4

    def grouped(x: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array) -> jax.Array:
        return fused_moe(x, gate_up, down, jnp.int32(1), topk_ids, weights, valid)

    def dense(x: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array) -> jax.Array:
        gate, up = jnp.split(jnp.einsum("nd,eod->neo", x, gate_up[1]), 2, axis=-1)
        expert_rows = jnp.einsum("nei,edi->ned", jax.nn.silu(gate) * up, down[1])
        picked = jnp.take_along_axis(expert_rows, topk_ids[..., None], axis=1)
        return jnp.sum(picked * weights[..., None], axis=1) * valid[:, None]

    arguments = (x, gate_up, down, weights)
    grouped_result, dense_result = (
        jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sum(f(*a) * target), (0, 1, 2, 3)))(*arguments)
        for f in (grouped, dense)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grouped_result, dense_result)


def test_the_embedded_files_fit_together() -> None:
    """Manifest, tokenizer, config and generation config name the same ids; the folder stays small."""
    manifest = json.loads((TINY / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    source = open_checkpoint(TINY)
    cfg = config_from_hf(source.config)
    ids = manifest["special_tokens"]
    assert tokenizer.get_vocab_size() == manifest["vocab_size"] == cfg.vocab_size == data.VOCAB
    assert ids == {name: tokenizer.token_to_id(name) for name in data.SPECIAL}
    assert sorted(ids.values()) == list(range(cfg.vocab_size - len(ids), cfg.vocab_size))
    stops = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert manifest["eos_token_id"] == source.generation_config["eos_token_id"] == list(cfg.stop_token_ids) == stops
    assert cfg == checkpoint.tiny_config(cfg.vocab_size, cfg.stop_token_ids)
    books = manifest["domains"]["books"]["documents"]
    assert {Path(b["name"]).stem for b in books if b["split"] == "held-out"} == set(data.HELD_OUT)
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 17_000_000

    text = "“Curiouser and curiouser!” cried Alice; 1865, cafe\u0301.\n\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.replace("e\u0301", "é")  # NFC
    prompts = [json.loads(line) for line in (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = [len(row["prompt"].split()) for row in prompts]
    assert len({row["id"] for row in prompts}) == len(set(lengths)) == 5 and 15 <= min(lengths) <= max(lengths) <= 60


def test_the_card_is_made_from_the_figures() -> None:
    model = load_checkpoint(open_checkpoint(TINY), dtype=jnp.dtype(jnp.float32))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    report = json.loads((TINY / "report.json").read_text(encoding="utf-8"))
    assert (TINY / "README.md").read_text(encoding="utf-8") == card(model.cfg, num_parameters, TINY, report)


def test_a_loop_is_a_stretch_three_times_in_a_row() -> None:
    tokens = list(range(40))
    for looped in (tokens + [7] * 8, tokens + [1, 2, 3] * 3 + tokens, tokens[:24] * 3):
        assert has_loop(looped)
    for free in (tokens, tokens[:20] * 2, [], tokens + [7] * 7, tokens[:25] * 3, [1, 2, 3] * 2 + [4] + [1, 2, 3]):
        assert not has_loop(free)


def test_missing_books_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        train.main(["--books", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    (tmp_path / "somebody_a-book.txt").write_text("Once upon a time.")
    with pytest.raises(SystemExit, match=f"found 1 texts but not {data.HELD_OUT[1]}.txt"):
        train.main(["--books", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_deeper_model_starts_with_the_layers_of_a_shallower_one() -> None:
    small = numpy_model(tiny_config(moe=True, num_superblocks=1))
    deep = start.stacked(small, 3 * small.cfg.num_layers)
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
    """The other run must be the one that the run in --start began from; training.json will say so."""
    one, other = (numpy_model(tiny_config(moe=True, num_superblocks=1), seed=seed) for seed in (0, 1))
    between = start.averaged(one, other, 0.75).params
    for a, b, found in zip(*map(jax.tree.leaves, (one.params, other.params, between)), strict=True):
        np.testing.assert_allclose(found, b + 0.75 * (a - b), atol=1e-6)

    arguments = [
        "--books",
        "b",
        "--out",
        "o",
        "--start",
        str(tmp_path / "start"),
        "--average",
        str(tmp_path / "before"),
    ]
    for name, training in (("start", {"seed": 1, "start": {"seed": 0}}), ("before", {"seed": 0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text(json.dumps(training))
    args = train.options([*arguments, "--share", "0.75"])
    assert start.history(args) == {"start": {"seed": 1, "start": {"seed": 0}}, "share": 0.75}
    files = {name: tmp_path / name / "training.json" for name in ("start", "before")}
    wrong_ones = (
        lambda: files["before"].write_text(json.dumps({"seed": 2})),
        files["before"].unlink,
        lambda: files["start"].write_text(json.dumps({"seed": 1})),
        files["start"].unlink,
    )
    for make_wrong in wrong_ones:
        make_wrong()
        with pytest.raises(SystemExit, match="before: expected the folder that the run in .*start started from"):
            start.history(args)
    for wrong in (["--share", "1"], ["--start"]):
        with pytest.raises(SystemExit):
            train.options([*arguments, *wrong])


def test_training_like_a_checkpoint_repeats_every_run_that_led_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    train_like = train.train_like
    monkeypatch.setattr(train, "main", lambda argv: calls.append(train.options(argv)))
    train_like(TINY, ["--books", "books"], tmp_path / "out")
    training = json.loads((TINY / "training.json").read_text())
    stages = [training["start"]["start"]["start"], training["start"]["start"], training["start"], training]
    outs = [*(tmp_path / f"out.stage{number}" for number in (1, 2, 3)), tmp_path / "out"]
    for name, option in [
        ("done_steps", "steps"),
        *((n, n) for n in ("layers", "seed", "mtp_steps", "without", "rate")),
    ]:
        assert [getattr(run, option) for run in calls] == [stage[name] for stage in stages], name
    assert [run.layers for run in calls] == [4, 8, 8, 8] and [run.frozen_trunk for run in calls] == [False] * 3 + [True]
    assert [run.out for run in calls] == outs and [run.start for run in calls] == [None, *outs[:3]]
    assert [run.average for run in calls] == [None] * 3 + [outs[1]] and calls[3].share == training["share"]
    assert all(train.make_plan(run).minutes is None and run.manifest == TINY / "manifest.json" for run in calls)

    # A stage that is done is not run again if the training is resumed.
    for out, stage in zip(outs[:3], stages, strict=False):
        out.mkdir()
        (out / "training.json").write_text(json.dumps(stage))
    calls.clear()
    train_like(TINY, ["--books", "books", "--resume"], tmp_path / "out")
    assert [run.out for run in calls] == outs[3:] and calls[0].start == outs[2] and calls[0].average == outs[1]
