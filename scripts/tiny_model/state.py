"""Files of a training run: its plan and its state, saved with Orbax, and its loss curve."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

COLUMNS = (
    "stage",
    "step",
    "tokens",
    "seconds",
    "rate",
    "lm",
    "mtp1",
    "mtp2",
    "mtp3",
    "mtp4",
    "balance",
    "held_out",
    "held_out_ema",
    "held_out_mtp",
    "held_out_mtp_ema",
)


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        batch: windows of a step.
        accumulate: parts that a batch is read in; the gradient is their mean, and the memory is that of one part.
        rate: peak of the learning rate, reached after `warm_up` steps; then it falls like a cosine.
        optimizer: "muon" or "adamw".
        mtp_steps: steps of the MTP head that are trained.
        frozen_trunk: only the MTP head learns.
        ema: decay of the moving average of the weights.
        dtype: of computing.
        steps, minutes: one of them says when the run ends; the other is None.
    """

    batch: int = 8
    accumulate: int = 1
    rate: float = 3e-3
    warm_up: int = 100
    optimizer: str = "muon"
    mtp_steps: int = 3
    frozen_trunk: bool = False
    ema: float = 0.99
    dtype: str = "float32"
    seed: int = 0
    steps: int | None = None
    minutes: float | None = 30.0


@dataclass
class Progress:
    """Progress of a run: `step` steps in `seconds` of training, and the rows of its loss curve."""

    step: int = 0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)


class Saves:
    """The two latest saved states of one run, in `folder`.

    Orbax writes a state beside the others and renames it when it is complete, so an interrupted save does not count.
    """

    def __init__(self, folder: Path, plan: Plan):
        self.folder, self.plan = folder, plan

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self.folder.resolve(), options=options)

    def save(self, state: Any, progress: Progress) -> None:
        about = {"plan": asdict(self.plan), "seconds": progress.seconds, "rows": progress.rows}
        with self._manager() as manager:
            manager.save(
                progress.step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)),
            )

    def latest(self, like: Any) -> tuple[Any, Progress] | None:
        """Return the last saved state and its progress, or None if there is none.

        Args:
            like: a state with the same shapes and dtypes.

        Raises:
            SystemExit: the saved run had another plan.
        """
        with self._manager() as manager:
            if (step := manager.latest_step()) is None:
                return None
            about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
            saved, plan = about["plan"], json.loads(json.dumps(asdict(self.plan)))
            if differing := [name for name in plan if saved.get(name) != plan[name]]:
                name = differing[0]
                raise SystemExit(
                    f"{self.folder}: the run saved there has {name} = {saved.get(name)!r}, this one {plan[name]!r}. "
                    "Resume with the same options, or start anew without --resume."
                )
            restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))
            return restored.state, Progress(step, about["seconds"], about["rows"])


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Return the rows of loss.csv in `folder`; none if there is no such file."""
    if not (file := folder / "loss.csv").is_file():
        return []
    with file.open(newline="") as lines:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]
    return [{"stage": 1.0} | row for row in rows]  # the file of a single run may have no stage


def write_curve(folder: Path, rows: list[dict[str, float]], before: list[dict[str, float]]) -> None:
    """Write loss.csv and loss.png: the parts of the loss by step, in nats a token.

    Args:
        rows: of this run.
        before: the rows of the stages before it.
    """
    stage = 1 + max((row["stage"] for row in before), default=0)
    rows = before + [{"stage": stage} | row for row in rows]
    with (folder / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in COLUMNS if any(name in row for row in rows)])
        writer.writeheader()
        writer.writerows(
            {name: int(value) if name in ("stage", "step", "tokens") else value for name, value in row.items()}
            for row in rows
        )
    draw_curve(folder / "loss.png", rows)


def draw_curve(file: Path, rows: list[dict[str, float]]) -> None:
    """Draw the stages one after the other, with a line between them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "lm": "trunk, training",
        "mtp1": "MTP step 1 (target: the trunk)",
        "mtp2": "MTP step 2",
        "mtp3": "MTP step 3",
        "mtp4": "MTP step 4",
        "held_out": "trunk, held-out books",
        "held_out_mtp": "MTP steps, held-out books",
    }
    last = {row["stage"]: row["step"] for row in rows}  # last step of each stage
    begin = {stage: sum(steps for earlier, steps in last.items() if earlier < stage) for stage in last}
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for number, (name, label) in enumerate(names.items()):
        style: dict[str, Any] = {"linewidth": 1, "color": f"C{number}", "markersize": 3}
        style["marker"] = "o" if name.startswith("held_out") else ""
        for stage, first in begin.items():
            if points := [(first + row["step"], row[name]) for row in rows if row["stage"] == stage and name in row]:
                axes.plot(*zip(*points, strict=True), label=label, **style)
                label = ""
    for first in list(begin.values())[1:]:
        axes.axvline(first, color="0.6", linewidth=0.8, linestyle="--")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)
