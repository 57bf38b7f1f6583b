"""What the examples show: a row for each step, the curve as a picture at the end, and what to do next.

Knows rewards and files. Knows nothing of models, backends or training; none of it is needed to train.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from art_core import PublicationReceipt, hookimpl

BAR_WIDTH = 30


class PublicationDisplay:
    """A plugin, registered by hand, that says when a checkpoint is served."""

    art_api = 1

    def __init__(self, console: Console) -> None:
        self._console = console

    @hookimpl
    def art_checkpoint_published(self, receipt: PublicationReceipt) -> None:
        """Called once a step is loaded, verified and routed."""
        stages = ", ".join(f"{stage} {1000 * seconds:.0f} ms" for stage, seconds in receipt.seconds.items())
        told = f" ({stages})" if stages else ""
        self._console.print(f"  published [bold]{receipt.inference_name}[/]{told}", highlight=False)


def show_step(console: Console, step: int, reward: float, first_reward: float, seconds: float) -> None:
    """One row: the mean reward as a bar, and how far it is from the first step's."""
    filled = round(BAR_WIDTH * max(0.0, min(1.0, reward)))
    full, empty = "█░" if console.encoding.startswith("utf") else "#."
    bar = f"[green]{full * filled}[/][dim]{empty * (BAR_WIDTH - filled)}[/]"
    console.print(
        f"step {step:3d}  reward {reward:.3f} {bar} {reward - first_reward:+.3f}  {seconds:4.1f} s", highlight=False
    )


def show_next(console: Console, commands: dict[str, list[str]], hint: str) -> None:
    """What to do now, each with the line that does it: arguments for this Python."""
    console.rule("what next")
    width = max(map(len, commands))
    for what, arguments in commands.items():
        program, *rest = arguments
        line = shlex.join([shown_path(sys.executable), shown_path(program) if "/" in program else program, *rest])
        console.print(f"{what:{width}}  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(hint, markup=False, highlight=False, soft_wrap=True)


def plain_console() -> Console:
    """A console on stdout that shows a question mark for a letter that the locale's encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console()


def shown_path(path: str) -> str:
    """The path from here, when that is shorter."""
    return min(path, os.path.relpath(path), key=len)


def save_curve(history: list[dict[str, Any]], title: str, destination: Path) -> Path | str:
    """Draw `train/reward` over the steps, with its standard deviation; gives the picture's path, or what it needs."""
    try:
        import matplotlib
    except ImportError:
        return "none, as matplotlib isn't installed; history.jsonl has its numbers"

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in history if "train/reward" in row]
    steps = [row["step"] for row in rows]
    rewards = [row["train/reward"] for row in rows]
    spread = [row.get("train/reward_std_dev", 0.0) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.fill_between(
        steps,
        [max(0.0, r - s) for r, s in zip(rewards, spread, strict=True)],
        [min(1.0, r + s) for r, s in zip(rewards, spread, strict=True)],
        alpha=0.15,
        label="one standard deviation within a group",
    )
    axes.plot(steps, rewards, marker="o", label="mean reward of the step's rollouts")
    axes.set(title=title, xlabel="training step", ylabel="reward", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(destination, dpi=150)
    pyplot.close(figure)
    return destination
