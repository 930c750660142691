"""Other spellings of the tensors of a GGUF file, and the factors that lie beside some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from checkpoints.errors import REDOWNLOAD, CheckpointError
from checkpoints.gguf.header import GgufTensor
from checkpoints.gguf.names import Convention, GgufNames

# llama.cpp's converter joins gate and up with --fuse-gate-up-exps: the rows of the gate, then those of up.
_FUSED_GATE_UP = "ffn_gate_up_exps.weight"
_BIAS = ".ssm_dt.bias"  # Ollama's own converter leaves "bias" out
_WEIGHT, _FACTOR, _ACTIVATION_FACTOR = ".weight", ".scale", ".input_scale"


def spellings(names: GgufNames) -> Iterator[GgufNames]:
    """Yield the names as llama.cpp's converter writes them, then the other ones that stand for the same weight."""
    yield names
    first = names.gguf_names[0]
    if names.convention is Convention.GATE_UP:
        block = first.removesuffix("ffn_gate_exps.weight")
        yield GgufNames((block + _FUSED_GATE_UP,), Convention.SAME)
    elif first.endswith(_BIAS):
        yield GgufNames((first.removesuffix(".bias"),), names.convention)


def find_factors(file: Path, tensors: Mapping[str, GgufTensor]) -> tuple[dict[str, GgufTensor], set[str]]:
    """Return the factor of each weight that has one, by the weight's name, and the names of all tensors of factors.

    The second factor of NVFP4 is a tensor of its own: one number for a matrix, or one for each expert of a stack. It is
    called `blk.0.ffn_gate.scale` or `blk.0.ffn_gate.weight.scale`. An `input_scale` is of activations, which are not
    quantised here.

    Raises:
        CheckpointError: a factor of another shape or type, or two for one weight.
    """
    factors: dict[str, GgufTensor] = {}
    names: set[str] = set()
    for name, tensor in tensors.items():
        if not name.endswith(_WEIGHT):
            continue
        stems = (name.removesuffix(_WEIGHT), name)
        names.update(stem + _ACTIVATION_FACTOR for stem in stems if stem + _ACTIVATION_FACTOR in tensors)
        found = [tensors[stem + _FACTOR] for stem in stems if stem + _FACTOR in tensors]
        if not found:
            continue
        factor = found[0]
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        if len(found) > 1:
            raise CheckpointError(f"{file}: {name!r} has two factors, {factor.name!r} and {found[1].name!r}; use one.")
        if factor.shape not in ((1,), (experts,)) or factor.type.dtype is None:
            raise CheckpointError(
                f"{file}: {factor.name!r} is {factor.type.name} {list(factor.shape)}, expected one number"
                + (f", or one for each of {experts} experts" if experts > 1 else "")
                + f", as the factor of {name!r}. {REDOWNLOAD}"
            )
        factors[name] = factor
        names.add(factor.name)
    return factors, names
