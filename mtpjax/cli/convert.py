"""Convert a checkpoint from Hugging Face safetensors to Orbax or back, bit for bit, a few tensors in memory at a time.

    python scripts/convert.py SRC DST [--to orbax|hf] [--max-shard-bytes N]
    python scripts/convert.py SRC DST.gguf [--type q8_0]     # any checkpoint -> GGUF, as llama.cpp reads it; whole in memory

Every tensor of the text model and its MTP head keeps its name and dtype on the way there and back. What is no part of
the text model (vision) is left out, and said.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from checkpoints import (
    GgufFile,
    OrbaxDirectory,
    SafetensorsDirectory,
    open_checkpoint,
    write_gguf,
    write_safetensors_directory,
)
from checkpoints.gguf.writer import WRITABLE_TYPES
from checkpoints.safetensors.header import read_header
from checkpoints.safetensors.reader import INDEX, weight_files
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.load import ORIGIN, Tensor, load_checkpoint, orbax_tensors, save_orbax
from mtpjax.loading.weight_map import export_tensors
from mtpjax.text.tokenizer import load_tokenizer, tokenizer_to_gguf

# Written by the converters themselves.
OWN_FILES = {"config.json", "generation_config.json", "tokenizer.json", INDEX, ORIGIN}
CARRIED = {".json", ".jinja", ".txt", ".model", ".md"}


def companions(folder: Path) -> list[Path]:
    """Files beside the weights that go along: tokenizer settings, chat template, licence and the like."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and not file.name.startswith(".") and file.name not in OWN_FILES
        and (file.suffix in CARRIED or file.name.upper().startswith(("LICENSE", "NOTICE")))
    )  # fmt: skip


def to_orbax(source: SafetensorsDirectory, target: Path) -> tuple[int, list[str]]:
    """Returns the number of tensors written and the names of those left out."""
    published = [info for file in weight_files(source.path) for info in read_header(file)]
    with _bar(sum(info.nbytes for info in source.tensors.values())) as bar:
        written = set(save_orbax(target, source, extra_files=companions(source.path), on_bytes=bar.update))
    return len(written), [info.name for info in published if info.name not in written]


def to_hf(source: OrbaxDirectory, target: Path, max_shard_bytes: int) -> int:
    """Returns the number of tensors written."""
    tensors = list(orbax_tensors(source))
    with _bar(sum(int(np.prod(shape)) * dtype.itemsize for _, shape, dtype, _ in tensors)) as bar:
        write_safetensors_directory(
            target,
            source.config,
            _counted(tensors, bar.update),
            generation_config=source.generation_config or None,
            tokenizer_file=source.tokenizer_file,
            extra_files=companions(source.path),
            max_shard_bytes=max_shard_bytes,
        )
    return len(tensors)


def to_gguf(source: Any, target: Path, kind: str) -> int:
    """Returns the number of tensors written. The tokenizer and chat template go along."""
    model = load_checkpoint(source, dtype=None)
    cfg = model.cfg
    words = load_tokenizer(source.tokenizer_file) if source.tokenizer_file else None
    tokenizer = tokenizer_to_gguf(words, cfg.vocab_size, cfg.stop_token_ids) if words else {}
    tensors = [(name.removeprefix("model."), read) for name, _, _, read in export_tensors(model)]
    with _bar(len(tensors)) as bar:

        def counted(read: Callable[[], np.ndarray]) -> np.ndarray:
            bar.update()
            return read()

        return write_gguf(
            target, config_to_hf(cfg), ((name, partial(counted, read)) for name, read in tensors), kind, tokenizer
        )


def _bar(size: int) -> tqdm:
    return tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False)


def _counted(tensors: Iterable[Tensor], on_bytes: Callable[[int], object]) -> Iterator[Tensor]:
    for name, shape, dtype, read in tensors:

        def counted(read: Callable[[], np.ndarray] = read) -> np.ndarray:
            array = read()
            on_bytes(array.nbytes)
            return array

        yield name, shape, dtype, counted


def _grouped(names: Iterable[str]) -> str:
    """As in: model.visual.* (333), lm_head.weight."""
    parts = Counter(tuple(name.split(".")[:2]) if name.count(".") > 1 else (name,) for name in names)
    return ", ".join(part[0] if len(part) == 1 else f"{'.'.join(part)}.* ({n})" for part, n in sorted(parts.items()))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__.split("\n")[0])
    parser.add_argument("src", type=Path, help="folder of a checkpoint")
    parser.add_argument("dst", type=Path, help="new folder, or file ending in .gguf")
    parser.add_argument(
        "--to", choices=("orbax", "hf", "gguf"), help="format of DST (default: by its name, or what SRC is not)"
    )
    parser.add_argument("--type", choices=WRITABLE_TYPES, default="q8_0", help="of the matrices in a GGUF file")
    parser.add_argument("--max-shard-bytes", type=int, metavar="N", help="size of a safetensors file (default: 4 GiB)")
    args = parser.parse_args(argv)
    if args.max_shard_bytes is not None and args.max_shard_bytes < 1:
        parser.error(f"--max-shard-bytes is {args.max_shard_bytes}, expected a positive number")
    return args


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    began = time.perf_counter()
    try:
        source = open_checkpoint(args.src)
        other = "hf" if isinstance(source, OrbaxDirectory) else "orbax"
        to = args.to or ("gguf" if args.dst.suffix == ".gguf" else other)
        left_out: list[str] = []
        if to == "gguf":
            count = to_gguf(source, args.dst, args.type)
        elif isinstance(source, OrbaxDirectory) and to == "hf":
            count = to_hf(source, args.dst, args.max_shard_bytes or 4 << 30)
        elif isinstance(source, SafetensorsDirectory) and to == "orbax":
            if args.max_shard_bytes:
                raise ValueError("--max-shard-bytes is for --to hf; Orbax has no such files")
            count, left_out = to_orbax(source, args.dst)
        else:
            if isinstance(source, GgufFile):
                raise ValueError(
                    f"{args.src} is a GGUF file, which is not converted to '{to}'; only to another GGUF type"
                )
            raise ValueError(f"{args.src} is already in the format '{to}'")
    except (ValueError, OSError) as error:  # CheckpointError and ConfigError are ValueErrors
        print(f"convert.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"convert.py: interrupted; {args.dst} was not written", file=sys.stderr)
        return 130
    print(f"{args.dst}: {count:,} tensors as {to}, in {time.perf_counter() - began:.1f} s")
    if left_out:
        print(f"left out {len(left_out):,} tensors that are no part of the text model: {_grouped(left_out)}")
    return 0
