"""Compare this program with llama.cpp itself on the same GGUF files: tensors, logits, greedy text, tokenizer.

    pip install llama-cpp-python                            # or: npm pack @node-llama-cpp/linux-x64, unpacked
    python -m scripts.format_checks.check_llama_cpp [--libllama bins/linux-x64/libllama.so] [--out FILE]

The embedded model is written as GGUF by `mtpjax convert` and quantised by llama.cpp's own quantiser. Both programs run
every file. llama.cpp rounds activations to eight bits before a product with quantised weights; this program does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints import TINY, open_checkpoint
from checkpoints.gguf.names import Convention, convert_tensor
from checkpoints.gguf.writer import WRITABLE_TYPES
from mtpjax import LLM, SamplingParams
from mtpjax.cli.convert import main as convert
from mtpjax.loading.load import load_checkpoint
from mtpjax.model import make_positions
from mtpjax.model.cache import new_cache, padded_kv_length
from scripts.benchmarks.results import describe, write_json
from scripts.format_checks.llama_cpp import Llama

FTYPES = {  # `llama_ftype` in llama.h
    "Q8_0": 7,
    "Q4_0": 2,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "Q2_K": 10,
    "Q3_K_M": 12,
    "IQ3_M": 27,
    "MXFP4_MOE": 38,
}
PASSAGE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once "
    "or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "
    "“and what is the use of a book,” thought Alice “without pictures or conversations?” So she was considering in "
    "her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the "
    "pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when "
    "suddenly a White Rabbit with pink eyes ran close by her."
)
STARTS = ("Once upon a time", "The king said to", "“Oh dear!” cried the", "In the middle of the forest there was")
SENTENCES = (
    PASSAGE,
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\n\n\ttab \r\n end ",
    "def f(x):\n    return x**2 + 10_000  # ok\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "don't I'LL we've 'S",
    "12345 3.14 1,000,000",
    "naïve café Straße",
    "Ünïcode ½ № ①",
    "日本語のテキスト。한국어 中文",
    "हिन्दी में पाठ",
    "العَرَبِيَّة",
    "👩‍👩‍👧 🙂!?",
    "for (int i=0;i<n;++i) { a[i]=b[i]; }",
    "<|endoftext|>x<|im_end|>",
    "a<|im_start|><|im_start|>",
    '{"k": [1, null]}\n',
)


@partial(jax.jit, static_argnames="graph")
def mtp_logits(params: Any, next_tokens: jax.Array, hidden: jax.Array, *, graph: Any) -> jax.Array:
    """Return this program's MTP logits of hidden states `[T, D]` and the tokens that follow them."""
    model = nnx.merge(graph, params)
    zero, kv_len = jnp.zeros(1, jnp.int32), padded_kv_length(len(next_tokens), 1)
    positions = make_positions(model.cfg, zero, len(next_tokens), zero, kv_len=kv_len)
    rows, _ = model.mtp_step(hidden[None], next_tokens[None], new_cache(model.cfg, 1, kv_len), positions)
    return model.head(rows)[0]


def relative_error(logits: np.ndarray, wanted: np.ndarray) -> float:
    """Return the norm of the difference relative to the norm of `wanted`."""
    return float(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted))


def unequal_tensors(file: Path) -> tuple[dict[str, int], list[str]]:
    """Return the number of tensors by type, and the tensors with any bit unlike that of the reference dequantiser."""
    import gguf

    source: Any = open_checkpoint(file)
    raw = {t.name: t for t in gguf.GGUFReader(file).tensors}
    reference = {name: gguf.quants.dequantize(t.data, t.tensor_type) for name, t in raw.items()}
    unequal = []
    for name, (parts, convention) in source.stored.items():
        values = [reference[p.name] for p in parts]
        if convention is Convention.GATE_UP:
            wanted = np.concatenate(values, axis=1)
        else:
            wanted = convert_tensor(values[0].reshape(parts[0].shape), convention, source.heads, to_gguf=False)
        value = source.read(name)
        if not np.array_equal(value.astype(np.float32), wanted.astype(np.float32)):
            unequal.append(name)
        if (packed := source.read_packed(name)) is not None and not np.array_equal(packed.dequantize(), value):
            unequal.append(f"{name} (packed)")
    missing = set(reference) - {p.name for parts, _ in source.stored.values() for p in parts}
    return dict(Counter(t.tensor_type.name for t in raw.values())), unequal + sorted(missing)


def compare(llama: Llama, file: Path, max_tokens: int) -> dict[str, Any]:
    """Run both programs on one file and compare them."""
    llama.load(file)
    llm = LLM(file, dtype="float32", max_model_len=512)
    loaded = load_checkpoint(open_checkpoint(file), dtype=jnp.dtype(jnp.float32))
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(PASSAGE)
    logits, (wanted, _) = llm.logits(ids), llama.logits(ids)
    hidden = np.asarray(llm.hidden_states(ids), np.float32)[:-1]
    mtp_wanted = llama.mtp_logits(ids[1:], hidden)
    mtp = np.asarray(mtp_logits(loaded.params, jnp.array(ids[1:]), jnp.array(hidden), graph=loaded.graph))
    float64_logits = (x.astype(np.float64) for x in (wanted, logits))
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in float64_logits)
    top = np.sort(wanted, axis=-1)
    differ = logits.argmax(-1) != wanted.argmax(-1)
    num_equal_tokens = []
    for start in STARTS:
        prompt = tokenizer.encode(start)
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        _, tokens = llama.logits(prompt, max_tokens)
        pairs = enumerate(zip(output.token_ids, tokens, strict=True))
        num_equal_tokens.append(next((i for i, (a, b) in pairs if a != b), max_tokens))
    types, unequal = unequal_tensors(file)
    return {
        "types": types,
        "unequal_tensors": unequal,
        "positions": len(ids),
        "relative_error": relative_error(logits, wanted),
        "largest_difference": float(np.abs(logits - wanted).max()),
        "largest_logit": float(np.abs(wanted).max()),
        "kl_divergence": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        "argmax_agreement": float(1 - differ.mean()),
        "largest_margin_where_argmax_differs": float((top[:, -1] - top[:, -2])[differ].max(initial=0)),
        "mtp_relative_error": None if mtp_wanted is None else relative_error(mtp, mtp_wanted),
        "mtp_argmax_agreement": None if mtp_wanted is None else float((mtp.argmax(-1) == mtp_wanted.argmax(-1)).mean()),
        "equal_greedy_tokens": num_equal_tokens,
        "tokenizer_differs_on": [s for s in SENTENCES if llama.tokenize(s) != tokenizer.encode(s)],
    }


def find_library(path: Path | None) -> Path:
    """Return the path, if there is one, or the library of an installed llama-cpp-python."""
    if path is not None:
        if not path.is_file():
            raise SystemExit(f"check_llama_cpp: {path} is no file")
        return path
    spec = importlib.util.find_spec("llama_cpp")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for file in sorted(Path(folder, "lib").glob("libllama.*")):
            return file
    raise SystemExit("check_llama_cpp: no libllama: pip install llama-cpp-python, or give --libllama its path")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--libllama", type=Path, help="default: that of an installed llama-cpp-python")
    parser.add_argument(
        "--written", nargs="*", choices=WRITABLE_TYPES, default=list(WRITABLE_TYPES), help="by convert.py; f32 always"
    )
    parser.add_argument("--types", nargs="*", choices=FTYPES, default=list(FTYPES), help="of llama.cpp's quantiser")
    parser.add_argument("--max-tokens", type=int, default=64, help="greedy tokens of each of the four starts")
    parser.add_argument("--out", default="docs/benchmarks/llama_cpp.json")
    args = parser.parse_args()
    llama = Llama(find_library(args.libllama))
    print(f"{llama.version()}")
    print(
        f"{'written by':12}{'type':8}{'tensors':>9}{'rel. error':>12}{'MTP':>9}{'KL':>9}{'arg-max':>9}  greedy tokens"
    )
    rows = []
    kinds = [("convert.py", k) for k in dict.fromkeys(["f32", *args.written])] + [("llama.cpp", k) for k in args.types]
    with tempfile.TemporaryDirectory() as folder:
        for writer, kind in kinds:
            file = Path(folder, f"{writer}-{kind}.gguf")
            if writer == "convert.py":
                if convert([str(TINY), str(file), "--type", kind]):
                    raise SystemExit(1)
            else:
                llama.quantize(Path(folder, "convert.py-f32.gguf"), file, FTYPES[kind])
            row = {"written_by": writer, "type": kind} | compare(llama, file, args.max_tokens)
            rows.append(row)
            count = sum(row["types"].values())
            equal = f"{count - len(row['unequal_tensors'])}/{count}"
            mtp = "-" if row["mtp_relative_error"] is None else f"{row['mtp_relative_error']:.1e}"
            print(
                f"{writer:12}{kind:8}{equal:>9}"
                f"{row['relative_error']:12.1e}{mtp:>9}{row['kl_divergence']:9.1e}{row['argmax_agreement']:9.1%}  "
                f"{row['equal_greedy_tokens']} of {args.max_tokens}; {row['types']}",
                flush=True,
            )
            for text in row["tokenizer_differs_on"]:
                print(f"  tokens differ: {text!r}")
    llama.close()
    warnings = list(dict.fromkeys(llama.messages))
    write_json(args.out, {"run": describe(), "llama_cpp": llama.version(), "warnings": warnings, "rows": rows})
    if any(row["unequal_tensors"] or row["tokenizer_differs_on"] for row in rows):
        raise SystemExit("check_llama_cpp: tensors or tokens differ")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
