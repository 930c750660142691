"""The prediction of a round: groups of kernels, sums that are those of the profiler, and a model with honest errors."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu import predict, predict_measured, predict_model
from scripts.gpu.kernel_counts import DRAFT, OTHER, count_groups
from scripts.gpu.predict_measured import COMMIT, TRACES, chunk_before, round_before, trace, trial
from scripts.gpu.predict_scenario import CHUNK, ROUND, Added, Candidate, Gone, change_of, pieces_of

pytestmark = pytest.mark.fast


def pallas(number: int, name: str, results: str, operands: str) -> str:
    return (
        f'  %call.{number} = {results} custom-call(%p), custom_call_target="__gpu$xla.gpu.triton", '
        f'operand_layout_constraints={{{operands}}}, api_version=X, backend_config={{grid = 1, name = "{name}"}}\n'
    )


# A decode program as XLA prints it: a loop over rounds, in it one over four drafts, and a choice of a method.
PROGRAM = (
    "HloModule m\n\n"
    "%greedy (p: f32[1,9]) -> s32[1] {\n  ROOT %reduce.1 = s32[1]{0} fusion(%p), calls=%inner\n}\n\n"
    "%sampled (p: f32[1,9]) -> s32[1] {\n"
    "  %a.1 = f32[9]{0} add(%p, %p)\n  %a.2 = f32[9]{0} add(%p, %p)\n  ROOT %a.3 = s32[1]{0} add(%p, %p)\n}\n\n"
    "%draft_body (p: s32[]) -> s32[] {\n"
    + pallas(1, "matmul_codes4", "f32[1,1,248320]{2,1,0}", "s32[1]{0}, bf16[1,2048]{1,0}, u32[248320,256]{1,0}")
    + "  ROOT %c.0 = s32[] conditional(%p, %p), branch_computations={%greedy, %sampled}\n}\n\n"
    "%draft_if (p: s32[]) -> pred[] {\n  ROOT %lt.1 = pred[] compare(%p, %p), direction=LT\n}\n\n"
    "%body (p: s32[]) -> s32[] {\n"
    "  %while.2 = s32[] while(%p), condition=%draft_if, body=%draft_body, "
    'backend_config={"known_trip_count":{"n":"4"}}\n'
    + pallas(2, "matmul_codes4", "f32[4,5,2048]{2,1,0}", "s32[1]{0}, bf16[5,4096]{1,0}, u32[1,2048,512]{2,1,0}")
    + pallas(3, "matmul_codes4", "f32[2,5,2048]{2,1,0}", "s32[1]{0}, bf16[5,512]{1,0}, u32[1,2048,64]{2,1,0}")
    + pallas(4, "fused_everything", "f32[5,2048]{1,0}", "s32[1]{0}, bf16[5,512]{1,0}")
    + pallas(5, "norm_gated", "bf16[5,4096]{1,0}", "bf16[5,32,128]{2,1,0}")
    + "  ROOT %copy.1 = s32[] copy(%p)\n}\n\n"
    "%if (p: s32[]) -> pred[] {\n  ROOT %lt.2 = pred[] compare(%p, %p), direction=LT\n}\n\n"
    "ENTRY %main (p: s32[]) -> s32[] {\n  ROOT %while.1 = s32[] while(%p), condition=%if, body=%body\n}\n"
)


def test_kernels_of_a_round_are_counted_by_what_they_compute() -> None:
    """The loop over drafts four times, of the choice the greedy branch; the condition of the loop over rounds not."""
    assert count_groups(PROGRAM, decode=True) == {
        DRAFT + "LM head": 4,
        OTHER: 4 * 2 + 1,
        "out, o": 1,
        "shared down": 1,
        "fused_everything": 1,
        "gated norm": 1,
    }


@pytest.mark.parametrize("program", TRACES)
def test_the_groups_of_a_profile_are_all_of_its_kernels(program: str) -> None:
    found = predict_measured.read("h100_model.json")["traces"][program.replace(" ", "")]
    groups = trace(program)
    assert sum(t.count for t in groups.values()) == pytest.approx(found["kernels"] / found["rounds"])
    assert sum(t.total_us for t in groups.values()) == pytest.approx(1e3 * found["busy_ms"] / found["rounds"])
    assert groups[OTHER].total_us < 0.13 * sum(t.total_us for t in groups.values())
    layers = {
        "norms": 80,
        "choice of experts": 40,
        "experts, down": 40,
        "DeltaNet, in": 30,
        "gated norm": 30,
        "q, k, v": 10,
    }
    # The final norm is one more; of a profile with drafts it is among the kernels that the file leaves out.
    assert {group: round(groups[group].count) for group in layers} in (layers, layers | {"norms": 81})


@pytest.mark.parametrize(("draft", "context"), predict.ROUNDS)
def test_kernels_before_are_most_of_the_measured_round(draft: int, context: int) -> None:
    """What is beside kernels was 0.26 to 0.57 ms a round."""
    kernels = sum(t.total_us for t in round_before(draft, context).values()) / 1e3
    whole = predict_measured.whole_round_ms(draft, context)
    assert whole is not None and 0.2 < whole - kernels < 0.6


def test_a_chunk_before_follows_the_measured_ones() -> None:
    for context in (512, 32_768, 131_072):
        kernels = sum(t.total_us for t in chunk_before(512, context).values()) / 1e3
        whole = predict_measured.whole_chunk_ms(512, context)
        assert whole is not None and 7 < whole - kernels < 9
    assert predict_measured.whole_chunk_ms(2048, 512) is None
    assert chunk_before(2048, 8192)["out, o"].us == trial("out M2048 rows64 stages3", "matmul_codes4")


def test_the_model_says_how_wrong_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is that of the fitted line, and with a point left out it is larger; a planted point shows."""
    line = predict_model.products()
    for (case, kernel), sizes in predict_model.PRODUCTS.items():
        x = predict_model.weight_bytes(*sizes) / predict_measured.bandwidth()
        assert line.errors[case] == pytest.approx(line.at(x) / trial(case, kernel) - 1)
    assert max(map(abs, line.errors.values())) < 0.06
    assert max(map(abs, line.errors_left_out.values())) > max(map(abs, line.errors.values()))
    bent = predict_model.fit({"a": ((1.0,), 1), "b": ((2.0,), 2), "c": ((3.0,), 9)})
    assert max(map(abs, bent.errors_left_out.values())) > 0.5


def test_long_kernels_come_to_the_measured_head() -> None:
    head = predict_model.weight_bytes(predict_model.LM_HEAD_ROWS, 0, 2048)
    assert predict_model.bytes_us(head) == pytest.approx(trace("decode 0")["LM head"].us)
    times = [predict_model.bytes_us(head * share) for share in (0.001, 0.01, 0.049, 0.051, 0.13, 0.5, 1)]
    assert times == sorted(times)


def test_a_candidate_is_the_ratio_of_two_trials() -> None:
    change = ROUND["DeltaNet, in"]
    assert isinstance(change, Candidate)
    assert change.us(10.0, 5, 1024) == pytest.approx(10 * 13.52 / 17.38)
    for table, program, sizes in ((ROUND, "decode 4", (1, 5)), (CHUNK, "prefill 512", (512, 2048))):
        for group, entry in table.items():
            assert group in trace(program) or isinstance(entry, Added)
            for rows in sizes:
                assert entry.us(100.0, rows, 8192) > 0 or isinstance(entry, Gone)  # its trials exist
    assert change_of(DRAFT + "out, o", decode=True) is ROUND["out, o"]
    assert [pieces_of(n) for n in (1, 64, 65, 4096, 4097, 32_768, 131_072)] == [1, 2, 3, 80, 81, 208, 400]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Counts of a program like the measured one, in place of those of this commit."""
    programs = {
        name: {"groups": {g: round(t.count) for g, t in trace(name).items()} | {"new kernel": 3}} for name in TRACES
    }
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"programs": programs}))
    monkeypatch.setattr(predict, "COUNTS", file)
    return programs


def test_the_table_has_what_is_new_and_what_is_gone(counts: dict[str, Any]) -> None:
    prediction = predict.predict_round(4, 1024)
    rows = {row.group: row for row in prediction.rows}
    assert rows["new kernel"].count == 3 and rows["new kernel"].how == "assumed"
    assert rows[COMMIT].count == 0 and rows[COMMIT].count_before == 1
    assert prediction.before_ms == pytest.approx(6.426, abs=2e-3)
    assert prediction.after_ms == pytest.approx(sum(r.count * r.us for r in prediction.rows) / 1e3)
    assert prediction.after_ms < prediction.before_ms
    small = predict.predict_round(4, 1024, 32_768)
    saved = prediction.after_ms - small.after_ms
    assert 0.4 < saved < 4 * rows[DRAFT + "LM head"].us / 1e3
    text = predict.format_table(prediction)
    assert f"| {COMMIT} | 1 | 404.3 | 0.404 | 0 | | 0 | gone: " in text
    goal = re.search(r"Goal 3.2 ms: (.*) \(([+-][\d.]+) ms of kernels", text)
    assert goal and (goal[1] == "MISSED") == (float(goal[2]) > 0)


def test_the_command(
    counts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    counts_of_chunk = counts["prefill 512"]
    predict.COUNTS.write_text(json.dumps({"programs": counts | {"prefill 2048": counts_of_chunk}}))
    monkeypatch.setattr(sys, "argv", ["predict", "--card", "h100", "--all", "--json", str(file)])
    predict.main()
    printed = capsys.readouterr().out
    assert printed.count("Goal ") == 10 and "left out of the fit" in printed
    assert len(json.loads(file.read_text())["tables"]) == 12
    monkeypatch.setattr(sys, "argv", ["predict", "--context", "1024", "--draft", "0"])
    predict.main()
    assert capsys.readouterr().out.startswith("## A round with 0 drafts at 1,024 tokens\n")
    predict.COUNTS.unlink()
    with pytest.raises(SystemExit, match="has no counts of 'decode 0'; run python -m scripts.gpu.kernel_counts"):
        predict.main()
