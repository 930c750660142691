"""Compare this program with llama.cpp itself on the same GGUF files: tensors, logits, greedy text, tokenizer.

    pip install llama-cpp-python                            # or: npm pack @node-llama-cpp/linux-x64, unpacked
    python -m scripts.format_checks.check_llama_cpp [--libllama bins/linux-x64/libllama.v0.5.0.so] [--out docs/benchmarks/llama_cpp.json]

The embedded model is written as GGUF by `scripts/convert.py` and quantised by llama.cpp's own quantiser. Both programs run
every file; llama.cpp rounds activations to eight bits before a product with quantised weights, this program does not.
"""

from __future__ import annotations

import argparse
import ctypes as c
import importlib.util
import struct
import tempfile
from collections import Counter
from collections.abc import Sequence
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

FTYPES = {  # llama.h
    "Q8_0": 7, "Q4_0": 2, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
    "Q2_K": 10, "Q3_K_M": 12, "IQ3_M": 27, "MXFP4_MOE": 38,
}  # fmt: skip
PASSAGE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice "
    "she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and what is the "
    "use of a book,” thought Alice “without pictures or conversations?” So she was considering in her own mind (as well as "
    "she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making a daisy-chain would be "
    "worth the trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close by her."
)
STARTS = ("Once upon a time", "The king said to", "“Oh dear!” cried the", "In the middle of the forest there was")
SENTENCES = (
    PASSAGE, "", " ", "Hello, world!", "  two  spaces\n\n\n\ttab \r\n end ", "def f(x):\n    return x**2 + 10_000  # ok\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n", "don't I'LL we've 'S", "12345 3.14 1,000,000",
    "naïve café Straße", "Ünïcode ½ № ①", "日本語のテキスト。한국어 中文", "हिन्दी में पाठ", "العَرَبِيَّة", "👩‍👩‍👧 🙂!?",
    "for (int i=0;i<n;++i) { a[i]=b[i]; }", "<|endoftext|>x<|im_end|>", "a<|im_start|><|im_start|>", "{\"k\": [1, null]}\n",
)  # fmt: skip


class _Params(c.Structure):
    """Parameters that only llama.cpp fills, passed on by value: larger than any version's, so the version does not matter."""

    _fields_ = [("raw", c.c_uint8 * 1024)]


class _Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32), ("token", c.POINTER(c.c_int32)), ("embd", c.c_void_p), ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)), ("seq_id", c.POINTER(c.POINTER(c.c_int32))), ("logits", c.POINTER(c.c_int8)),
    ]  # fmt: skip


class Llama:
    """The few functions of libllama that this needs, on one thread, with a key-value cache in float32."""

    def __init__(self, library: Path) -> None:
        for pattern in ("libggml-base*.so*", "libggml.*so*"):
            for file in sorted(library.parent.glob(pattern))[:1]:
                self._ggml = c.CDLL(str(file), mode=c.RTLD_GLOBAL)
        self._lib = lib = c.CDLL(str(library), mode=c.RTLD_GLOBAL)
        self._log = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(self._logged)  # kept: C holds a pointer to it
        self.said: list[str] = []
        lib.llama_log_set(self._log, None)
        for name in ("model", "context", "model_quantize"):
            getattr(lib, f"llama_{name}_default_params").restype = _Params
        lib.llama_model_load_from_file.argtypes, lib.llama_model_load_from_file.restype = (
            [c.c_char_p, _Params],
            c.c_void_p,
        )
        lib.llama_init_from_model.argtypes, lib.llama_init_from_model.restype = [c.c_void_p, _Params], c.c_void_p
        lib.llama_model_get_vocab.argtypes, lib.llama_model_get_vocab.restype = [c.c_void_p], c.c_void_p
        lib.llama_vocab_n_tokens.argtypes = [c.c_void_p]
        lib.llama_tokenize.argtypes = [
            c.c_void_p,
            c.c_char_p,
            c.c_int32,
            c.POINTER(c.c_int32),
            c.c_int32,
            c.c_bool,
            c.c_bool,
        ]
        lib.llama_batch_init.argtypes, lib.llama_batch_init.restype = [c.c_int32] * 3, _Batch
        lib.llama_decode.argtypes = [c.c_void_p, _Batch]
        lib.llama_batch_free.argtypes = [_Batch]
        lib.llama_get_logits_ith.argtypes, lib.llama_get_logits_ith.restype = (
            [c.c_void_p, c.c_int32],
            c.POINTER(c.c_float),
        )
        lib.llama_free.argtypes = lib.llama_model_free.argtypes = [c.c_void_p]
        lib.llama_set_n_threads.argtypes = [c.c_void_p, c.c_int32, c.c_int32]
        lib.llama_model_quantize.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(_Params)]
        lib.llama_model_quantize.restype = c.c_uint32
        if hasattr(self._ggml, "ggml_backend_load_all_from_path"):
            self._ggml.ggml_backend_load_all_from_path(str(library.parent).encode())
        lib.llama_backend_init()
        self.model: Any = None

    def _logged(self, level: int, text: bytes, _: Any) -> None:
        if level >= 3:  # warnings and errors
            self.said.append((text or b"").decode(errors="replace").strip())

    def version(self) -> str | None:
        found = []
        for lib, name in ((self._lib, "llama_version"), (self._ggml, "ggml_version"), (self._ggml, "ggml_commit")):
            if hasattr(lib, name):
                getattr(lib, name).restype = c.c_char_p
                found.append(f"{name} {getattr(lib, name)().decode()}")
        return ", ".join(found) or None

    def load(self, file: Path) -> None:
        self.close()
        params = self._lib.llama_model_default_params()
        if tuple(params.raw[72:78]) == (0, 0, 1, 0, 0, 0):  # six flags, the last of them `load_mtp` (2026)
            params.raw[77] = 1
        self.model = self._lib.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not open {file}: {self.said[-3:]}")

    def close(self) -> None:
        if self.model:
            self._lib.llama_model_free(self.model)
        self.model = None

    def quantize(self, source: Path, target: Path, ftype: int) -> None:
        params = self._lib.llama_model_quantize_default_params()
        struct.pack_into("<ii", params.raw, 0, 1, ftype)
        if code := self._lib.llama_model_quantize(str(source).encode(), str(target).encode(), c.byref(params)):
            raise SystemExit(f"llama.cpp does not quantise {source} to {target.name}: code {code}, {self.said[-3:]}")

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        out = (c.c_int32 * (len(raw) + 8))()
        vocab = self._lib.llama_model_get_vocab(self.model)
        count = self._lib.llama_tokenize(vocab, raw, len(raw), out, len(out), False, True)
        return list(out[:count])

    def _context(self, size: int, mtp: bool = False) -> Any:
        params = self._lib.llama_context_default_params()
        words = struct.unpack_from("<64i", bytes(params.raw))
        cache = [
            i for i in range(18, 40) if words[i : i + 2] == (1, 1)
        ]  # the types of keys and values: float16 by default
        if len(cache) != 1:
            raise SystemExit(
                f"this libllama ({self.version()}) has parameters of an unknown layout: no types of its cache"
            )
        struct.pack_into("<IIII", params.raw, 0, size, size, size, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max
        struct.pack_into("<ii", params.raw, 4 * cache[0], 0, 0)
        if mtp:
            if words[9:14] != (0, -1, -1, -1, -1):  # the type of context, and four settings left to the model
                return None
            struct.pack_into("<i", params.raw, 36, 1)
        context = self._lib.llama_init_from_model(self.model, params)
        if context:
            self._lib.llama_set_n_threads(context, 1, 1)
        elif not mtp:
            raise SystemExit(f"llama.cpp makes no context: {self.said[-3:]}")
        return context

    def logits(self, ids: Sequence[int], greedy: int = 0) -> tuple[np.ndarray, list[int]]:
        """Logits `[len(ids), V]` of one batch, and `greedy` further tokens, one at a time."""
        context = self._context(len(ids) + greedy)
        rows = self._decode(context, ids, 0)
        more = [int(rows[-1].argmax())] if greedy else []
        while len(more) < greedy:
            more.append(int(self._decode(context, more[-1:], len(ids) + len(more) - 1)[-1].argmax()))
        self._lib.llama_free(context)
        return rows, more

    def mtp_logits(self, following: Sequence[int], hidden: np.ndarray) -> np.ndarray | None:
        """The MTP head's logits of hidden states `[T, D]` and the tokens that follow them; None if this libllama has no MTP."""
        if not (context := self._context(len(following), mtp=True)):
            return None
        rows = self._decode(context, following, 0, np.ascontiguousarray(hidden, np.float32))
        self._lib.llama_free(context)
        return rows

    def _decode(self, context: Any, ids: Sequence[int], start: int, hidden: np.ndarray | None = None) -> np.ndarray:
        width = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self.model))
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens, batch.embd = len(ids), None if hidden is None else hidden.ctypes.data
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                token,
                start + i,
                1,
                0,
                1,
            )
        code = self._lib.llama_decode(context, batch)
        if code:
            raise SystemExit(f"llama_decode returned {code}: {self.said[-3:]}")
        pointers = (self._lib.llama_get_logits_ith(context, i) for i in range(len(ids)))
        rows = [np.ctypeslib.as_array(pointer, (width,)).copy() for pointer in pointers]
        batch.embd = None  # not C's to free
        self._lib.llama_batch_free(batch)
        return np.stack(rows)


@partial(jax.jit, static_argnames="graph")
def mtp_logits(params: Any, following: jax.Array, hidden: jax.Array, *, graph: Any) -> jax.Array:
    """Ours, of hidden states `[T, D]` and the tokens that follow them."""
    model = nnx.merge(graph, params)
    zero, slots = jnp.zeros(1, jnp.int32), padded_kv_length(len(following), 1)
    where = make_positions(model.cfg, zero, len(following), zero, kv_len=slots)
    rows, _ = model.mtp_step(hidden[None], following[None], new_cache(model.cfg, 1, slots), where)
    return model.head(rows)[0]


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def unequal_tensors(file: Path) -> tuple[dict[str, int], list[str]]:
    """Types in the file, and the tensors whose values differ in any bit from those of the reference dequantiser."""
    import gguf

    source: Any = open_checkpoint(file)
    raw = {t.name: t for t in gguf.GGUFReader(file).tensors}
    wanted = {name: gguf.quants.dequantize(t.data, t.tensor_type) for name, t in raw.items()}
    bad = []
    for name, (parts, convention) in source.stored.items():
        values = [wanted[p.name] for p in parts]
        if convention is Convention.GATE_UP:
            want = np.concatenate(values, axis=1)
        else:
            want = convert_tensor(values[0].reshape(parts[0].shape), convention, source.heads, to_gguf=False)
        got = source.read(name)
        if not np.array_equal(got.astype(np.float32), want.astype(np.float32)):
            bad.append(name)
        if (packed := source.read_packed(name)) is not None and not np.array_equal(packed.dequantize(), got):
            bad.append(f"{name} (packed)")
    missing = set(wanted) - {p.name for parts, _ in source.stored.values() for p in parts}
    return dict(Counter(t.tensor_type.name for t in raw.values())), bad + sorted(missing)


def compare(llama: Llama, file: Path, new_tokens: int) -> dict[str, Any]:
    """Both programs on one file."""
    llama.load(file)
    llm, loaded = (
        LLM(file, dtype="float32", max_model_len=512),
        load_checkpoint(open_checkpoint(file), dtype=jnp.dtype(jnp.float32)),
    )
    ids = llm.tokenizer.encode(PASSAGE)  # type: ignore[union-attr]
    ours, (theirs, _) = llm.logits(ids), llama.logits(ids)
    hidden = np.asarray(llm.hidden_states(ids), np.float32)[:-1]
    mtp_theirs = llama.mtp_logits(ids[1:], hidden)
    mtp = np.asarray(mtp_logits(loaded.params, jnp.array(ids[1:]), jnp.array(hidden), graph=loaded.graph))
    wide = (x.astype(np.float64) for x in (theirs, ours))
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in wide)
    top = np.sort(theirs, axis=-1)
    differ = ours.argmax(-1) != theirs.argmax(-1)
    same = []
    for start in STARTS:
        prompt = llm.tokenizer.encode(start)  # type: ignore[union-attr]
        (mine,) = llm.generate([prompt], SamplingParams(max_tokens=new_tokens, ignore_eos=True))
        _, more = llama.logits(prompt, new_tokens)
        same.append(next((i for i, (a, b) in enumerate(zip(mine.token_ids, more, strict=True)) if a != b), new_tokens))
    types, unequal = unequal_tensors(file)
    return {
        "types": types,
        "unequal_tensors": unequal,
        "positions": len(ids),
        "relative_error": relative(ours, theirs),
        "largest_difference": float(np.abs(ours - theirs).max()),
        "largest_logit": float(np.abs(theirs).max()),
        "kl_divergence": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        "argmax_agreement": float(1 - differ.mean()),
        "largest_margin_where_argmax_differs": float((top[:, -1] - top[:, -2])[differ].max(initial=0)),
        "mtp_relative_error": None if mtp_theirs is None else relative(mtp, mtp_theirs),
        "mtp_argmax_agreement": None if mtp_theirs is None else float((mtp.argmax(-1) == mtp_theirs.argmax(-1)).mean()),
        "equal_greedy_tokens": same,
        "tokenizer_differs_on": [s for s in SENTENCES if llama.tokenize(s) != llm.tokenizer.encode(s)],  # type: ignore[union-attr]
    }


def find_library(given: Path | None) -> Path:
    if given is not None:
        if not given.is_file():
            raise SystemExit(f"check_llama_cpp.py: {given} is no file")
        return given
    spec = importlib.util.find_spec("llama_cpp")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for file in sorted(Path(folder, "lib").glob("libllama.*")):
            return file
    raise SystemExit("check_llama_cpp.py: no libllama: pip install llama-cpp-python, or give --libllama its path")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--libllama", type=Path, help="default: that of an installed llama-cpp-python")
    parser.add_argument(
        "--written", nargs="*", choices=WRITABLE_TYPES, default=list(WRITABLE_TYPES), help="by convert.py; f32 always"
    )
    parser.add_argument("--types", nargs="*", choices=FTYPES, default=list(FTYPES), help="of llama.cpp's quantiser")
    parser.add_argument("--new-tokens", type=int, default=64, help="greedy tokens of each of the four starts")
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
            row = {"written_by": writer, "type": kind} | compare(llama, file, args.new_tokens)
            rows.append(row)
            count = sum(row["types"].values())
            equal = f"{count - len(row['unequal_tensors'])}/{count}"
            mtp = "-" if row["mtp_relative_error"] is None else f"{row['mtp_relative_error']:.1e}"
            print(
                f"{writer:12}{kind:8}{equal:>9}"
                f"{row['relative_error']:12.1e}{mtp:>9}{row['kl_divergence']:9.1e}{row['argmax_agreement']:9.1%}  "
                f"{row['equal_greedy_tokens']} of {args.new_tokens}; {row['types']}",
                flush=True,
            )
            for text in row["tokenizer_differs_on"]:
                print(f"  tokens differ: {text!r}")
    llama.close()
    told = list(dict.fromkeys(llama.said))
    write_json(args.out, {"run": describe(), "llama_cpp": llama.version(), "warnings": told, "rows": rows})
    if any(row["unequal_tensors"] or row["tokenizer_differs_on"] for row in rows):
        raise SystemExit("check_llama_cpp.py: tensors or tokens differ")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
