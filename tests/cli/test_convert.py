"""Converting checkpoints: every tensor comes back bit for bit, nothing half-written stays, what differs is named."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoints import CheckpointError, open_checkpoint, write_safetensors_directory
from mtpjax.cli.convert import main
from mtpjax.loading import orbax_io, orbax_save
from mtpjax.loading.load import load_checkpoint, load_model
from mtpjax.loading.loaded_model import flatten_params
from mtpjax.loading.orbax_restore import restore_orbax
from tests.golden.weights import golden_config, golden_tensors

BF16 = ml_dtypes.bfloat16
Tensors = dict[str, np.ndarray]
# Zeros of both signs, small numbers, which careless arithmetic flushes to zero, and a large one.
BITS = {2: [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x7B7F], 4: [0x00000000, 0x80000000, 0x00000001, 0x7F000000]}


def cast(tensors: Tensors, dtype: Any, **others: Any) -> Tensors:
    """The tensors as `dtype`, those whose name holds a key of `others` as its value; the first values become `BITS`."""
    out = {}
    for name, array in tensors.items():
        chosen = next((other for part, other in others.items() if part in name), dtype)
        out[name] = array.astype(chosen)
        codes = out[name].reshape(-1).view(f"u{np.dtype(chosen).itemsize}")
        if codes.size > 8:
            codes[: len(BITS[codes.itemsize])] = BITS[codes.itemsize]
    return out


def one_by_one(tensors: Tensors, *within: str) -> Tensors:
    """Experts as a tensor each, in the layers whose names begin with `within`."""
    out: Tensors = {}
    for name, array in tensors.items():
        stem, dot, kind = name.partition(".experts.")
        if not dot or not name.startswith(within):
            out[name] = array
            continue
        for number, expert in enumerate(array):
            parts = (
                zip(("gate_proj", "up_proj"), np.split(expert, 2), strict=True)
                if "gate" in kind
                else [("down_proj", expert)]
            )
            out |= {f"{stem}.experts.{number}.{part}.weight": values.copy() for part, values in parts}
    return out


def renamed(tensors: Tensors, prefix: str) -> Tensors:
    """As a multimodal export names them."""
    return {name.replace("model.", prefix, 1) if name.startswith("model.") else name: a for name, a in tensors.items()}


def moe_fused() -> tuple[str, Tensors]:
    """Qwen3.5: decay rates and DeltaNet norms in float32."""
    tensors = cast(golden_tensors("moe_r1"), BF16, A_log=np.float32, **{"linear_attn.norm": np.float32})
    return "moe_r1", renamed(tensors, "model.language_model.")


def moe_mtp_one_by_one() -> tuple[str, Tensors]:
    """Qwen3.5 again: fused trunk, but the MTP head's experts one by one."""
    return "moe_r1", cast(one_by_one(golden_tensors("moe_r1"), "mtp."), BF16)


def moe_one_by_one() -> tuple[str, Tensors]:
    """With three dtypes in one stack of experts."""
    mixed = {"experts.3.": np.float32, "experts.5.up": np.float16, "dt_bias": np.float32}
    return "moe_r3", cast(one_by_one(golden_tensors("moe_r3"), "model.", "mtp."), BF16, **mixed)


def dense_tied() -> tuple[str, Tensors]:
    return "dense_r1", cast(golden_tensors("dense_r1"), np.float16)


def dense_without_mtp() -> tuple[str, Tensors]:
    """Eight layers, two repeats of the pattern, float32."""
    tensors = cast(golden_tensors("dense_r2"), np.float32, down_proj=BF16)
    return "dense_r2", {name: a for name, a in tensors.items() if not name.startswith("mtp.")}


MODELS = [moe_fused, moe_mtp_one_by_one, moe_one_by_one, dense_tied, dense_without_mtp]


def write(path: Path, case: str, tensors: Tensors, **config: Any) -> Path:
    entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()]
    write_safetensors_directory(path, golden_config(case) | config, entries, generation_config={"eos_token_id": [7]})
    return path


def contents(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Published name -> dtype and bytes of all tensors."""
    source = open_checkpoint(folder)
    return {info.name: (info.dtype.name, source.read(name).tobytes()) for name, info in source.tensors.items()}


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_comes_back_bit_for_bit(model: Callable[[], tuple[str, Tensors]], tmp_path: Path) -> None:
    case, tensors = model()
    source = write(tmp_path / "hf", case, tensors, extra={"kept": "€"})
    assert main([str(source), str(tmp_path / "orbax")]) == 0
    assert main([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    assert (
        contents(tmp_path / "back") == contents(source) == {n: (a.dtype.name, a.tobytes()) for n, a in tensors.items()}
    )
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((source / name).read_text())


@pytest.mark.parametrize("model", [moe_one_by_one, dense_without_mtp])
def test_the_model_of_an_orbax_folder_is_that_of_the_files(
    model: Callable[[], tuple[str, Tensors]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orbax_io, "BATCH_BYTES", 400_000)  # in several groups
    source = write(tmp_path / "hf", *model())
    main([str(source), str(tmp_path / "orbax")])
    hf, orbax = open_checkpoint(source), open_checkpoint(tmp_path / "orbax")
    for dtype in (jnp.float32, jnp.bfloat16):
        for mtp in (True, False):
            want = load_model(hf, dtype=dtype, mtp=mtp)
            got = restore_orbax(orbax, dtype=dtype, mtp=mtp)
            assert got.cfg == want.cfg and got.graph == want.graph
            leaves, wanted = (flatten_params(model.params) for model in (got, want))
            for (path, a), (other, b) in zip(leaves.items(), wanted.items(), strict=True):
                assert path == other and a[...].dtype == b[...].dtype
                assert np.array_equal(np.asarray(a[...]), np.asarray(b[...])), path


def test_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "hf", *dense_tied())
    main([str(source), str(tmp_path / "orbax"), "--to", "orbax"])
    assert main([str(tmp_path / "orbax"), str(tmp_path / "back"), "--to", "hf", "--max-shard-bytes", "100_000"]) == 0
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 110_000
    assert contents(tmp_path / "back") == contents(source)
    assert main([str(source), str(tmp_path / "no"), "--max-shard-bytes", "100"]) == 1
    with pytest.raises(SystemExit):
        main([str(tmp_path / "orbax"), str(tmp_path / "no"), "--max-shard-bytes", "0"])
    assert "Orbax has no such files" in (said := capsys.readouterr().err) and "expected a positive number" in said


def test_what_is_no_part_of_the_text_model_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, tensors = dense_tied()
    vision = {f"model.visual.blocks.{i}.weight": np.zeros(3, np.float32) for i in range(4)}
    spare = {"lm_head.weight": tensors["model.embed_tokens.weight"]}  # tied: never read
    source = write(tmp_path / "hf", case, tensors | vision | spare)
    main([str(source), str(tmp_path / "orbax")])
    said = capsys.readouterr().out
    assert "left out 5 tensors" in said and "lm_head.weight, model.visual.* (4)" in said
    assert f"{len(tensors)} tensors as orbax" in said
    main([str(tmp_path / "orbax"), str(tmp_path / "back")])
    assert contents(tmp_path / "back").keys() == tensors.keys()
    assert "left out" not in capsys.readouterr().out


def test_other_files_go_along_unchanged(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", *dense_tied())
    files = {
        "tokenizer.json": b'{"a":  1}',
        "chat_template.jinja": b"{{ x }}\r\n",
        "vocab.json": b"{}",
        "LICENSE": b"l",
    }
    for name, data in (files | {".hidden.json": b"", "old.bin": b""}).items():
        (source / name).write_bytes(data)
    main([str(source), str(tmp_path / "orbax")])
    main([str(tmp_path / "orbax"), str(tmp_path / "back")])
    own = {"config.json", "generation_config.json"}
    assert {f.name for f in (tmp_path / "orbax").iterdir()} == {*files, *own, "params", orbax_save.ORIGIN}
    assert {f.name for f in (tmp_path / "back").iterdir()} == {*files, *own, "model.safetensors"}
    assert all((tmp_path / "back" / name).read_bytes() == data for name, data in files.items())


# What is refused, and what stays behind: nothing


def nan(tensors: Tensors) -> None:
    tensors["mtp.fc.weight"][3, 5] = np.nan


def three_faults(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.bias"] = np.zeros(2, np.float16)
    tensors["mtp.fc.weight"] = np.zeros((64, 64), np.float16)


def float64(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)


@pytest.mark.parametrize(
    ("spoil", "config", "says"),
    [
        (nan, {}, ["'mtp.fc.weight' has 1 NaN or infinite values", "[3, 5]"]),
        (
            three_faults,
            {},
            [
                "1 missing, 1 mis-shaped and 1 unexpected",
                "'norm.weight' is missing",
                "mlp.bias",
                "[64, 64], expected [64, 128]",
            ],
        ),
        (float64, {}, ["1 tensors are not bfloat16, float16, float32", "'model.norm.weight' (float64)"]),
        (
            lambda tensors: None,
            {"quantization_config": {"quant_method": "fp8"}},
            ["quant_method 'fp8'", "not supported yet"],
        ),
        (lambda tensors: None, {"model_type": "llama"}, ["'model_type' is 'llama'"]),
    ],
    ids=["nan", "three faults", "float64", "fp8", "llama"],
)
def test_a_bad_checkpoint_is_refused_and_leaves_nothing(
    spoil: Callable[[Tensors], None], config: dict, says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, tensors = "dense_r1", {name: a.astype(np.float16) for name, a in golden_tensors("dense_r1").items()}
    spoil(tensors)
    source = write(tmp_path / "hf", case, tensors, **config)
    assert main([str(source), str(tmp_path / "orbax")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("mtpjax convert: ") and all(part in said for part in says), said
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]


def test_ctrl_c_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "hf", *dense_tied())
    whole, reads = type(open_checkpoint(source)).read_into, []

    def read_into(self: Any, name: str, *args: Any) -> None:
        reads.append(name)
        if len(reads) == 20:
            raise KeyboardInterrupt
        whole(self, name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(orbax_io, "BATCH_BYTES", 1000)  # so that part of it is on disk by then
        patch.setattr(type(open_checkpoint(source)), "read_into", read_into)
        assert main([str(source), str(tmp_path / "orbax")]) == 130
    assert "orbax was not written" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]
    assert main([str(source), str(tmp_path / "orbax")]) == 0


def test_an_existing_target_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "hf", *dense_tied())
    (tmp_path / "empty").mkdir()
    assert main([str(source), str(tmp_path / "empty")]) == 0
    (tmp_path / "file").write_text("mine")
    assert main([str(source), str(tmp_path / "file")]) == 1
    assert main([str(source), str(source)]) == 1
    assert main([str(tmp_path / "empty"), str(source)]) == 1
    assert main([str(source), str(tmp_path / "new"), "--to", "hf"]) == 1
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [("already exists" in line, "already in the format 'hf'" in line) for line in said] == [
        (True, False),
        (True, False),
        (True, False),
        (False, True),
        (False, False),
    ]
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "new").exists()


# A damaged Orbax folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    main([str(write(folder / "hf", *dense_tied())), str(folder / "orbax")])
    return folder / "orbax"


def test_without_its_list_of_names_it_loads_but_cannot_go_back(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list_of_names = stored / orbax_save.ORIGIN
    text = list_of_names.read_text()
    try:
        for broken, says in (
            (None, "cannot be read"),
            ('{"tensors": {"norm.weight": ["norm.weight", "int3"]}}', "cannot be read"),
            (text.replace("layers.2.mlp.up_proj.weight", "layers.2.mlp.up_proj.bias"), "2 names do not fit"),
        ):
            list_of_names.unlink() if broken is None else list_of_names.write_text(broken)
            assert main([str(stored), str(tmp_path / "back")]) == 1
            assert f"{orbax_save.ORIGIN}: {says}" in capsys.readouterr().err
            load_checkpoint(open_checkpoint(stored), dtype=jnp.float32)
    finally:
        list_of_names.write_text(text)


def test_a_tree_that_is_not_of_its_config_is_refused_with_all_that_differs(stored: Path) -> None:
    file = stored / "config.json"
    text = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(text) | {"intermediate_size": 80, "tie_word_embeddings": False}))
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(open_checkpoint(stored), dtype=jnp.float32)
    finally:
        file.write_text(text)
    said = str(caught.value)
    assert "16 weights do not fit" in said  # gate, up and down of 4 layers and the MTP head, and the LM head
    assert "'lm_head' is missing, expected shape [160, 64]" in said
    assert "'decoder.blocks.0.layers.3.mlp.up' has shape [1, 96, 64], expected shape [1, 80, 64]" in said


@pytest.mark.parametrize("damage", ["truncated", "no metadata", "no data"])
def test_a_damaged_tree_is_named(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One read after the other: of several that fail at once, Orbax leaves all but the first to report to a closed loop.
    monkeypatch.setattr(orbax_io, "BATCH_BYTES", 1)
    main([str(write(tmp_path / "hf", *dense_tied())), str(tmp_path / "orbax")])
    params = tmp_path / "orbax" / "params"
    largest = max((f for f in params.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    if damage == "truncated":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif damage == "no metadata":
        (params / "_METADATA").unlink()
    else:
        largest.unlink()
    with pytest.raises(CheckpointError, match=str(params)):
        load_checkpoint(open_checkpoint(tmp_path / "orbax"), dtype=jnp.float32)


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "hf", "dense_r2", golden_tensors("dense_r2"))
    monkeypatch.setattr(orbax_io, "BATCH_BYTES", 50_000)
    alive, sizes, peaks = [0], [], []

    def watched(make: Callable[[], np.ndarray]) -> orbax_io.LazyLeaf:
        def made() -> np.ndarray:
            array = make()
            alive[0] += array.nbytes
            weakref.finalize(array, lambda size=array.nbytes: alive.__setitem__(0, alive[0] - size))
            sizes.append(array.nbytes)
            peaks.append(alive[0])
            return array

        return orbax_io.LazyLeaf(made)

    monkeypatch.setattr(orbax_save, "LazyLeaf", watched)
    assert main([str(source), str(tmp_path / "orbax")]) == 0
    assert max(peaks) <= 50_000 + max(sizes) < sum(sizes) / 8
