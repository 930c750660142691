"""The model card of the embedded model, from its manifest.json, training.json and report.json.

    python -m scripts.tiny_model.card --model checkpoints/tiny     # writes README.md anew, without the books

`python -m scripts.tiny_model.report` measures the figures and writes the card as well.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints import open_checkpoint
from mtpjax.config import ModelConfig
from mtpjax.loading.load import load_checkpoint
from scripts.tiny_model import data
from scripts.tiny_model.loss import BALANCE_WEIGHT, GAIN_SPREAD, MTP_WEIGHTS, ROWS
from scripts.tiny_model.samples import LONGEST_LOOP, NUM_PLACES, OPENING, TOKENS

FIRST_VERSION_BITS = 1.583  # bits a byte of the first model in this folder, on the same held-out titles


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def quoted(text: str) -> str:
    """Return a Markdown code block of wrapped lines, in which nothing is read as markup."""
    lines = [part for line in text.strip("\n").split("\n") for part in (textwrap.wrap(line, 108) or [""])]
    return "\n".join(f"    {line}" for line in lines)


def paragraph(text: str) -> str:
    """Wrap a paragraph."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def training_runs(training: dict[str, Any]) -> str:
    """Return a paragraph for each run that led to a training.json, the first one first."""
    if "start" not in training:
        return paragraph(one_run(training))
    deeper = ", their layers stacked" if training["layers"] > training["start"]["layers"] else ""
    weights = "those weights"
    if "share" in training:
        share, rest = training["share"], 1 - training["share"]
        weights = f"the weighted mean of those weights ({share:g}) and of those before ({rest:g})"
    text = f"Then, starting from {weights}{deeper}: {one_run(training)}"
    return f"{training_runs(training['start'])}\n\n{paragraph(text)}"


def one_run(training: dict[str, Any]) -> str:
    """Return the sentences on one run."""
    passes, speed = training["tokens"] / training["training_tokens"], training["tokens"] / training["seconds"]
    frozen = ", the trunk frozen, the MTP head alone" if training["frozen_trunk"] else ""
    text = "the text" + (f" (without {', '.join(training['without'])})" if training["without"] else "")
    weights = "the last ones" if training["weights"] == "last" else f"their moving average ({training['ema']:g})"
    return (
        f"{training['layers']} layers{frozen}, {training['done_steps']:,} steps of {training['batch']} windows of "
        f"{ROWS} tokens: {training['tokens']:,} tokens, {passes:.2f} passes over {text}, in "
        f"{training['seconds'] / 60:.0f} minutes by the clock on {training['threads']} CPU cores ({speed:,.0f} tokens "
        f"a second). Optimiser: {training['optimizer']}, peak rate {training['rate']:g}, warm-up of "
        f"{training['warm_up']} steps, then cosine; {training['dtype']}; seed {training['seed']}. Of the last weights "
        f"and their moving average, those with the lower loss on 32 held-out windows were kept: here {weights}."
    )


def loss_table(domains: dict[str, Any]) -> str:
    """Return the table of losses and compressors."""
    columns = (
        "domain",
        "tokens",
        "bytes a token",
        "nats a token",
        "perplexity",
        "**bits a byte**",
        "`xz -9e`",
        "after training text",
    )
    lines = [row(*columns), row(*["---"] * len(columns))]
    for name, figures in domains.items():
        cells = (
            name,
            f"{figures['tokens']:,}",
            f"{figures['bytes_per_token']:.2f}",
            f"{figures['nats_per_token']:.3f}",
            f"{math.exp(figures['nats_per_token']):.1f}",
            f"**{figures['bits_per_byte']:.3f}**",
            f"{figures['xz_bits_per_byte']:.3f}",
            f"{figures['xz_after_training_text_bits_per_byte']:.3f}",
        )
        lines.append(row(*cells))
    return "\n".join(lines)


def acceptance_table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table of accepted drafts by position."""
    depth = len(next(iter(rows.values()))["accepted"])
    columns = ("", "rounds", *(f"draft {d}" for d in range(1, depth + 1)), "tokens a round")
    lines = [row(*columns), row(*["---"] * len(columns))]
    for name, figures in rows.items():
        shares = zip(figures["accepted"], figures["accepted_given_previous"], strict=True)
        cells = (f"{accepted:.1%} ({given_previous:.1%})" for accepted, given_previous in shares)
        lines.append(row(name, f"{figures['draft_rounds']:,}", *cells, f"{figures['tokens_per_round']:.2f}"))
    return "\n".join(lines)


def mtp_steps_comparison(pair: list[dict[str, Any]] | None) -> str:
    """Return the section that compares two runs with one and with several MTP steps; empty if there are none."""
    if pair is None:
        return ""
    t = pair[1]["training"]
    table = acceptance_table({f"{run['training']['mtp_steps']} step(s)": run for run in pair})
    about = (
        f"Two shorter runs, equal but for `--mtp-steps` ({t['layers']} layers, {t['done_steps']} steps of {t['batch']} "
        f"windows each, seed {t['seed']}), on the held-out books:"
    )
    return f"\n### With and without the further MTP steps\n\n{paragraph(about)}\n\n{table}\n"


def loop_table(shares: dict[str, dict[str, float]]) -> str:
    """Return the table of texts that ran into a loop, by domain and way of sampling."""
    ways = list(next(iter(shares.values())))
    lines = [row("", *ways), row(*["---"] * (len(ways) + 1))]
    return "\n".join(lines + [row(domain, *(f"{share[way]:.0%}" for way in ways)) for domain, share in shares.items()])


def recommended_sampling(folder: Path) -> str:
    """Return the settings of generation_config.json in words."""
    config = json.loads((folder / "generation_config.json").read_text())
    labels = {
        "temperature": "T =",
        "top_k": "top-k",
        "top_p": "top-p",
        "min_p": "min-p",
        "presence_penalty": "presence penalty",
    }
    return ", ".join(f"{label} {config[key]}" for key, label in labels.items() if key in config)


def all_samples(samples: list[dict[str, Any]]) -> str:
    """Return the prompts and texts; equal texts of a prompt are shown once."""
    blocks = []
    for sample in samples:
        blocks.append(f"### Prompt\n\n{quoted(sample['prompt'])}")
        names: dict[str, list[str]] = {}
        for name, text in sample["texts"].items():
            names.setdefault(text, []).append(name)
        blocks += [f"{'; '.join(same)}:\n\n{quoted(text)}" for text, same in names.items()]
    return "\n\n".join(blocks)


def card(cfg: ModelConfig, num_parameters: int, folder: Path, report: dict[str, Any]) -> str:
    """Return the text of README.md for the model in `folder`; `report` holds the figures of report.json."""
    training = json.loads((folder / "training.json").read_text())
    domains = json.loads((folder / "manifest.json").read_text())["domains"]
    trained = {
        domain: [d["name"] for d in listed["documents"] if d["split"] == "train"] for domain, listed in domains.items()
    }
    megabytes = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".safetensors", ".json")) / 1e6
    held_out = " and ".join(f"*{name.split('_')[1].replace('-', ' ').title()}*" for name in data.HELD_OUT)
    modules = ", ".join(f"`{name}`" for name in data.HELD_OUT_MODULES)
    titles = "\n".join(f"* {Path(name).stem.replace('_', ': ').replace('-', ' ')}" for name in trained["books"])
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = "\n".join(f"* `{p['id']}`, {len(p['prompt'].split())} words" for p in prompts)
    licences = "\n".join(f"* {domain}: {licence}" for domain, licence in data.LICENCES.items())
    further = ", ".join(map(str, MTP_WEIGHTS[1 : training["mtp_steps"]]))
    return f"""# The embedded tiny model

A Qwen3.5-MoE with its MTP head, small enough to live in the repository: {num_parameters:,} parameters,
{megabytes:.1f} MB with its tokenizer. It exists so that the demo, the tests and the measurements of acceptance run on
real, trained weights. It writes simple English in the manner of old children's books, answers small talk through its
chat template, and imitates Python. It knows nothing: do not ask it for facts.

* Hidden {cfg.hidden_size}, {cfg.num_layers} layers ({cfg.linear_layers} Gated DeltaNet, {cfg.full_layers} gated
  attention) and one MTP layer; {cfg.num_experts} experts of {cfg.expert_size} units, {cfg.experts_per_token} a token,
  and a shared one of {cfg.shared_expert_size}; twice as many value heads as key heads; tied embeddings,
  {cfg.vocab_size} byte-level BPE tokens.
* BF16; the decay rates and the norm behind DeltaNet are float32.
* Trained on windows of {ROWS} tokens, so longer text is out of its experience.
* Stop tokens: `<|im_end|>` ({cfg.stop_token_ids[0]}), which ends a turn, and `<|endoftext|>`
  ({cfg.stop_token_ids[1]}), which stands between texts.

## Licence and data

The weights are Apache-2.0. They were trained on these texts:

{licences}

`manifest.json` has the name, size, SHA-256 and split of each text. The books and the library's sources are not in
this repository. The conversations can be generated again by `scripts/tiny_model/stories.py` and
`scripts/tiny_model/small_talk.py`.

* Books: {len(trained["books"])} titles to train on; held out are {held_out}.
* Python: {len(trained["python"])} modules of the standard library ({data.LARGEST_MODULE:,} bytes at most); held out
  are {modules}.
* Talk: {data.TALKS:,} conversations; held out are {data.HELD_OUT_TALKS} others, none of which occurs in training.
  Small talk: {data.SMALL_TALKS:,} short conversations of greetings, sums and small questions, none of them held out.

The demo prompts in `prompts.jsonl` are excerpts of the two held-out books, both in the public domain:

{lengths}

Books to train on, tokenizer included:

{titles}

## Training

    python -m scripts.tiny_model.train --books DIR --out DIR --like checkpoints/tiny
    python -m scripts.tiny_model.report --books DIR --model DIR

{training_runs(training)}

![loss by step, the runs one after the other](loss.png)

The loss is the trunk's, plus {MTP_WEIGHTS[0]} times that of the MTP head, plus {further} times those of the head
applied to its own output (each on half as many windows as the one before), plus {BALANCE_WEIGHT} times a
load-balancing loss. The target of the head is the trunk's own distribution, because a draft counts if it is the
trunk's choice.

The gains of the two norms that the MTP head reads from, `model.norm` and `mtp.norm`, start log-normal (deviation
{GAIN_SPREAD} of the logarithm) and not at one. Those of published checkpoints are far from uniform. With uniform
gains, no measurement could tell whether the head is fed before or after these norms, because it normalises its input
itself. `python -m scripts.benchmarks.acceptance --pre-norm` shows the difference.

## Held-out figures

Of these weights, computed in float32, on windows of {ROWS} tokens, each read from an empty cache. Bytes are those of
the text without special tokens, nats those of all tokens. The first version of this model had {FIRST_VERSION_BITS}
bits a byte on the books.

{loss_table(report["domains"])}

### Acceptance

Greedy drafts against the trunk's first choice, in single rounds after 64, 128, 192 and 248 tokens of a window and the
next true token: the share of all rounds (in brackets: of the rounds that accepted every draft before).

{acceptance_table(report["domains"])}
{mtp_steps_comparison(report.get("mtp_steps"))}
## Samples

The texts are not picked: greedy, then with the first three seeds as `generation_config.json` advises
({recommended_sampling(folder)}), then with the same seeds at that temperature alone, from all
tokens; {TOKENS} tokens at most. Of 100 such texts after {OPENING} tokens of held-out text ({NUM_PLACES} if greedy),
this share ran into a loop, a stretch of at most {LONGEST_LOOP} tokens three times in a row:

{loop_table(report["loops"])}

{all_samples(report["samples"])}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint, with its report.json")
    args = parser.parse_args(argv)
    model = load_checkpoint(open_checkpoint(args.model), dtype=jnp.dtype(jnp.float32))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    report = json.loads((args.model / "report.json").read_text(encoding="utf-8"))
    text = card(model.cfg, num_parameters, args.model, report)
    (args.model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
