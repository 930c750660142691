"""The model card of the embedded model, from the figures of tiny_report.py."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any

from mtpjax.config import ModelConfig
from scripts.tiny_model import data
from scripts.tiny_model.loss import BALANCE_WEIGHT, GAIN_SPREAD, MTP_WEIGHTS, ROWS
from scripts.tiny_model.samples import LONGEST_LOOP, OPENING, PLACES, TOKENS

FIRST_VERSION_BITS = 1.583  # a byte of the same held-out titles, the first model that this folder held


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def quoted(text: str) -> str:
    """A Markdown quote of plain lines; nothing in the text is read as markup."""
    lines = [part for line in text.strip("\n").split("\n") for part in (textwrap.wrap(line, 108) or [""])]
    return "\n".join(f"    {line}" for line in lines)


def cost(spent: dict[str, Any]) -> str:
    """A paragraph for each run, from training.json."""
    if "start" not in spent:
        return one_run(spent)
    deeper = ", their layers stacked" if spent["layers"] > spent["start"]["layers"] else ""
    weights = "those weights"
    if "share" in spent:
        weights = (
            f"the weighted mean of those weights ({spent['share']:g}) and of those before ({1 - spent['share']:g})"
        )
    return f"{cost(spent['start'])}\n\nThen, starting from {weights}{deeper}: {one_run(spent)}"


def one_run(spent: dict[str, Any]) -> str:
    passes, speed = spent["tokens"] / spent["training_tokens"], spent["tokens"] / spent["seconds"]
    learnt = ", the trunk frozen, the MTP head alone" if spent["frozen_trunk"] else ""
    text = "the text" + (f" (without {', '.join(spent['without'])})" if spent["without"] else "")
    weights = "the last ones" if spent["weights"] == "last" else f"their moving average ({spent['ema']:g})"
    return (
        f"{spent['layers']} layers{learnt}, {spent['done_steps']:,} steps of {spent['batch']} windows of {ROWS} tokens: "
        f"{spent['tokens']:,} tokens, "
        f"{passes:.2f} passes over\n{text}, in {spent['seconds'] / 60:.0f} minutes by the clock on {spent['threads']} CPU cores "
        f"({speed:,.0f} tokens a second). Optimiser: {spent['optimizer']},\npeak rate {spent['rate']:g}, warm-up of "
        f"{spent['warm_up']} steps, then cosine; {spent['dtype']}; seed {spent['seed']}. Of the last weights and their\n"
        f"moving average, those with the lower loss on 32 held-out windows were kept: here {weights}."
    )


def loss_table(domains: dict[str, Any]) -> str:
    lines = [
        row(
            "domain",
            "tokens",
            "bytes a token",
            "nats a token",
            "perplexity",
            "**bits a byte**",
            "`xz -9e`",
            "after training text",
        ),
        row(*["---"] * 8),
    ]
    for name, f in domains.items():
        lines.append(
            row(
                name, f"{f['tokens']:,}", f"{f['bytes_per_token']:.2f}", f"{f['nats_per_token']:.3f}",
                f"{math.exp(f['nats_per_token']):.1f}", f"**{f['bits_per_byte']:.3f}**", f"{f['xz_bits_per_byte']:.3f}",
                f"{f['xz_after_training_text_bits_per_byte']:.3f}",
            )
        )  # fmt: skip
    return "\n".join(lines)


def acceptance_table(rows: dict[str, dict[str, Any]]) -> str:
    depth = len(next(iter(rows.values()))["accepted"])
    lines = [
        row("", "rounds", *(f"draft {d}" for d in range(1, depth + 1)), "tokens a round"),
        row(*["---"] * (depth + 3)),
    ]
    for name, f in rows.items():
        shares = zip(f["accepted"], f["accepted_given_previous"], strict=True)
        cells = (f"{taken:.1%} ({given:.1%})" for taken, given in shares)
        lines.append(row(name, f"{f['draft_rounds']:,}", *cells, f"{f['tokens_per_round']:.2f}"))
    return "\n".join(lines)


def several_steps(pair: list[dict[str, Any]] | None) -> str:
    if pair is None:
        return ""
    single, several = pair
    t = several["training"]
    table = acceptance_table({f"{run['training']['mtp_steps']} step(s)": run for run in pair})
    return f"""
### With and without the further MTP steps

Two shorter runs, equal but for `--mtp-steps` ({t["layers"]} layers, {t["done_steps"]} steps of {t["batch"]} windows each, seed
{t["seed"]}), on the held-out books:

{table}
"""


def loop_table(shares: dict[str, dict[str, float]]) -> str:
    ways = list(next(iter(shares.values())))
    lines = [row("", *ways), row(*["---"] * (len(ways) + 1))]
    return "\n".join(lines + [row(domain, *(f"{share[way]:.0%}" for way in ways)) for domain, share in shares.items()])


def advice(folder: Path) -> str:
    config = json.loads((folder / "generation_config.json").read_text())
    names = {
        "temperature": "T =",
        "top_k": "top-k",
        "top_p": "top-p",
        "min_p": "min-p",
        "presence_penalty": "presence penalty",
    }
    return ", ".join(f"{said} {config[name]}" for name, said in names.items() if name in config)


def all_samples(found: list[dict[str, Any]]) -> str:
    parts = []
    for sample in found:
        parts.append(f"### Prompt\n\n{quoted(sample['prompt'])}")
        names: dict[str, list[str]] = {}
        for name, text in sample["texts"].items():
            names.setdefault(text, []).append(name)
        parts += [f"{'; '.join(same)}:\n\n{quoted(text)}" for text, same in names.items()]
    return "\n\n".join(parts)


def card(
    cfg: ModelConfig, parameters: int, folder: Path, report: dict[str, Any], documents: list[data.Document]
) -> str:
    """README.md of the model in `folder`; `report` is that of tiny_report.py."""
    spent = json.loads((folder / "training.json").read_text())
    megabytes = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".safetensors", ".json")) / 1e6
    held = " and ".join(f"*{name.split('_')[1].replace('-', ' ').title()}*" for name in data.HELD_OUT)
    modules = ", ".join(f"`{name}`" for name in data.HELD_OUT_MODULES)
    books = [d for d in documents if d.domain == "books" and d.split == "train"]
    titles = "\n".join(f"* {Path(b.name).stem.replace('_', ': ').replace('-', ' ')}" for b in books)
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = "\n".join(f"* `{p['id']}`, {len(p['prompt'].split())} words" for p in prompts)
    counts = {d: sum(x.domain == d and x.split == "train" for x in documents) for d in data.LICENCES}
    licences = "\n".join(f"* {domain}: {licence}" for domain, licence in data.LICENCES.items())
    further = ", ".join(map(str, MTP_WEIGHTS[1 : spent["mtp_steps"]]))
    domains = report["domains"]
    return f"""# The embedded tiny model

A Qwen3.5-MoE with its MTP head, small enough to live in the repository: {parameters:,} parameters, {megabytes:.1f} MB
with its tokenizer. It exists so that the demo, the tests and the measurements of acceptance run on real, trained
weights. It writes simple English in the manner of old children's books, answers small talk through its chat template,
and imitates Python. It knows nothing: do not ask it for facts.

* Hidden {cfg.hidden_size}, {cfg.num_layers} layers ({cfg.linear_layers} Gated DeltaNet, {cfg.full_layers} gated attention)
  and one MTP layer; {cfg.num_experts} experts of {cfg.expert_size} units, {cfg.experts_per_token} a token, and a shared one
  of {cfg.shared_expert_size}; twice as many value heads as key heads; tied embeddings, {cfg.vocab_size} byte-level BPE tokens.
* BF16; the decay rates and the norm behind DeltaNet are float32.
* Trained on windows of {ROWS} tokens: longer text is out of its experience.
* Stop tokens: `<|im_end|>` ({cfg.stop_token_ids[0]}), which ends a turn, and `<|endoftext|>` ({cfg.stop_token_ids[1]}), which
  stands between texts.

## Licence and data

The weights are Apache-2.0. What they were trained on:

{licences}

`manifest.json` has the name, size, SHA-256 and split of each text. The books and the library's sources are not in this
repository; the conversations are made anew by `scripts/tiny_model/stories.py` and `scripts/tiny_model/small_talk.py`.

* Books: {counts["books"]} titles to train on; held out are {held}.
* Python: {counts["python"]} modules of the standard library ({data.LARGEST_MODULE:,} bytes at most); held out are
  {modules}.
* Talk: {data.TALKS:,} conversations; held out are {data.HELD_OUT_TALKS} others, none of which occurs in training. Small talk:
  {data.SMALL_TALKS:,} short ones, of greetings, sums and small questions; of these none is held out.

The demo prompts in `prompts.jsonl` are excerpts of the two held-out books, both in the public domain:

{lengths}

Books to train on, tokenizer included:

{titles}

## Training

    python -m scripts.tiny_model.train --books DIR --out DIR --like checkpoints/tiny
    python -m scripts.tiny_model.report --books DIR --model DIR

{cost(spent)}

![loss by step, the runs one after the other](loss.png)

The loss is the trunk's, plus {MTP_WEIGHTS[0]} times that of the MTP head, plus {further} times those of the head applied
to its own output (each on half as many windows), plus {BALANCE_WEIGHT} times a load-balancing loss. The target of the head is the
trunk's own distribution, because a draft counts when it is the trunk's choice.

The gains of the two norms that the MTP head reads from, `model.norm` and `mtp.norm`, start log-normal (deviation
{GAIN_SPREAD} of the logarithm) and not at one. Those of published checkpoints are far from uniform; with uniform ones
nobody could measure whether the head is fed before or after them, since it normalises what it reads.
`scripts/benchmarks/acceptance.py --pre-norm` shows the difference.

## Held-out figures

Of these weights, computed in float32, on windows of {ROWS} tokens each read from nothing. Bytes are those of the text
without special tokens, nats those of all tokens. The first version of this model had
{FIRST_VERSION_BITS} bits a byte on the books.

{loss_table(domains)}

### Acceptance

Greedy drafts against the trunk's first choice, in single rounds after 64, 128, 192 and 248 tokens of a window and the
next true token: the share of all rounds (in brackets: of those that took every draft before).

{acceptance_table(domains)}
{several_steps(report.get("mtp_steps"))}
## Samples

Not picked: greedy, then the first three seeds, first as `generation_config.json` advises ({advice(folder)}),
then at that temperature alone, from all tokens; {TOKENS} tokens at most. Of 100 such texts after {OPENING} tokens of held-out
text ({PLACES} if greedy), so many ran into a loop, a stretch of at most {LONGEST_LOOP} tokens three times in a row:

{loop_table(report["loops"])}

{all_samples(report["samples"])}
"""
