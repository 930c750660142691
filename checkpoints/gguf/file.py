"""A GGUF file as a checkpoint: its metadata as a config, and its tensors by canonical name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from checkpoints.errors import CheckpointError, CheckpointWarning
from checkpoints.gguf.aliases import find_factors, spellings
from checkpoints.gguf.config import MODEL_TYPES, config_from_metadata, stop_token_ids
from checkpoints.gguf.header import GgufTensor
from checkpoints.gguf.layers import mtp_blocks, refuse_parts_of_models, settle_metadata
from checkpoints.gguf.metadata_keys import check_value_types, warn_of_unknown_metadata
from checkpoints.gguf.names import Convention, DeltaNetHeads, GgufNames, name_table
from checkpoints.gguf.reader import GgufTensors, StoredWeight
from checkpoints.gguf.sampling import sampling_advice
from checkpoints.gguf.split import read_split_gguf

_IGNORED = ("rope_freqs.weight",)
# First components of tensors outside the text model, in files that hold all of a model: images, audio, and the MTP head
# as Ollama's first converter copied it, of whose norms it is not known whether 1 was added to them.
_OTHER_PARTS = ("v", "mm", "a", "mtp")
_MTP_NORM, _FINAL_NORM = "mtp.norm.weight", "norm.weight"


class GgufFile(GgufTensors):
    """A `TensorSource` over one GGUF file of an architecture in `MODEL_TYPES`, with or without its MTP block.

    Opening reads metadata and the table of tensors, but no weights. Raises CheckpointError if the file is damaged, is
    a part of a model only, has another architecture, or has tensors of an unsupported type.

    Attributes:
        metadata: all metadata of the file by key. Numbers of layers are those that the tensors show.
        config: the content of a config.json of the same model.
        file_names: the usual name in a GGUF file of each weight of the model, by canonical name.
        generation_config: the end-of-text tokens and the sampling advice of the file.

    Warns:
        CheckpointWarning: metadata that the tensors contradict or that have no effect, or tensors of other parts.
    """

    tokenizer_file = None

    def __init__(self, path: str | Path) -> None:
        file = Path(path)
        metadata, tensors = read_split_gguf(file)
        refuse_parts_of_models(file, metadata, tensors)
        check_value_types(file, metadata)
        self.metadata = settle_metadata(file, metadata, tensors)
        self.config = config_from_metadata(file, self.metadata, tensors)
        self.generation_config = {"eos_token_id": stop_token_ids(self.metadata)} | sampling_advice(file, metadata)
        warn_of_unknown_metadata(file, self.metadata)
        factors, factor_names = find_factors(file, tensors)
        names = name_table(self.config["layer_types"], self.config["mtp_num_hidden_layers"] > 0)
        self.file_names = {name: " + ".join(usual.gguf_names) for name, usual in names.items()}
        stored, used = _find_weights(names, tensors)
        if any(name.startswith("mtp.") for name in stored) and _MTP_NORM not in stored and _FINAL_NORM in stored:
            stored[_MTP_NORM] = stored[_FINAL_NORM]  # as llama.cpp does
        left = [name for name in tensors if name not in used | factor_names | set(_IGNORED)]
        for name in _without_other_parts(file, left):
            stored[name] = StoredWeight((tensors[name],), Convention.SAME)  # the loader reports it as unexpected
        super().__init__(file, stored, DeltaNetHeads.from_config(self.config), factors)


class GgufMtpHead(GgufTensors):
    """The MTP head in a GGUF file, which may hold nothing else: `convert_hf_to_gguf.py --mtp` writes such files.

    `tensors` has the head's alone. Other tensors of the file stay unread: embedding and LM head are those of the trunk.
    Raises CheckpointError as `GgufFile`, or if the file has no MTP head.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path)
        self.metadata, tensors = read_split_gguf(file)
        architecture, blocks = self.metadata.get("general.architecture"), mtp_blocks(tensors)
        if architecture not in MODEL_TYPES or len(blocks) != 1:
            what = "no MTP head" if not blocks else f"{len(blocks)} MTP blocks"
            raise CheckpointError(
                f"{file}: has {what} (blk.*.nextn.*) and the architecture {architecture!r}; expected one head of "
                f"{' or '.join(map(repr, MODEL_TYPES))} for mtp=."
            )
        factors, factor_names = find_factors(file, tensors)
        # The head has no DeltaNet layer, so the kinds and heads of the trunk's layers do not matter.
        names = name_table(["full_attention"] * blocks[0], True)
        stored, used = _find_weights({n: g for n, g in names.items() if n.startswith("mtp.")}, tensors)
        if _MTP_NORM not in stored and "output_norm.weight" in tensors:
            stored[_MTP_NORM] = StoredWeight((tensors["output_norm.weight"],), Convention.NORM_GAIN)
        block = f"blk.{blocks[0]}."
        for name in tensors:
            if name.startswith(block) and name not in used | factor_names:
                stored[f"mtp.{name}"] = StoredWeight((tensors[name],), Convention.SAME)  # reported as unexpected
        super().__init__(file, stored, DeltaNetHeads(1, 1, 1, 1), factors)


def _find_weights(
    names: Mapping[str, GgufNames], tensors: Mapping[str, GgufTensor]
) -> tuple[dict[str, StoredWeight], set[str]]:
    """Return what each weight is made of in the first spelling that the file has, and the tensors that are used."""
    stored: dict[str, StoredWeight] = {}
    used: set[str] = set()
    for hf_name, usual in names.items():
        for gguf_names, convention in spellings(usual):
            if all(name in tensors for name in gguf_names):
                stored[hf_name] = StoredWeight(tuple(tensors[name] for name in gguf_names), convention)
                used.update(gguf_names)
                break
    return stored, used


def _without_other_parts(file: Path, names: Iterable[str]) -> list[str]:
    """Return the names that are not of another part of the model; warns of those that are, by part and number."""
    counts = dict.fromkeys(_OTHER_PARTS, 0)
    others = []
    for name in names:
        part = name.partition(".")[0]
        if part in counts:
            counts[part] += 1
        else:
            others.append(name)
    if any(counts.values()):
        listed = ", ".join(f"{part}.* ({count})" for part, count in counts.items() if count)
        warnings.warn(
            f"{file}: {sum(counts.values())} tensors have no effect, since they are of other parts of the model: "
            f"{listed}",
            CheckpointWarning,
            stacklevel=4,
        )
    return others


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a GGUF file: by its ending, or by its first bytes if no other format has its ending."""
    file = Path(path)
    if not file.is_file() or file.suffix in (".safetensors", ".bin", ".pt"):
        return False
    if file.suffix == ".gguf":
        return True
    try:
        with open(file, "rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:
        return False
