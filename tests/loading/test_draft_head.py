"""The draft head: which ids it has, its rows in every form of a weight, and what `LLM` and the commands say of it."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import TINY
from kernels_pallas.matmul import linear
from kernels_pallas.packed.formats import FORMATS
from kernels_pallas.platform import override_platform
from kernels_pallas.weights import FusedPlaceholder, QuantizedTensor, TransposedWeight
from mtpjax import LLM, SamplingParams
from mtpjax.cli import count_tokens, info
from mtpjax.loading.draft_head import choose_draft_token_ids, take_rows, with_draft_head
from mtpjax.loading.open_model import OpenedModel
from mtpjax.text.draft_vocab import DRAFT_VOCAB_FILE, read_draft_vocab
from mtpjax.text.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.models import cpu_only, numpy_model, tiny_config
from tests.helpers.packed_weights import random_weight
from tests.helpers.word_checkpoint import MODEL, SMALL, write_checkpoint

pytestmark = pytest.mark.fast
ROWS = np.asarray([0, 3, 127, 128, 200, 259], np.int32)
FLOAT32 = jnp.dtype(jnp.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer of 90 words and 96 rows of embeddings."""
    return write_checkpoint(tmp_path_factory.mktemp("vocab") / "hf", tokenizer=True)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "bf16"])
def test_rows_of_a_packed_weight_are_the_same_numbers(name: str) -> None:
    weight = random_weight(name, (260, 256))
    rows = take_rows(weight, ROWS, FLOAT32)
    dense = rows.dequantize() if isinstance(rows, QuantizedTensor) else rows
    np.testing.assert_array_equal(dense, np.asarray(weight.dequantize())[ROWS])
    assert isinstance(rows, QuantizedTensor) == (weight.layout != "fp8")  # whose rows share scales


@pytest.mark.parametrize("name", ["iq4_nl", "q8_0"])
@pytest.mark.parametrize("count", [1, 6])
def test_the_kernel_multiplies_with_any_number_of_rows(name: str, count: int) -> None:
    weight = random_weight(name, (260, 128))
    rows = take_rows(weight, ROWS[-count:], FLOAT32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 128)), jnp.float32)
    with override_platform("cuda", (9, 0), interpret=True):
        part, whole = linear(x, rows), linear(x, weight)
    np.testing.assert_allclose(part, whole[:, ROWS[-count:]], atol=1e-4)


def test_rows_of_other_weights() -> None:
    weight = random_weight("plain", (260, 128))
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(take_rows(weight.astype(dtype), ROWS, FLOAT32), weight.astype(dtype)[ROWS])
    transposed = take_rows(TransposedWeight(weight.T), ROWS, FLOAT32)
    assert isinstance(transposed, TransposedWeight) and transposed.shape == (len(ROWS), 128)
    np.testing.assert_array_equal(transposed.array, weight[ROWS].T)
    padded = jnp.pad(weight.T, ((0, 0), (0, 12)))  # as the layout of a CPU pads the outputs
    np.testing.assert_array_equal(take_rows(TransposedWeight(padded, (260,)), ROWS, FLOAT32).array, weight[ROWS].T)
    with pytest.raises(TypeError, match="rows of FusedPlaceholder"):
        take_rows(FusedPlaceholder(), ROWS, FLOAT32)


@cpu_only
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_has_the_rows_of_the_lm_head_and_nothing_else_changes(tied: bool) -> None:
    model = numpy_model(tiny_config(moe=False, num_superblocks=1, tied_embeddings=tied))
    assert with_draft_head(model, None) is model
    with_head = with_draft_head(model, ROWS[:2])
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(with_head.params)}
    before = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)}
    new = sorted(set(leaves) - set(before))
    assert len(new) == 2 and all("draft_head" in name for name in new)
    assert all(leaves[name] is leaf for name, leaf in before.items())
    head = before["['embedding'].value" if tied else "['lm_head'].value"]
    np.testing.assert_array_equal(leaves[next(n for n in new if "weight" in n)], head[ROWS[:2]])


def chosen(model: Any, draft_vocab_size: Any, tokenizer: Any = None, folder: Path | None = None) -> list[int] | None:
    ids = choose_draft_token_ids(OpenedModel(model, FLOAT32, tokenizer, {}, folder), draft_vocab_size, (95, 7))
    return None if ids is None else ids.tolist()


def test_without_a_file_the_lowest_ids_are_the_most_frequent(tokenizer: Tokenizer) -> None:
    assert chosen(MODEL, None) is None
    assert chosen(MODEL, 1) == [0, 7, 95]  # and the stop tokens
    assert chosen(MODEL, 3) == [0, 1, 2, 7, 95]
    assert chosen(MODEL, 96) is chosen(MODEL, 95) is None  # nothing would be left out
    assert chosen(MODEL, 3, tokenizer) == [0, 1, 2, 7]  # 95 is a row behind those of the tokenizer's 90 words
    tokenizer = load_tokenizer(TINY / "tokenizer.json")
    assert tokenizer.added_token_ids == [4093, 4094, 4095]


@pytest.mark.parametrize("bad", [0, -1, 91, 2.0, True])
def test_a_size_out_of_range(tokenizer: Tokenizer, bad: Any) -> None:
    with pytest.raises(ValueError, match=rf"draft_vocab_size is {bad!r}; expected a whole number from 1 to 90 \(the"):
        chosen(MODEL, bad, tokenizer)


def count(texts: list[Path], output: Path, *options: str) -> int:
    return count_tokens.main([*map(str, texts), "--output", str(output), *options])


def test_counted_ids_and_those_of_a_file_in_the_folder(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, lines, output = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / DRAFT_VOCAB_FILE
    text.write_text("w5 w5 w9\n" * 3 + "w2\n")
    rows: list[dict[str, Any]] = [
        {"prompt": [9, 9], "text": "w9", "token_ids": [11, 9]},
        {"prompt": "w2", "text": "w2"},
    ]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert count([text, lines], output, "--model", str(folder)) == 0
    assert f"16 tokens, 4 ids  {output}" in capsys.readouterr().out
    vocab = read_draft_vocab(output, tokenizer, 90)
    assert vocab.token_ids == (5, 9, 2, 11) and vocab.num_tokens == 16  # 6, 6, 3, 1 of them
    assert chosen(MODEL, output, tokenizer) == [2, 5, 7, 9, 11]
    assert chosen(MODEL, 2, tokenizer, folder=tmp_path) == [5, 7, 9]
    assert chosen(MODEL, 6, tokenizer, folder=tmp_path) == [0, 1, 2, 5, 7, 9, 11]  # the rest by their ids
    assert count([text, lines], output, "--model", str(folder), "--size", "1") == 0
    assert chosen(MODEL, str(output), tokenizer) == [5, 7]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\n", "a.txt: is not UTF-8 text"),
        ("a.txt", b"", "the texts have no tokens"),
        ("a.jsonl", b"{}\n", 'a.jsonl:1: has no text; expected an object with "prompt"'),
        ("a.jsonl", b'\n"w1"\n', "a.jsonl:2: has no text"),
        ("a.jsonl", b"{\n", "a.jsonl:1: is not JSON"),
        ("a.jsonl", b'{"token_ids": [1.5]}\n', "a.jsonl:1: has a prompt or an answer that is neither a text nor"),
        ("a.jsonl", b'{"token_ids": [90]}\n', "id 90 is outside the vocabulary 0...89"),
        ("a.jsonl", b'{"messages": []}\n', 'a.jsonl:1: has "messages", but the checkpoint has no chat template'),
        ("none/a.txt", None, "none/a.txt"),
    ],
)
def test_texts_that_cannot_be_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert count([tmp_path / name], tmp_path / "out.json", "--model", str(folder)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["tokenizer"].update(sha256="00"),
            "counted with a tokenizer of 4096 .*expected that of this .*4096",
        ),
        (lambda c: c["tokenizer"].update(size=90), "counted with a tokenizer of 90 tokens"),
        (lambda c: c.update(format="other"), "its format is 'other', expected 'mtpjax draft vocabulary 1'"),
        (lambda c: c.pop("token_ids"), "'token_ids' is missing"),
        (lambda c: c.update(token_ids=[1, 4096]), r"id 4096 is outside the vocabulary 0\.\.\.4095"),
        (lambda c: c.update(token_ids=[1, 1]), "empty or not all different"),
        (lambda c: c.update(token_ids=[]), "empty or not all different"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_file_is_an_error_with_its_path(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "ids.json"
    if change:
        content = json.loads((TINY / DRAFT_VOCAB_FILE).read_text())
        change(content)
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{path}: .*{message}.*mtpjax count-tokens"):
        LLM(draft_vocab_size=path, max_model_len=64)


def test_the_embedded_model_drafts_from_the_ids_of_its_folder() -> None:
    """The text is the same; the file is what its tokenizer and training text say."""
    params = SamplingParams(max_tokens=24, temperature=0.8, ignore_eos=True)
    outputs = []
    for draft_vocab_size in (None, 300):
        llm = LLM(max_model_len=64, dtype="float32", draft_vocab_size=draft_vocab_size, prefill_buckets=(16,))
        outputs.append(llm.generate(["Once upon a time", "The old man"], params))
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]
    ids = read_draft_vocab(TINY / DRAFT_VOCAB_FILE, load_tokenizer(TINY / "tokenizer.json"), 4096).token_ids
    (path,) = [path for path in jax.tree_util.tree_leaves(llm.engine.runner.model.params["draft_head"]["token_ids"])]
    assert set(path.tolist()) == {*ids[:300], 4093, 4094, 4095}


def test_no_head_where_nothing_is_drafted(folder: Path) -> None:
    llm = LLM(folder, num_speculative_tokens=0, draft_vocab_size=5, **SMALL)
    assert "draft_head" not in llm.engine.runner.model.params
    with pytest.raises(ValueError, match="draft_vocab_size is 500"):
        LLM(folder, num_speculative_tokens=0, draft_vocab_size=500, **SMALL)


def test_info_counts_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--draft-vocab-size", "1024"]) == 0
    assert "1,024 of 4,096 rows of the LM head: 0.5 MiB more" in capsys.readouterr().out
