"""The functions of llama.cpp's library that the comparison needs, through ctypes."""

from __future__ import annotations

import ctypes as c
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class _Params(c.Structure):
    """Parameters that llama.cpp fills and takes by value; larger than those of any version, so all versions fit."""

    _fields_ = [("raw", c.c_uint8 * 1024)]


class _Batch(c.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


class Llama:
    """A model in libllama, on one thread, with a key-value cache in float32.

    Attributes:
        messages: warnings and errors of llama.cpp.
    """

    def __init__(self, library: Path) -> None:
        for pattern in ("libggml-base*.so*", "libggml.*so*"):
            for file in sorted(library.parent.glob(pattern))[:1]:
                self._ggml = c.CDLL(str(file), mode=c.RTLD_GLOBAL)
        self._lib = lib = c.CDLL(str(library), mode=c.RTLD_GLOBAL)
        self._log = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(
            self._logged
        )  # an attribute, because C holds a pointer to it
        self.messages: list[str] = []
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
            self.messages.append((text or b"").decode(errors="replace").strip())

    def version(self) -> str | None:
        """Return the versions that the library names, or None."""
        versions = []
        for lib, name in ((self._lib, "llama_version"), (self._ggml, "ggml_version"), (self._ggml, "ggml_commit")):
            if hasattr(lib, name):
                getattr(lib, name).restype = c.c_char_p
                versions.append(f"{name} {getattr(lib, name)().decode()}")
        return ", ".join(versions) or None

    def load(self, file: Path) -> None:
        """Load a GGUF file in place of the current one."""
        self.close()
        params = self._lib.llama_model_default_params()
        if tuple(params.raw[72:78]) == (0, 0, 1, 0, 0, 0):  # six flags, the last of them `load_mtp` (2026)
            params.raw[77] = 1
        self.model = self._lib.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not open {file}: {self.messages[-3:]}")

    def close(self) -> None:
        """Free the model."""
        if self.model:
            self._lib.llama_model_free(self.model)
        self.model = None

    def quantize(self, source: Path, target: Path, ftype: int) -> None:
        """Write `target` with llama.cpp's own quantiser; `ftype` is a `llama_ftype`."""
        params = self._lib.llama_model_quantize_default_params()
        struct.pack_into("<ii", params.raw, 0, 1, ftype)
        if code := self._lib.llama_model_quantize(str(source).encode(), str(target).encode(), c.byref(params)):
            raise SystemExit(
                f"llama.cpp does not quantise {source} to {target.name}: code {code}, {self.messages[-3:]}"
            )

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, in which special tokens are parsed."""
        raw = text.encode()
        out = (c.c_int32 * (len(raw) + 8))()
        vocab = self._lib.llama_model_get_vocab(self.model)
        count = self._lib.llama_tokenize(vocab, raw, len(raw), out, len(out), False, True)
        return list(out[:count])

    def _context(self, size: int, mtp: bool = False) -> Any:
        params = self._lib.llama_context_default_params()
        words = struct.unpack_from("<64i", bytes(params.raw))
        # The types of keys and values, which are float16 by default.
        cache = [i for i in range(18, 40) if words[i : i + 2] == (1, 1)]
        if len(cache) != 1:
            raise SystemExit(
                f"this libllama ({self.version()}) has parameters of an unknown layout: its cache types are not found"
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
            raise SystemExit(f"llama.cpp makes no context: {self.messages[-3:]}")
        return context

    def logits(self, ids: Sequence[int], greedy: int = 0) -> tuple[np.ndarray, list[int]]:
        """Return logits `[len(ids), V]` of one batch, and `greedy` further tokens, decoded one at a time."""
        context = self._context(len(ids) + greedy)
        rows = self._decode(context, ids, 0)
        tokens = [int(rows[-1].argmax())] if greedy else []
        while len(tokens) < greedy:
            logits = self._decode(context, tokens[-1:], len(ids) + len(tokens) - 1)
            tokens.append(int(logits[-1].argmax()))
        self._lib.llama_free(context)
        return rows, tokens

    def mtp_logits(self, next_tokens: Sequence[int], hidden: np.ndarray) -> np.ndarray | None:
        """Return MTP logits of hidden states `[T, D]` and the tokens after them; None if libllama has no MTP."""
        if not (context := self._context(len(next_tokens), mtp=True)):
            return None
        rows = self._decode(context, next_tokens, 0, np.ascontiguousarray(hidden, np.float32))
        self._lib.llama_free(context)
        return rows

    def _decode(self, context: Any, ids: Sequence[int], start: int, hidden: np.ndarray | None = None) -> np.ndarray:
        width = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self.model))
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens, batch.embd = len(ids), None if hidden is None else hidden.ctypes.data
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        code = self._lib.llama_decode(context, batch)
        if code:
            raise SystemExit(f"llama_decode returned {code}: {self.messages[-3:]}")
        pointers = (self._lib.llama_get_logits_ith(context, i) for i in range(len(ids)))
        rows = [np.ctypeslib.as_array(pointer, (width,)).copy() for pointer in pointers]
        batch.embd = None  # owned by numpy, so C must not free it
        self._lib.llama_batch_free(batch)
        return np.stack(rows)
