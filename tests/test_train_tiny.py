"""The training of the embedded model, and what it left in checkpoints/tiny."""

import json
import sys
from pathlib import Path

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
import train_tiny


def test_same_seed_same_losses() -> None:
    """Two runs of three steps agree to the last bit; another seed does not."""
    cfg = tiny_config(moe=True, repeats=1)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 4000, dtype=np.int32)

    def run(seed: int) -> list[dict[str, float]]:
        model = numpy_model(cfg, seed=seed, stack=1)
        plan = train_tiny.Plan(batch=2, mtp_steps=2, seed=seed)
        return [parts for _, parts in train_tiny.train(model, tokens, plan, lambda step: step / 3)]

    first = run(0)
    assert len(first) == 3 and set(first[0]) == {"lm", "mtp1", "mtp2", "balance"}
    assert first == run(0)
    assert first != run(1)


def test_distillation_teaches_the_head_alone() -> None:
    """Least where both distributions are equal, and then the entropy; the target is given no gradient."""
    target = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 9)), jnp.float32)
    p = jax.nn.softmax(target)
    entropy = -jnp.mean(jnp.sum(p * jnp.log(p), axis=-1))
    np.testing.assert_allclose(train_tiny.distillation(target + 5, target), entropy, rtol=1e-5)
    assert train_tiny.distillation(0.5 * target, target) > entropy + 1e-3
    to_logits, to_target = jax.grad(train_tiny.distillation, argnums=(0, 1))(0.5 * target, target)
    assert np.asarray(to_logits).any() and not np.asarray(to_target).any()


def test_gains_are_spread_in_the_two_norms_the_head_reads() -> None:
    model = numpy_model(tiny_config(moe=True, repeats=1), stack=1)
    spread = train_tiny.spread_gains(model, seed=0).params
    before, after = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (model.params, spread))
    changed = {jax.tree_util.keystr(path) for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"['norm'].value", "['mtp']['norm'].value"}
    gains = np.log1p(np.concatenate([np.asarray(spread["norm"][...]), np.asarray(spread["mtp"]["norm"][...])]))
    assert 0.5 * train_tiny.GAIN_SPREAD < gains.std() < 1.5 * train_tiny.GAIN_SPREAD


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
    assert {Path(b["file"]).stem for b in manifest["books"] if b["split"] == "held-out"} == set(tiny_data.HELD_OUT)
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 12_000_000

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
