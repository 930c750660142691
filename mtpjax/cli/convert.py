"""Convert a checkpoint: Hugging Face safetensors to Orbax or back, bit for bit, or any checkpoint to GGUF.

    mtpjax convert SOURCE DESTINATION [--to orbax|hf] [--max-shard-bytes N]
    mtpjax convert SOURCE model.gguf [--type q8_0]

Between Hugging Face and Orbax every tensor of the text model and its MTP head keeps its name and dtype, and a few
tensors are in memory at a time. A GGUF file is one that llama.cpp reads; the whole model is in memory while it is
written. Tensors that are not part of the text model (vision) are left out and named.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoints import (
    GgufFile,
    OrbaxDirectory,
    SafetensorsDirectory,
    TensorSource,
    open_checkpoint,
    write_gguf,
    write_safetensors_directory,
)
from checkpoints.gguf.writer import WRITABLE_TYPES
from checkpoints.safetensors.header import read_header
from checkpoints.safetensors.reader import INDEX, weight_files
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import ExportedTensor, export_tensors
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.orbax_restore import orbax_tensors
from mtpjax.loading.orbax_save import ORIGIN, save_orbax
from mtpjax.loading.weight_map import OWN_MTP_TENSORS
from mtpjax.text.tokenizer import load_tokenizer, tokenizer_to_gguf

PROG = "mtpjax convert"
# Files that the converters write themselves.
WRITTEN_FILES = {"config.json", "generation_config.json", "tokenizer.json", INDEX, ORIGIN}
COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".md"}


def companion_files(folder: Path) -> list[Path]:
    """Return the files beside the weights that are copied: tokenizer settings, chat template, licence and the like."""

    def is_copied(file: Path) -> bool:
        if not file.is_file() or file.name.startswith(".") or file.name in WRITTEN_FILES:
            return False
        return file.suffix in COPIED_SUFFIXES or file.name.upper().startswith(("LICENSE", "NOTICE"))

    return sorted(file for file in folder.iterdir() if is_copied(file))


def to_orbax(source: SafetensorsDirectory, target: Path) -> tuple[int, list[str]]:
    """Write an Orbax folder. Returns the number of tensors written and the names of those left out."""
    published = [info for file in weight_files(source.path) for info in read_header(file)]
    with _bar(sum(info.nbytes for info in source.tensors.values())) as bar:
        written = set(save_orbax(target, source, extra_files=companion_files(source.path), on_bytes=bar.update))
    return len(written), [info.name for info in published if info.name not in written]


def to_hf(source: OrbaxDirectory, target: Path, max_shard_bytes: int) -> int:
    """Write a Hugging Face folder. Returns the number of tensors written."""
    tensors = list(orbax_tensors(source))
    with _bar(sum(int(np.prod(shape)) * dtype.itemsize for _, shape, dtype, _ in tensors)) as bar:
        write_safetensors_directory(
            target,
            source.config,
            _counted(tensors, bar.update),
            generation_config=source.generation_config or None,
            tokenizer_file=source.tokenizer_file,
            extra_files=companion_files(source.path),
            max_shard_bytes=max_shard_bytes,
        )
    return len(tensors)


def to_gguf(source: TensorSource | OrbaxDirectory, target: Path, tensor_type: str) -> int:
    """Write a GGUF file with tokenizer and chat template. Returns the number of tensors written."""
    own = [name for name in OWN_MTP_TENSORS if isinstance(source, GgufFile) and name in source.tensors]
    if own:
        raise ValueError(f"{source.path}: its MTP head has {', '.join(own)} of its own, which no GGUF written here has")
    model = load_checkpoint(source, dtype=None)
    cfg = model.cfg
    tokenizer = load_tokenizer(source.tokenizer_file) if source.tokenizer_file else None
    metadata = tokenizer_to_gguf(tokenizer, cfg.vocab_size, cfg.stop_token_ids) if tokenizer else {}
    tensors = [(name.removeprefix("model."), read) for name, _, _, read in export_tensors(model)]
    with _bar(len(tensors)) as bar:

        def counted(read: Callable[[], np.ndarray]) -> np.ndarray:
            bar.update()
            return read()

        return write_gguf(
            target, config_to_hf(cfg), ((name, partial(counted, read)) for name, read in tensors), tensor_type, metadata
        )


def _bar(size: int) -> tqdm:
    return tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False)


def _counted(tensors: Iterable[ExportedTensor], on_bytes: Callable[[int], object]) -> Iterator[ExportedTensor]:
    for name, shape, dtype, read in tensors:

        def counted(read: Callable[[], np.ndarray] = read) -> np.ndarray:
            array = read()
            on_bytes(array.nbytes)
            return array

        yield name, shape, dtype, counted


def _group_names(names: Iterable[str]) -> str:
    """Return names grouped by prefix, for example: lm_head.weight, model.visual.* (333)."""
    parts = Counter(tuple(name.split(".")[:2]) if name.count(".") > 1 else (name,) for name in names)
    return ", ".join(part[0] if len(part) == 1 else f"{'.'.join(part)}.* ({n})" for part, n in sorted(parts.items()))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", metavar="SOURCE", type=Path, help="checkpoint to read")
    parser.add_argument("dst", metavar="DESTINATION", type=Path, help="new folder, or file ending in .gguf")
    parser.add_argument(
        "--to",
        choices=("orbax", "hf", "gguf"),
        help="format of DESTINATION (default: by its name, or the one that SOURCE does not have)",
    )
    parser.add_argument(
        "--type", choices=WRITABLE_TYPES, default="q8_0", help="type of the matrices in a GGUF file (default q8_0)"
    )
    parser.add_argument("--max-shard-bytes", type=int, metavar="N", help="size of a safetensors file (default: 4 GiB)")
    args = parser.parse_args(argv)
    if args.max_shard_bytes is not None and args.max_shard_bytes < 1:
        parser.error(f"--max-shard-bytes is {args.max_shard_bytes}, expected a positive number")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run `mtpjax convert`. Returns 1 if the checkpoint cannot be converted, 130 after an interruption."""
    args = _parse(argv)
    start = time.perf_counter()
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
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; {args.dst} was not written", file=sys.stderr)
        return 130
    print(f"{args.dst}: {count:,} tensors as {to}, in {time.perf_counter() - start:.1f} s")
    if left_out:
        print(f"left out {len(left_out):,} tensors that are no part of the text model: {_group_names(left_out)}")
    return 0
