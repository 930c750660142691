"""A whole program that XLA compiled for a GPU, run by the emulator: its loops, branches, copies and slices, on its buffers."""

from pathlib import Path

import numpy as np
import pytest

from scripts.gpu.emulate_cuda import problems
from scripts.ptx_emulator.program import EmulatedProgram as Program
from scripts.ptx_emulator.ptx import EmulationError
from scripts.ptx_emulator.xla_dump import Branches, Copy, Launch, Loop, Slice, Thunk
from scripts.ptx_emulator.xla_dump import XlaDump as Dump
from tests.golden.make_emulated import SIZE, steps

FOLDER = Path(__file__).parent.parent / "golden" / "emulated"


@pytest.mark.parametrize(("turns", "first"), [(0, 0), (5, 0), (3, 1), (2, -4), (4, 7)])
def test_a_program_gives_what_it_gives_on_a_cpu(turns: int, first: int) -> None:
    x = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    got = Program(FOLDER).run([x, np.int32(turns), np.int32(first)])
    for one, other in zip(got, steps(x, turns, first), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_every_kind_of_step_is_in_it() -> None:
    """What the test above proves."""

    def kinds(thunks: list[Thunk]) -> set[type]:
        found = {type(thunk) for thunk in thunks}
        for thunk in thunks:
            inner = thunk.branches if isinstance(thunk, Branches) else [thunk.body] if isinstance(thunk, Loop) else []
            found |= {kind for some in inner for kind in kinds(some)}
        return found

    assert kinds(Dump(FOLDER).thunks) == {Launch, Copy, Slice, Loop, Branches}


def test_arguments_of_another_number_are_refused() -> None:
    with pytest.raises(EmulationError, match="takes 3 arrays, not 1"):
        Program(FOLDER).run([np.zeros(SIZE, np.float32)])


def test_a_step_that_is_not_known_is_named(tmp_path: Path) -> None:
    for file in FOLDER.iterdir():
        text = file.read_text()
        (tmp_path / file.name).write_text(text.replace("kCopy ", "kGemm ") if "thunk_sequence" in file.name else text)
    with pytest.raises(EmulationError, match="a program with a 'kGemm' for 'copy'"):
        Program(tmp_path)


def test_a_folder_without_a_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmulationError, match="holds 0 programs"):
        Dump(tmp_path)


def test_what_must_not_be() -> None:
    kernel = {"case": "norm decode", "of_formula": 1e-3, "of_interpreted": float("nan")}
    assert problems(kernel) == ["differs by nan from the interpreted kernel"]
    assert problems({**kernel, "of_formula": 0.1, "of_interpreted": 0.0}) == ["differs by 1.0e-01 from the formula"]
    text = {"case": "text bf16", "same_with_drafts": True, "same_on_cpu": False}
    assert problems(text) == []
    assert problems({**text, "same_with_drafts": False}) == ["drafts change the text"]
    assert problems({**text, "case": "text float32"}) == ["another text than on a CPU, in float32"]
    assert problems({"case": "text bf16", "error": "EmulationError: a race"}) == ["EmulationError: a race"]
