"""Change, remove and retype metadata, settings and tensors of every format; every outcome must be right or named.

    python -m tests.helpers.fuzz_files [--cases 10000] [--seed 0]

Every second case is a GGUF file, whose keys get other values and whose tensors other names, or none. The others are
folders in all quantised formats, whose settings get other values and whose tensors other names, shapes and dtypes. An
outcome is "refused" (CheckpointError, ConfigError, ValueError), "loaded" or "loaded with a warning". A folder that
loads with the tensors of the model must have their values; `cannot_be_told` lists the exceptions.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import TINY, CheckpointWarning, SafetensorsDirectory, open_checkpoint
from mtpjax.config import ConfigError
from mtpjax.loading.open_model import eos_token_ids, own_tokenizer
from mtpjax.loading.weight_map import check_source
from mtpjax.sampling_params import SamplingParams
from mtpjax.text.tokenizer import load_tokenizer, tokenizer_to_gguf
from tests.helpers.gguf_files import GgufContents, random_gguf
from tests.helpers.quantized_folders import FORMATS, write_three_matrices

SECONDS, MEBIBYTES = 2.0, 1024
ABSENT = "(absent)"
VALUES: list[Any] = ["x", "", -1, 0, 1, 3, 2.5, True, False, [1], ["a"], [0, 2, 0, 2], [64, 64], {}, {"a": 1}, None]
VALUES.append(ABSENT)
ITEM_SIZES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}


class WrongValuesError(Exception):
    """A changed folder was loaded without a word, with other values than those that were written."""


class GgufCases:
    """Random changes of one GGUF file, written by the `gguf` package."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "case.gguf"
        random_gguf(folder / "whole.gguf", vocab_size=4096)
        self.whole = GgufContents.read(folder / "whole.gguf")
        self.whole.metadata |= tokenizer_to_gguf(load_tokenizer(TINY / "tokenizer.json"), 4096, [4095])
        self.whole.metadata |= {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}

    def write(self, rng: np.random.Generator) -> str:
        """Write one case to `file` and describe it."""
        case = GgufContents(self.whole.architecture, dict(self.whole.metadata), dict(self.whole.tensors))
        if rng.random() < 0.7:
            key = _choose(rng, list(case.metadata))
            value = _choose(rng, [v for v in VALUES if not isinstance(v, dict) and v is not None and v != ""])
            del case.metadata[key]
            if value != ABSENT:
                case.metadata[key if rng.random() < 0.8 else key + "x"] = value
            what = f"{key} = {value!r}"
        else:
            name = _choose(rng, list(case.tensors))
            tensor = case.tensors.pop(name)
            what = f"{name} left out"
            if rng.random() < 0.5:
                new = _choose(
                    rng, [name + "x", name.replace("blk.0", "blk.9"), name.replace("weight", "scale"), "v." + name]
                )
                case.tensors[new] = tensor
                what = f"{name} called {new}"
        self.file.unlink(missing_ok=True)
        case.write(self.file)
        return what

    def load(self) -> None:
        """Load the case as `LLM` would, without its weights."""
        source = open_checkpoint(self.file)
        cfg = check_source(source)  # type: ignore[arg-type]
        own_tokenizer(source)
        SamplingParams.from_generation_config(source.generation_config)
        eos_token_ids(cfg, source.generation_config, cfg.vocab_size)


class FolderCases:
    """Random changes of three matrices in one quantised format."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        write_three_matrices(folder, FORMATS[name])
        self.plain, self.folder = SafetensorsDirectory(folder / "plain"), folder / "packed"
        self.config = json.loads((self.folder / "config.json").read_text())
        raw = (self.folder / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        self.header, self.data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        self.header.pop("__metadata__", None)

    def write(self, rng: np.random.Generator) -> str:
        """Write one case to `folder` and describe it."""
        config, header = copy.deepcopy(self.config), copy.deepcopy(self.header)
        if rng.random() < 0.6:
            path, value = _choose(rng, list(_paths(config["quantization_config"]))), _choose(rng, VALUES)
            settings = config["quantization_config"]
            for key in path[:-1]:
                settings = settings[key]
            if value == ABSENT:
                del settings[path[-1]]
            else:
                settings[path[-1]] = copy.deepcopy(value)
            what = f"{'.'.join(path)} = {value!r}"
        else:
            tensor = _choose(rng, list(header))
            what = f"{tensor} {_change_entry(rng, header, tensor)}"
        (self.folder / "config.json").write_text(json.dumps(config))
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (self.folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + self.data)
        return f"{self.name}: {what}"

    def load(self) -> None:
        """Load the case.

        Raises WrongValuesError if the tensors are those of the model and their values are not.
        """
        source = open_checkpoint(self.folder)
        assert isinstance(source, SafetensorsDirectory)
        if {n: t.shape for n, t in source.tensors.items()} != {n: t.shape for n, t in self.plain.tensors.items()}:
            raise ConfigError("the loader refuses these names and shapes")
        for name in source.tensors:
            if not np.array_equal(source.read(name).astype(np.float32), self.plain.read(name).astype(np.float32)):
                raise WrongValuesError(name)


def cannot_be_told(what: str) -> bool:
    """Return whether nothing in a changed folder tells that its numbers are others.

    These are another type of the same size for a scale or for codes, whose bits mean something in both, and the
    version of GPTQ, which is 1 where it is not given.
    """
    return " as " in what or "gptq v2" in what and "checkpoint_format" in what


def _choose(rng: np.random.Generator, items: list[Any]) -> Any:
    return items[rng.integers(len(items))]


def _paths(settings: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the keys of every setting, those of nested objects, too."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        yield (*prefix, key)
        yield from _paths(value, (*prefix, key))


def _change_entry(rng: np.random.Generator, header: dict[str, Any], tensor: str) -> str:
    """Change the name, shape or dtype of a tensor in the header of a safetensors file; return what was done."""
    entry = header.pop(tensor)
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    kind = _choose(rng, ["renamed", "flat", "with a first axis", "as another type"])
    if kind == "flat":
        entry["shape"] = [int(np.prod(entry["shape"]))]
    elif kind == "with a first axis":
        entry["shape"] = [1, *entry["shape"]]
    elif kind == "as another type":
        count = max(int(np.prod(entry["shape"])), 1)
        entry["dtype"] = _choose(rng, [name for name, item in ITEM_SIZES.items() if count * item == size])
        kind = f"as {entry['dtype']}"
    header[tensor + "x" if kind == "renamed" else tensor] = entry
    return kind


def outcome(load: Callable[[], None], what: str) -> str:
    """Load a case; return "loaded", "loaded with a warning" or "refused".

    Raises:
        TimeoutError: that took more than `SECONDS` of processor time.
        Exception: anything but a refusal in words.
    """
    start = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        try:
            load()
            result = "loaded with a warning" if caught else "loaded"
        except ValueError:  # CheckpointError and ConfigError are ValueErrors
            result = "refused"
        except WrongValuesError:
            if not caught and not cannot_be_told(what):
                raise
            result = "other values, which nothing tells"
    if (seconds := time.process_time() - start) > SECONDS:
        raise TimeoutError(f"{seconds:.1f} s, expected at most {SECONDS:.0f}")
    return result


def run(cases: int, seed: int, folder: Path) -> collections.Counter[str]:
    """Run a number of cases; return how often each outcome occurred. An error names the case."""
    rng = np.random.default_rng(seed)
    gguf = GgufCases(folder)
    folders = [FolderCases(folder / str(i), name) for i, name in enumerate(FORMATS)]
    counts = collections.Counter[str]()
    for number in range(cases):
        case: GgufCases | FolderCases = gguf if number % 2 else folders[number // 2 % len(folders)]
        what = case.write(rng)
        try:
            counts[outcome(case.load, what)] += 1
        except Exception as error:
            error.add_note(f"case {number} of seed {seed}: {what}")
            raise
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(args.cases, args.seed, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(", ".join(f"{count:,} {name}" for name, count in counts.most_common()), f"; at most {peak:,.0f} MiB")
    if peak > MEBIBYTES:
        raise SystemExit(f"more than {MEBIBYTES:,} MiB")


if __name__ == "__main__":
    main()
