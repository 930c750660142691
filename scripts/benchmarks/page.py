"""Write docs/benchmarks.md from the JSON files in docs/benchmarks: `python -m scripts.benchmarks.page`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from scripts.benchmarks.table_output import all_drafts, markdown

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
FILES = DOCS / "benchmarks"
EXPERIMENTS = {
    "rows": (
        "Output rows and the MTP head while reading",
        "Which rows leave the trunk (none, the last, all) x what the MTP head does with a prompt (nothing, keys and "
        "values, its "
        "whole layer). Operations are counted from the program, seconds measured.",
    ),
    "hidden_state": (
        "What the MTP head is fed",
        "Hidden states after or before the norms; paired with the following token or one off; with keys and values "
        "of the whole "
        "prompt, of its last rows, or of none of it (what an engine does that lets the head begin with the first "
        "draft).",
    ),
    "draft_length": (
        "Draft length, temperature and domain",
        "Real acceptance and decode speed of the embedded model in bfloat16, batch 1: excerpts of held-out books, "
        "requests for "
        "stories in chat, and code.",
    ),
    "cost_model": (
        "Cost of a round",
        "Draft, verify and commit timed by themselves, beside the longer of bytes ÷ copy bandwidth and operations ÷ "
        "matmul "
        "rate, both measured in the same run. A draft length pays where more tokens a round are expected than its "
        "break-even "
        "line asks for.",
    ),
    "quantisation": (
        "Quantisation",
        "Bytes, bits a byte, acceptance and decode speed by weight type; weights stay packed in memory. `--books DIR` "
        "is the folder that the model was trained from.",
    ),
}


MODULES = {"quantisation": "quantization"}  # where the module has another name than its files


def about(result: dict[str, Any]) -> str:
    """Where a file's figures come from."""
    versions = ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items())
    machine = f"{result.get('device')} ({result.get('cores')} cores)"
    return f"{result.get('date')}, {machine}, {versions}, commit {result.get('commit')}."


def the_table(result: dict[str, Any]) -> list[str]:
    return [
        "## The table",
        f"`python -m scripts.benchmarks.bench_table --prompt-tokens 512 2048 8192 32768 --max-tokens 48 --out "
        f"docs/benchmarks/table`: {result['model']} "
        f"model of about 50 M active parameters in {result['dtype']}, prompts of {result['prompts']}, "
        f"**{result['acceptance']}** "
        "(the published lengths of Qwen3.5-397B-A17B's head). " + about(result),
        'A ratio is the median of the ratios within each run. "Spread" is (slowest − fastest) ÷ median of the '
        "prefill's "
        "runs; where it exceeds a difference, the difference is not measured. Drafts 2, 3 and 4 read the prompt with "
        "the same "
        "program, so what lies between them is noise. " + all_drafts(result),
        '"Draft 0" leaves out the last layer\'s queries, attention and experts, since nothing reads their rows: a '
        "saving that "
        "MTP cannot have while its head reads the last layer's output of every row. It is one layer of 12 here, one "
        "of 40 in "
        'a 35B-A3B; at 32,768 tokens it is also a third of all attention here, a tenth there. "Draft 0, whole" is '
        "MTP off in "
        'engines that run every layer for every row. "Last 64 tokens" is `LLM(mtp_prompt_tokens=64)`: the head reads '
        "the end of the "
        "prompt only, and every chunk before is the very program of draft 0.",
        markdown(result),
        "![prefill ratio, decode speed and elapsed seconds by prompt length](benchmarks/table.png)",
    ]


def the_tiny_table(result: dict[str, Any]) -> list[str]:
    return [
        "## The embedded model, real acceptance",
        "`python -m scripts.benchmarks.bench_table --model tiny --dtype bfloat16 --text talk --prompt-tokens 128 512 "
        "2048 "
        "--chunk 128 --num-speculative-tokens 0 "
        f"1 2 3 4 --max-tokens 96 --runs 5 --no-ablations --out docs/benchmarks/table_tiny`, in {result['dtype']}, "
        "prompts of "
        f"{result['prompts']}: conversations that the model was not trained on, {result['acceptance']}. "
        + about(result),
        "The model was trained on windows of 256 tokens; longer prompts are out of its experience, and of its "
        "head's: behind "
        "them a head that has read the last 64 tokens only drafts better. What draft 0 drops while it "
        "reads a prompt is most of one layer of eight. " + all_drafts(result),
        markdown(result, reference=False),
        "![prefill ratio, decode speed and elapsed seconds by prompt length](benchmarks/table_tiny.png)",
    ]


def memory(result: dict[str, Any]) -> list[str]:
    lines = ["| rows of a chunk | draft | context | temporaries | cache (updated in place) |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['chunk']} | {r['draft']} | {r['context']:,} | {r['temp'] / 2**20:.1f} MiB | {r['alias'] / 2**20:,.0f} "
        "MiB |"
        for r in result["rows"]
    ]
    return [
        "## Memory of reading a long prompt",
        f"`.venv-cuda/bin/python -m scripts.gpu.prefill_memory --json docs/benchmarks/prefill_memory.json`: the "
        "prefill program of a "
        f"35B-A3B with IQ4_NL weights, compiled for an {result['card']} (what XLA knows of an RTX 3090) without one. "
        + about(result),
        "One program reads every prompt that fits its cache: the position is data, and attention's loop over the "
        "cache has as "
        "many turns as it needs.",
        "\n".join(lines),
    ]


def draft_vocab(result: dict[str, Any]) -> list[str]:
    """The section on drafts from a part of the vocabulary."""
    whole = {(r["domain"], r["temperature"]): r for r in result["table"] if r["draft_vocab_size"] is None}
    lines = [
        "| N | text | T | tokens of the text among them | accepted, by position | tokens a round | ÷ all |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["table"]:
        size, accepted = r["draft_vocab_size"], ", ".join(f"{share:.2f}" for share in r["accepted"])
        name, per_round = f"{size:,}" if size else "all", r["tokens_per_round"]
        ratio = per_round / whole[r["domain"], r["temperature"]]["tokens_per_round"]
        head = f"| {name} | {r['domain']} | {r['temperature']:g} | {r['in_part']:.1%} "
        lines.append(f"{head}| {accepted} | {per_round:.2f} | {ratio:.2f} |")
    return [
        "## Drafts from a part of the vocabulary",
        "`python -m scripts.benchmarks.acceptance_draft_vocab --text FILE FILE --json docs/benchmarks/draft_vocab.json`"
        f": `LLM(draft_vocab_size=N)`, embedded model (4,096 tokens) in {result['dtype']}, {result['draft']} drafts, "
        "prompts of the two held-out books and requests for stories in chat. The ids are those of "
        "`checkpoints/tiny/draft_vocab.json`, counted in its training text. All texts are the same at every N. A "
        "draft step reads N + 3 rows of the LM head in place of 4,096; its share of a round on a GPU is what is to be "
        "gained. " + about(result),
        "\n".join(lines),
    ]


def h100(result: dict[str, Any], llama: dict[str, Any]) -> list[str]:
    """The section on the only GPU that has run whole programs."""
    rows = ["| context | drafts | ms a round | tokens/s | share of the bandwidth |", "|---|---|---|---|---|"]
    for r in result["decode"]:
        rate = 1000 * r["tpr"] / r["ms_round"]
        rows.append(f"| {r['context']:,} | {r['draft']} | {r['ms_round']:.2f} | {rate:,.0f} | {r['roofline']:.2f} |")
    chunks = ["| rows of a chunk | context | MTP | tokens/s | share of the roofline |", "|---|---|---|---|---|"]
    for r in result["prefill"]:
        rate, mtp = r["chunk"] / statistics.median(r["seconds"]), "on" if r["mtp"] else "off"
        chunks.append(f"| {r['chunk']:,} | {r['context']:,} | {mtp} | {rate:,.0f} | {r['roofline']:.2f} |")
    decode = ", ".join(
        f"{r['tok_s']:,.0f} tokens/s at {r['depth']:,}" for r in llama["rows"] if r["test"] == "tg" and "tok_s" in r
    )
    prompts = ", ".join(
        f"{r['tok_s']:,.0f} ({r['n']:,} tokens, ubatch {r['ub']:,})" for r in llama["rows"] if r["test"] == "pp"
    )
    return [
        "## On an H100",
        f"{result['date']}, {result['device']}, jax {result['jax']}, commit {result['commit']}. {result['note']}. "
        "Kernel times are in "
        "[h100_model.json](benchmarks/h100_model.json), numerics of all 54 kernel cases in "
        "[h100_kernels.json](benchmarks/h100_kernels.json), tile constants in "
        "[h100_tiles.json](benchmarks/h100_tiles.json).",
        "\n".join(rows),
        "\n".join(chunks),
        f"llama.cpp v0.5.0 on the same card and day ([figures](benchmarks/h100_llama_cpp.json)): decoding without "
        f"drafts {decode}; "
        f"prompts {prompts}. Its prompts with MTP ran at 0.941 (2k) and 0.890 (8k) of the speed without.",
        "All kernels were right. In bfloat16 three of ten greedy texts of the embedded model (IQ4_NL) changed with "
        "drafts or batch size; "
        "at T = 0.8 all were equal. The cause is known: reductions over features in prompts that are left to XLA.",
    ]


def page() -> str:
    """The Markdown text."""
    parts = ["# Benchmarks", "Made by `python -m scripts.benchmarks.page` from the JSON files in `docs/benchmarks/`."]
    parts.append((FILES / "figures.md").read_text(encoding="utf-8").strip())
    shown = set()
    if (file := FILES / "h100_model.json").exists():
        parts += h100(json.loads(file.read_text()), json.loads((FILES / "h100_llama_cpp.json").read_text()))
        shown |= {"h100_model", "h100_llama_cpp"}
    for name, section in (
        ("table", the_table),
        ("table_tiny", the_tiny_table),
        ("prefill_memory", memory),
        ("draft_vocab", draft_vocab),
    ):
        if (file := FILES / f"{name}.json").exists():
            parts += section(json.loads(file.read_text()))
            shown.add(name)
    for name, (title, text) in EXPERIMENTS.items():
        if (file := FILES / f"{name}.json").exists():
            result = json.loads(file.read_text())
            picture = f"![{title}](benchmarks/{name}.png)"
            parts += [
                f"## {title}",
                text,
                f"`python -m scripts.experiments.{MODULES.get(name, name)}`. " + about(result),
                picture,
            ]
            shown.add(name)
    others = sorted(f for f in FILES.glob("*.json") if f.stem not in shown)
    lines = [f"| [{f.name}](benchmarks/{f.name}) | {json.loads(f.read_text()).get('what', f.stem)} |" for f in others]
    parts += ["## Other results", "| file | what |\n|---|---|\n" + "\n".join(lines)]
    parts += [
        "## Not measured",
        "The table for a trained 35B-A3B on a GPU, and any GPU other than the H100. `python -m scripts.gpu.suite` "
        "makes the "
        "figures of a CUDA GPU; with `--smoke` it runs anywhere at a toy size, and those figures mean nothing. On "
        "the CPU, "
        "contexts above those of the table were not run.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (DOCS / "benchmarks.md").write_text(page(), encoding="utf-8")
    print(f"wrote {DOCS / 'benchmarks.md'}")
