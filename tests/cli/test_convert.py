"""Converting checkpoints on the command line: every tensor comes back bit for bit, and nothing half-written stays."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import SafetensorsDirectory
from mtpjax.cli.convert import main
from mtpjax.loading import orbax_io, orbax_save
from tests.golden.weights import golden_tensors
from tests.helpers.published_models import MODELS, PublishedModel, Tensors, contents, dense_tied, write


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_comes_back_bit_for_bit(model: PublishedModel, tmp_path: Path) -> None:
    case, tensors = model()
    source = write(tmp_path / "hf", case, tensors, model_name="€")
    assert main([str(source), str(tmp_path / "orbax")]) == 0
    assert main([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    assert (
        contents(tmp_path / "back") == contents(source) == {n: (a.dtype.name, a.tobytes()) for n, a in tensors.items()}
    )
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((source / name).read_text())


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
    read_tensor, reads = SafetensorsDirectory.read_into, []

    def read_into(self: Any, name: str, *args: Any) -> None:
        reads.append(name)
        if len(reads) == 20:
            raise KeyboardInterrupt
        read_tensor(self, name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(orbax_io, "BATCH_BYTES", 1000)  # so that part of it is on disk by then
        patch.setattr(SafetensorsDirectory, "read_into", read_into)
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
