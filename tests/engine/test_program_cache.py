"""Programs that are kept for the next process: what is compiled then, and which files are never taken."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mtpjax import LLM, SamplingParams
from mtpjax.engine import program_cache, program_key
from mtpjax.engine.program_cache import NAME, PROGRAM, ProgramCache, open_program_cache
from mtpjax.engine.programs import Programs, compile_ahead
from tests.helpers.models import numpy_model, tiny_config

ROOT = Path(__file__).parent.parent.parent
CHILD = """
import json, sys
from collections import Counter
import jax

seen = Counter()
jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **_: seen.update([name]))

from tests.helpers.models import numpy_model, tiny_config
from mtpjax import LLM, SamplingParams

model = numpy_model(tiny_config(moe=True, num_superblocks=1))
jax.clear_caches()
seen.clear()
llm = LLM(model, num_speculative_tokens=2, max_model_len=64, max_num_seqs=2, max_prefill_seqs=1, prefill_buckets=(16,))
job = [[5, 6, 7], [8] * 20, [9] * 9]
params = [SamplingParams(max_tokens=9), SamplingParams(max_tokens=4, temperature=0.8, seed=3), SamplingParams()]
tokens = [o.token_ids for o in llm.generate(job, params)]
tokens += [o.token_ids for o in llm.generate(job, SamplingParams(max_tokens=5, presence_penalty=0.5))]
tokens.append(llm.hidden_states([5, 6, 7]).sum(axis=0).tolist())
kept = llm.engine.runner.programs.kept
if kept is not None:
    kept.wait()
core = "/jax/core/compile/"
print(json.dumps({
    "traced": seen[core + "jaxpr_trace_duration"],
    "lowered": seen[core + "jaxpr_to_mlir_module_duration"],
    "compiled": seen[core + "backend_compile_duration"],
    "programs": llm.engine.num_programs,
    "loaded": kept and kept.num_loaded,
    "saved": kept and kept.num_saved,
    "tokens": tokens,
}))
"""


def start(folder: Path | str, jax_cache: Path | None = None) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"PYTHONPATH": str(ROOT), "MTPJAX_PROGRAM_CACHE": str(folder)}
    if jax_cache is not None:
        env |= {
            "JAX_COMPILATION_CACHE_DIR": str(jax_cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", CHILD], env=env, stdout=pipe, stderr=pipe, text=True)


def result(child: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = child.communicate(timeout=900)
    assert child.returncode == 0, errors
    return json.loads(out) | {"errors": errors}


@pytest.mark.slow
def test_the_second_process_traces_and_compiles_nothing(tmp_path: Path) -> None:
    """Two processes fill the folder at the same time, a third takes everything from it."""
    first, twin = map(result, [start(tmp_path / "kept"), start(tmp_path / "kept")])
    for one in (first, twin):  # each may find what the other has kept meanwhile
        assert one["compiled"] + one["loaded"] == one["programs"] >= 8
    assert first["compiled"] + twin["compiled"] >= first["programs"]
    second = result(start(tmp_path / "kept"))
    assert (second["traced"], second["lowered"], second["compiled"]) == (0, 0, 0)
    assert second["loaded"] == second["programs"] == first["programs"] and second["saved"] == 0
    without = result(start(""))
    assert without["loaded"] is None
    assert first["tokens"] == twin["tokens"] == second["tokens"] == without["tokens"]
    assert first["errors"] == twin["errors"] == second["errors"] == ""

    # A source file that changes no program: traced again, found by what was traced, and by name from then on.
    for file in (tmp_path / "kept").glob("*" + NAME):
        file.unlink()
    edited, after = result(start(tmp_path / "kept")), result(start(tmp_path / "kept"))
    assert edited["traced"] and edited["compiled"] == edited["saved"] == 0 and edited["loaded"] == first["programs"]
    assert after["traced"] == 0 and edited["tokens"] == after["tokens"] == first["tokens"]


@pytest.mark.slow
def test_programs_out_of_the_cache_of_jax_are_not_kept(tmp_path: Path) -> None:
    """Serialised a second time, they load and then miss functions when they run (XLA's CPU runtime)."""
    filled = result(start("", tmp_path / "jax"))
    from_jax = result(start(tmp_path / "kept", tmp_path / "jax"))
    assert from_jax["saved"] == 0 and not list(tmp_path.glob("kept/*" + PROGRAM))
    again = result(start(tmp_path / "kept", tmp_path / "jax"))
    assert filled["tokens"] == from_jax["tokens"] == again["tokens"]


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """Without JAX's own cache, out of which no program is kept."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    program_key._qualified_name.cache_clear()  # `run_scale` counts this file among our own
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def scale(x: jax.Array, factor: int) -> jax.Array:
    return x * factor


def make_scale(fn: Any, **static: Any) -> Any:
    return jax.jit(partial(fn, **static), donate_argnums=0)


def run_scale(cache: ProgramCache | None, monkeypatch: pytest.MonkeyPatch, factor: int = 3) -> Programs:
    """Run a small program of this file, which counts as one of ours, and check its result."""
    monkeypatch.setattr(program_key, "OWN_PACKAGES", ("mtpjax", "kernels_pallas", "checkpoints", "tests"))
    programs, x = Programs(compile_ahead, cache), jax.device_put(np.arange(4, dtype=np.float32))
    program = programs.get(("scale",), partial(make_scale, scale, factor=factor), (x,))
    assert program(x).tolist() == [0, factor, 2 * factor, 3 * factor] and x.is_deleted()
    if cache is not None:
        cache.wait()
    return programs


def test_a_loaded_program_takes_the_memory_of_its_arguments(
    tmp_path: Path, compiled_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ProgramCache(tmp_path / "a" / "b"), ProgramCache(tmp_path / "a" / "b")
    run_scale(first, monkeypatch)
    run_scale(second, monkeypatch)
    assert (first.num_saved, first.num_loaded, second.num_saved, second.num_loaded) == (1, 0, 0, 1)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    header = next((tmp_path / "a" / "b").glob("*" + PROGRAM)).read_bytes().split(b"\n")[1]
    assert b'"program": "scale"' in header and jax.__version__.encode() in header


@pytest.mark.parametrize("suffix", [NAME, PROGRAM])
@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "foreign"])
def test_a_damaged_file_is_named_and_rewritten(
    tmp_path: Path, compiled_anew: None, monkeypatch: pytest.MonkeyPatch, suffix: str, damage: str
) -> None:
    run_scale(ProgramCache(tmp_path), monkeypatch)
    (file,) = tmp_path.glob("*" + suffix)
    good = file.read_bytes()
    changed = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
    file.write_bytes({"truncated": good[:-5], "empty": b"", "changed": changed, "foreign": b"{}" + good}[damage])
    cache = ProgramCache(tmp_path)
    with pytest.warns(UserWarning, match=f"{file.name}: not a usable program"):
        run_scale(cache, monkeypatch)
    assert cache.num_saved == (suffix == PROGRAM)
    after = ProgramCache(tmp_path)
    run_scale(after, monkeypatch)
    assert (after.num_loaded, after.num_saved) == (1, 0)


@pytest.mark.parametrize("which", ["folder", "file", "owner", "link"])
def test_nothing_is_read_that_others_could_have_written(
    tmp_path: Path, compiled_anew: None, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    folder = tmp_path / "kept"
    run_scale(ProgramCache(folder), monkeypatch)
    (file,) = folder.glob("*" + PROGRAM)
    if which == "folder":
        folder.chmod(0o777)
    elif which == "file":
        file.chmod(0o620)
    elif which == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        monkeypatch.setattr(program_cache.os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setattr(program_cache.pickle, "loads", lambda _: pytest.fail("unpickled") if which != "file" else _)
    if which in ("file", "link"):
        monkeypatch.undo()
    cache = ProgramCache(folder)
    program_cache._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"are not kept for the next start: .*(belongs to user|others may write|link)"):
        run_scale(cache, monkeypatch)
    assert cache.num_loaded == 0


def test_the_oldest_programs_go_first(tmp_path: Path, compiled_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run_scale(ProgramCache(tmp_path), monkeypatch, 3)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    old = set(tmp_path.iterdir())
    for file in old:
        os.utime(file, (1, 1))
    run_scale(ProgramCache(tmp_path, max_bytes=10 * size), monkeypatch, 5)
    middle = set(tmp_path.iterdir()) - old
    for file in middle:
        os.utime(file, (2, 2))
    run_scale(ProgramCache(tmp_path), monkeypatch, 3)  # used now
    interrupted = tmp_path / "x.unfinished"
    interrupted.touch()
    os.utime(interrupted, (1, 1))
    run_scale(ProgramCache(tmp_path, max_bytes=int(2.5 * size)), monkeypatch, 7)
    left = set(tmp_path.iterdir())
    assert old <= left and not middle <= left and len(left - old - middle) == 2 and not interrupted.exists()


def test_where_programs_cannot_be_serialised_a_warning_says_so_once(
    tmp_path: Path, compiled_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> Any:
        raise ValueError("Compilation does not support serialization")

    monkeypatch.setattr(program_cache, "serialize", refuse)
    program_cache._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="cannot be kept here: .*not support serialization") as seen:
        run_scale(ProgramCache(tmp_path), monkeypatch)
        run_scale(ProgramCache(tmp_path), monkeypatch)
    assert len(seen) == 1 and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_costs_only_a_warning(
    tmp_path: Path, compiled_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    program_cache._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="are not kept for the next start: .*file"):
        run_scale(ProgramCache(tmp_path / "file"), monkeypatch)


def test_a_compile_function_of_the_users_own_keeps_nothing(tmp_path: Path) -> None:
    model = numpy_model(tiny_config(moe=False, num_superblocks=1))

    def own(fn: Any, args: Any) -> Any:
        return compile_ahead(fn, args)

    llm = LLM(model, num_speculative_tokens=0, max_model_len=32, compile_fn=own, program_cache=tmp_path)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    kept = llm.engine.runner.programs.kept
    assert kept is not None
    kept.wait()
    assert not list(tmp_path.iterdir()) and len(llm.engine.runner.programs.compiled) == 3


def test_where_programs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(argument: Any) -> Path | None:
        cache = open_program_cache(argument)
        return None if cache is None else cache.folder

    assert folder("auto") is None  # tests/conftest.py turns it off
    assert folder(None) is folder("") is None
    assert folder(tmp_path) == folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("MTPJAX_PROGRAM_CACHE", str(tmp_path / "a"))
    assert folder("auto") == tmp_path / "a"
    monkeypatch.delenv("MTPJAX_PROGRAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder("auto") == tmp_path / "mtpjax" / "programs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder("auto") == tmp_path / "home" / ".cache" / "mtpjax" / "programs"
    monkeypatch.delattr(os, "getuid")
    program_cache._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="does not tell whom a file belongs to"):
        assert folder("auto") is None
