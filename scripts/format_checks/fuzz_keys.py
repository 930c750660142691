"""Delete, duplicate, retype, rename and add keys and tensors of a checkpoint at random.

    python -m scripts.format_checks.fuzz_keys PATH [PATH ...] [--cases 10000]

A path is a small checkpoint: a folder of safetensors, quantised or not, or a GGUF file. Every outcome must be one of

* the same model as before, where the change cannot matter (`may_be_silent`) or a warning names what was changed;
* another model, where the changed key says so;
* an error (CheckpointError, ConfigError, ValueError) whose message names a changed key or tensor;

within 2 s and 1 GB. Anything else is printed by kind of change and key, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import copy
import hashlib
import random
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints.gguf.metadata_keys import is_harmless_metadata
from checkpoints.hf_quantized.formats import ACTIVATION_SUFFIXES
from checkpoints.hf_quantized.settings import is_harmless_setting
from mtpjax import generation_config
from mtpjax.hf_config.keys import HARMLESS_AROUND, HARMLESS_IN_ROPE, HARMLESS_IN_TEXT
from mtpjax.loading.loaded_model import flatten_params
from mtpjax.loading.open_model import eos_token_ids, open_model
from mtpjax.sampling_params import SamplingParams
from scripts.format_checks.key_documents import ARRAY, SCALARS, TEXT, Document, Pairs, Tensor, TypedPairs, read_document

SECONDS = 2.0
MEGABYTES = 1000.0
VALUES: tuple[Any, ...] = (None, True, False, -1, 0, 1, 7, 1 << 40, 0.5, 1e300, "", "x", [], ["x"], [3, -1], Pairs())
DTYPES = ("U8", "I8", "I32", "BF16", "F16", "F32", "F64", "F8_E4M3", "BOOL", "X9")
ITEM_BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "BOOL": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "F64": 8}

# Keys that a checkpoint may lack: transformers' config has the same default as the checkpoint that is changed.
OPTIONAL = frozenset(
    "attention_bias attn_output_gate full_attention_interval head_dim hidden_act linear_conv_kernel_dim "
    "max_position_embeddings mtp_num_hidden_layers norm_topk_prob output_gate_type partial_rotary_factor rms_norm_eps "
    "rope_parameters rope_theta rope_type tie_word_embeddings weight_block_size".split()
)
# What messages call the metadata of a GGUF file, which is read as the config.json of the same model.
HF_NAMES: dict[str, str] = {
    "layer_types": "linear_attn",
    "quantization_config": "quantised",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
    "feed_forward_length": "intermediate_size",
    "full_attention_interval": "_attn",
    "rope.dimension_count": "partial_rotary_factor",
    "rope.freq_base": "rope_theta",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.inner_size": "linear_value_head_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.time_step_rank": "linear_num_value_heads",
}


class Change(NamedTuple):
    """The kind of a change, its key or tensor, and the names of which a message must have one."""

    kind: str
    name: str
    names: tuple[str, ...]


@dataclass
class Result:
    """What became of one case.

    Attributes:
        outcome: "same", "other", "warning", "error", or "bad: ..." for what must not happen.
        text: the message of the error or of the warnings.
    """

    outcome: str
    text: str = ""


@dataclass
class Report:
    """Outcomes by number, and the changes that ended badly with one example each."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    bad: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def add(self, case: int, kind: str, name: str, result: Result, silent: bool) -> None:
        """Count the outcome of a case; `silent`: the change may have no effect without a word."""
        outcome = result.outcome
        if outcome == "same" and not silent:
            outcome = "bad: no effect, in silence"
        self.counts[outcome] += 1
        if outcome.startswith("bad"):
            self.bad.setdefault((outcome, kind, name), f"case {case}: {result.text[:300]}")

    def show(self, title: str, cases: int) -> None:
        """Print the counts and what ended badly."""
        print(f"{title}: {cases:,} cases: {dict(self.counts)}")
        for (outcome, kind, name), example in sorted(self.bad.items()):
            print(f"  {outcome}: {kind} {name}: {example}")


def change_objects(rng: random.Random, document: Document) -> Change:
    """Change one key of a JSON object or of GGUF metadata."""
    name = rng.choice(list(document.objects))
    pairs = rng.choice(list(_all_pairs(document.objects[name])))
    kind = rng.choice(("delete", "duplicate", "retype", "retype", "rename", "add"))
    if kind == "add" or not pairs:
        key = f"unheard_of_{rng.randrange(1000)}"
        pairs.append([key, _other_value(rng, pairs, (4, 1))])
        kind = "add null" if pairs[-1][1] is None else "add" if pairs[-1][1] else "add empty"
        return Change(kind, f"{name}: unheard_of", (key,))
    entry = rng.choice(pairs)
    key = entry[0]
    hf_name = HF_NAMES.get(key.partition(".")[2] or key, key)
    if kind == "delete":
        pairs.remove(entry)
    elif kind == "duplicate":
        pairs.append([key, _other_value(rng, pairs, entry[1])])
    elif kind == "rename":
        entry[0] = key[:-1] + chr(ord("a") + rng.randrange(26)) + "_"
        kind = "rename null" if entry[1] is None else kind
        return Change(kind, f"{name}: {key}", (key, hf_name, entry[0]))
    else:
        entry[1] = _other_value(rng, pairs, entry[1])
    elided = kind == "retype" and (entry[1] is None or entry[1] == Pairs())  # a null counts as absent
    return Change("delete" if elided else kind, f"{name}: {key}", (key, hf_name))


def change_tensors(rng: random.Random, document: Document) -> Change:
    """Change one entry of the table of tensors."""
    kind = rng.choice(("delete", "twice", "copy", "retype", "reshape", "rename"))
    tensor = rng.choice(document.tensors)
    name = tensor.name
    if kind == "delete":
        document.tensors.remove(tensor)
    elif kind == "twice":
        document.tensors.append(copy.copy(tensor))
    elif kind == "copy":
        document.tensors.append(Tensor(f"{name}.unheard_of", tensor.dtype, list(tensor.shape), tensor.data))
    elif kind == "rename":
        tensor.name = name.replace(".weight", ".wait") if ".weight" in name else name + "x"
    elif kind == "reshape":
        shape = tensor.shape
        others = ([*shape, 1], [1, *shape], shape[::-1], [int(np.prod(shape))], [0])
        tensor.shape = rng.choice([other for other in others if other != shape])
        tensor.data = tensor.data if 0 not in tensor.shape else b""
    elif document.is_gguf:
        tensor.dtype = rng.choice([n for n in (*range(45), 1 << 20) if n != tensor.dtype])
    else:
        tensor.dtype = rng.choice([d for d in DTYPES if d != tensor.dtype])
        if rng.random() < 0.5:  # a table that fits its bytes
            tensor.data = bytes(int(np.prod(tensor.shape)) * ITEM_BYTES.get(tensor.dtype, 1))
    canonical = re.sub(r"^(model\.)?(language_model\.)?", "", name)
    if kind == "reshape" and (np.prod(tensor.shape) == 1 or "ffn_gate_inp_shexp" in name):
        kind = "reshape of one number"
    return Change(f"tensor {kind}", name, (name, canonical, canonical.rpartition(".")[0], tensor.name))


def _all_pairs(value: Any) -> Iterator[list[Any]]:
    """Yield a table and all those within it."""
    if isinstance(value, Pairs | TypedPairs):
        yield value
    if isinstance(value, Pairs):
        for _, item in value:
            yield from _all_pairs(item)
    elif isinstance(value, list) and not isinstance(value, TypedPairs):
        for item in value:
            yield from _all_pairs(item)


def _other_value(rng: random.Random, pairs: list[Any], value: Any) -> Any:
    """Return another value, in GGUF metadata with a type."""
    if isinstance(pairs, TypedPairs):
        kind = rng.choice((*SCALARS, TEXT, ARRAY))
        if kind == TEXT:
            return TEXT, rng.choice(("", "x", "yarn"))
        if kind == ARRAY:
            return ARRAY, (4, [rng.randrange(100) for _ in range(rng.randrange(4))])
        numbers = [n for n in ((0, 1) if kind == 7 else (0, 1, 3, 100)) if n != value[1]]
        return kind, rng.choice(numbers)
    others: list[Any] = [v for v in VALUES if repr(v) != repr(value) and v != value]  # 1 is true
    if isinstance(value, int | float) and not isinstance(value, bool):
        others += [str(value), value + 1, -value, value * 2, value + 0.5]
    return rng.choice(others)


def fingerprint(path: Path) -> Any:
    """Load a checkpoint whole. Returns what the rest of the product sees of it, without its paths."""
    opened = open_model(path, dtype="float32", quantization=None, mtp=True, tokenizer=None)
    digest = hashlib.sha256()
    for leaf_path, leaf in flatten_params(opened.model.params).items():
        digest.update(repr(leaf_path).encode() + np.asarray(leaf[...]).tobytes())
    advice, tokenizer = SamplingParams.from_generation_config(opened.generation_config), opened.tokenizer
    eos = eos_token_ids(opened.model.cfg, opened.generation_config, opened.vocab_size, tokenizer)
    template = tokenizer and tokenizer.chat_template
    return opened.model.cfg, digest.digest(), repr(advice), eos, tokenizer and tokenizer.size, template


def run_case(document: Document, names: tuple[str, ...], base: Any) -> Result:
    """Load a changed checkpoint and judge the outcome."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = document.write(Path(folder))
        start = time.process_time()
        try:
            found = fingerprint(path)
        except ValueError as error:  # CheckpointError and ConfigError are kinds of it
            text = str(error).replace(folder, "")
            named = any(name in text for name in names)
            result = Result("error" if named else "bad: error without the name", text)
        except Exception as error:
            result = Result(f"bad: {type(error).__name__}", str(error).replace(folder, ""))
        else:
            text = " ".join(str(w.message) for w in caught).replace(folder, "")
            if any(name in text for name in names):
                result = Result("warning", text)
            else:
                result = Result("same" if found == base else "other", text)
        if (seconds := time.process_time() - start) > SECONDS:
            result = Result("bad: slow", f"{seconds:.1f} s")
        return result


def may_be_silent(kind: str, name: str) -> bool:
    """Return whether a change may leave the model as it is without a word."""
    file, _, key = name.partition(": ")
    if kind in ("add null", "rename null", "tensor reshape of one number"):
        return True
    if file == "generation_config.json":
        says_the_same = kind in ("retype", "duplicate") and key in generation_config.USED  # a number as a text
        return kind == "delete" or key in generation_config.HARMLESS or says_the_same
    if file.endswith(".gguf"):
        return kind in ("delete", "retype") and (is_harmless_metadata(key) or key.endswith("attention.value_length"))
    if kind == "tensor delete" and name.endswith("g_idx"):  # the columns are in order, as they are without it
        return True
    if kind.startswith("tensor") and name.endswith(ACTIVATION_SUFFIXES):
        return True
    if kind == "rename" and key in ("a", "b", "c"):  # groups of compressed-tensors may have any name
        return True
    if kind in ("delete", "retype", "duplicate") and is_harmless_setting(key):
        return True
    return key in (*HARMLESS_IN_TEXT, *HARMLESS_AROUND, *HARMLESS_IN_ROPE) or (kind == "delete" and key in OPTIONAL)


def fuzz(path: Path, cases: int, seed: int = 0) -> Report:
    """Run the cases of one checkpoint."""
    document, report = read_document(path), Report()
    with tempfile.TemporaryDirectory() as folder:
        base = fingerprint(document.write(Path(folder)))
    for case in range(seed, seed + cases):
        rng = random.Random(case)
        changed = copy.deepcopy(document)
        kind, name, names = (change_objects if rng.random() < 0.6 else change_tensors)(rng, changed)
        result = run_case(changed, names, base)
        if result.outcome == "other" and kind in ("add", "rename", "tensor copy", "tensor rename"):
            result.outcome = "bad: another model"
        report.add(case, kind, name, result, may_be_silent(kind, name))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("path", type=Path, nargs="+", help="small, valid checkpoints")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first case")
    args = parser.parse_args()
    failed = False
    for path in args.path:
        report = fuzz(path, args.cases, args.seed)
        report.show(str(path), args.cases)
        failed |= bool(report.bad)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak {peak:,.0f} MiB of memory")
    sys.exit(1 if failed or peak > MEGABYTES else 0)


if __name__ == "__main__":
    main()
