"""The results of the GPU suite as a page that a person reads: `report.md`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def write_page(out: Path, ended: Mapping[str, str]) -> Path:
    """Write `report.md` from the parts' JSON files.

    Args:
        out: folder of the results.
        ended: how each part ended.
    """
    found = {part: json.loads(file.read_text()) for part in ended if (file := out / f"gpu_{part}.json").exists()}
    lines = ["# GPU suite", ""]
    if found:
        about = next(iter(found.values()))
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        lines += [f"{about['device']}, {about['date']}, commit {about['commit']}; {versions}.", ""]
    lines += ["| part | ended | rows | seconds | not measured |", "|---|---|---|---|---|"]
    for part, how in ended.items():
        content = found.get(part, {"rows": [], "seconds": 0.0, "not_measured": []})
        skipped = content["not_measured"]
        left_out = f"{len(skipped)}: {', '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}" if skipped else ""
        lines.append(f"| {part} | {how} | {len(content['rows'])} | {content['seconds']:.0f} | {left_out} |")
    for part, content in found.items():
        rows = content["rows"]
        if wrong := content.get("failed"):
            lines += ["", f"**Wrong in {part}:** {'; '.join(wrong)}"]
        if rows and part in _TABLES:
            lines += ["", f"## {part}", "", *_TABLES[part](rows)]
    page = out / "report.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def _decode_table(rows: Rows) -> list[str]:
    lines = [
        "| sequences | context | drafts | acceptance | ms a round | tokens/s | share of the roofline |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['batch']} | {row['context']:,} | {row['draft']} | {row['acceptance']} | {row['ms_a_round']:.3f} | "
            f"{row['tokens_per_second']:,.0f} | {row['of_roofline']:.2f} |"
        )
    return lines


def _model_table(rows: Rows) -> list[str]:
    lines = _decode_table([row for row in rows if row["kind"] == "decode"])
    lines += ["", "| rows of a chunk | context | MTP | tokens/s | on / off | share of the roofline |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        if row["kind"] == "prompt":
            lines.append(
                f"| {row['chunk']:,} | {row['context']:,} | {row['side'].removeprefix('MTP ')} | "
                f"{row['tokens_per_second']:,.0f} | {row['speed_on_off']:.3f} | {row['of_roofline']:.2f} |"
            )
    return lines


def _kernels_table(rows: Rows) -> list[str]:
    lines = ["| kernel | error | us | clock | share of the roofline |", "|---|---|---|---|---|"]
    for row in rows:
        middle = statistics.median(row["seconds"]) * 1e6
        error = f"{row['error']:.1e}" + ("" if row["right"] else " WRONG")
        lines.append(f"| {row['case']} | {error} | {middle:.1f} | {row['clock']} | {row['of_roofline']:.2f} |")
    return lines


def _bits_table(rows: Rows) -> list[str]:
    different = [row for row in rows if row["differing"]]
    lines = [f"{len(rows) - len(different)} of {len(rows)} checks found the same bits."]
    if different:
        lines += ["", "| check | differing | first |", "|---|---|---|"]
        lines += [f"| {row['check']} | {row['differing']} of {row['total']} | {row['where']} |" for row in different]
    return lines


def _text_table(rows: Rows) -> list[str]:
    return [f"* {row['draft']} drafts: {row['prompt']} **{row['text']}**" for row in rows]


_TABLES = {
    "model": _model_table,
    "bits": _bits_table,
    "kernels": _kernels_table,
    "batch": _decode_table,
    "text": _text_table,
}
