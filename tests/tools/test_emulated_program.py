"""The emulator on a whole program that XLA compiled for a GPU: loops, branches, copies and slices of buffers."""

from pathlib import Path

import numpy as np
import pytest

from scripts.gpu.emulate_cuda import problems
from scripts.ptx_emulator.program import EmulatedProgram
from scripts.ptx_emulator.ptx import EmulationError
from scripts.ptx_emulator.xla_dump import Branches, Copy, Launch, Loop, Slice, Thunk, XlaDump
from tests.golden.make_emulated import SIZE, steps

FOLDER = Path(__file__).parent.parent / "golden" / "emulated"


@pytest.mark.parametrize(("num_steps", "first"), [(0, 0), (5, 0), (3, 1), (2, -4), (4, 7)])
def test_a_program_computes_what_it_computes_on_a_cpu(num_steps: int, first: int) -> None:
    x = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    emulated = EmulatedProgram(FOLDER).run([x, np.int32(num_steps), np.int32(first)])
    for actual, expected in zip(emulated, steps(x, num_steps, first), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_program_contains_every_kind_of_thunk() -> None:
    """Otherwise the test above would not cover them."""

    def kinds(thunks: list[Thunk]) -> set[type]:
        found: set[type] = {type(thunk) for thunk in thunks}
        for thunk in thunks:
            inner = thunk.branches if isinstance(thunk, Branches) else [thunk.body] if isinstance(thunk, Loop) else []
            found |= {kind for branch in inner for kind in kinds(branch)}
        return found

    assert kinds(XlaDump(FOLDER).thunks) == {Launch, Copy, Slice, Loop, Branches}


def test_a_wrong_number_of_arguments_is_refused() -> None:
    with pytest.raises(EmulationError, match="takes 3 arrays, not 1"):
        EmulatedProgram(FOLDER).run([np.zeros(SIZE, np.float32)])


def test_an_unsupported_thunk_is_named(tmp_path: Path) -> None:
    for file in FOLDER.iterdir():
        text = file.read_text()
        (tmp_path / file.name).write_text(text.replace("kCopy ", "kGemm ") if "thunk_sequence" in file.name else text)
    with pytest.raises(EmulationError, match="a program with a 'kGemm' for 'copy'"):
        EmulatedProgram(tmp_path)


def test_a_folder_without_a_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmulationError, match="holds 0 programs"):
        XlaDump(tmp_path)


def test_problems_of_emulated_results() -> None:
    kernel = {"case": "norm decode", "of_formula": 1e-3, "of_interpreted": float("nan")}
    assert problems(kernel) == ["differs by nan from the interpreted kernel"]
    assert problems({**kernel, "of_formula": 0.1, "of_interpreted": 0.0}) == ["differs by 1.0e-01 from the formula"]
    text = {"case": "text bf16", "same_with_drafts": True, "same_on_cpu": False}
    assert problems(text) == []
    assert problems({**text, "same_with_drafts": False}) == ["drafts change the text"]
    assert problems({**text, "case": "text float32"}) == ["another text than on a CPU, in float32"]
    assert problems({"case": "text bf16", "error": "EmulationError: a race"}) == ["EmulationError: a race"]
