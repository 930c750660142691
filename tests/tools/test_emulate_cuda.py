"""What `make emulate-cuda` calls wrong, and the case of the shared expert in the launch of the routed ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.gpu.cuda_cases import kernel_cases
from scripts.gpu.data import CHECKED, data_of, reference, relative_difference
from scripts.gpu.emulate_cuda import problems, show, with_others
from scripts.gpu.emulated_caches import WAYS, empty_arrays
from scripts.gpu.kernels import SMOKE, least


def cache_result(**found: Any) -> dict[str, Any]:
    check = {"check": "alone", "differing": 0, "total": 900, "where": None} | found
    return {"card": "h200", "case": "caches iq4_nl", "seconds": 1.0, "kernels": 9, "empty": [], "checks": [check]}


def test_caches_that_differ_are_a_problem() -> None:
    assert not problems(cache_result())
    assert "1 of 1 ways" in show(cache_result())
    different = cache_result(differing=3, where="keys of layer 1 of prompt 0: 3 of 9 numbers")
    assert problems(different) == [
        "alone: 3 of 900 numbers differ, first in keys of layer 1 of prompt 0: 3 of 9 numbers"
    ]
    assert "0 of 1 ways" in show(different)
    assert problems(cache_result(total=0))  # nothing was compared
    arrays = {"a": np.arange(3.0), "b": np.zeros(3), "c": np.array([1.0, np.nan])}
    assert empty_arrays([arrays]) == ["b of prompt 0", "c of prompt 0"]
    assert len(problems(cache_result() | {"empty": ["b of prompt 0"]})) == 1


def test_prompts_are_read_in_all_ways() -> None:
    assert len(set(WAYS)) == 8 and len({str(way) for way in WAYS}) == 8
    assert (WAYS[0].mtp, WAYS[0].chunk, WAYS[0].alone) == (True, 256, False)


@pytest.mark.parametrize("form", ["iq4_nl", "nvfp4"])  # the routed half is small in the second form
def test_the_shared_expert_in_the_launch_of_the_others(form: str) -> None:
    name = f"joined {form} decode"
    fn, specs = kernel_cases(SMOKE, (form,), interpret=True)[name]()
    args = data_of(name, specs, SMOKE)
    want = np.asarray(reference(name, args, SMOKE.experts_per_token))
    got = np.asarray(fn(*args))[-CHECKED:]
    assert relative_difference(name, got, want) < 1e-2
    for part in (0, 1):
        wrong = got.copy()
        wrong[:, part] *= 1.1
        assert relative_difference(name, wrong, want) > 5e-2
    moved, flops = least(name, args, SMOKE)
    without_shared = least("experts", (*args[:6], args[7]), SMOKE)
    assert moved > without_shared[0] and flops > without_shared[1]


def test_results_of_other_cases_are_kept(tmp_path: Path) -> None:
    rows = [{"card": card, "case": "norm decode", "of_formula": 1.0} for card in ("h200", "b200")]
    file = tmp_path / "emulated.json"
    file.write_text(json.dumps({"commit": "1234567", "results": rows}))
    new = {"card": "h200", "case": "norm decode", "of_formula": 0.5}
    assert with_others([new], file) == [new, rows[1] | {"commit": "1234567"}]
