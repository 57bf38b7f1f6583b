"""Whether a real model learns as well with each training engine, served by each inference engine: its curves.

    python benchmarks/engine_curves.py
    python benchmarks/engine_curves.py --training-engines unsloth torchtune --inference-engines vllm --steps 5

Runs `examples/customer_replies.py` with every pair, one after the other and each in a process of its own, and reads
what it logged. Engines in environments of their own must be there: `art engines install NAME`.

    reward    the mean of a step's attempts, made by the policy before it
    mismatch  |log π of the trainer − log π of the engine|, the mean over the trained tokens in nats
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from measuring.machine import machine, versions
from rich.console import Console
from rich.table import Table

from art_engine_kit.mismatch import MEAN
from art_tracker_files import read_history

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "customer_replies.py"


@dataclass(frozen=True)
class Curve:
    """One run: the mean reward of each step, the mean mismatch, and the seconds of all."""

    training_engine: str
    inference_engine: str
    rewards: list[float]
    mismatch: float
    seconds: float


def learn(training_engine: str, inference_engine: str, arguments: argparse.Namespace) -> Curve:
    """Run the example to its end. Raises CalledProcessError when it fails; what it says goes to standard error."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        subprocess.run(
            [
                *(sys.executable, str(EXAMPLE), "--name", "curve", "--path", folder, "--steps", str(arguments.steps)),
                *("--inference-engine", inference_engine, "--training-engine", training_engine),
                *("--base-model", arguments.base_model, "--samples", str(arguments.samples)),
            ],
            check=True,
            stdout=sys.stderr,
        )
        seconds = time.monotonic() - began
        (history,) = Path(folder).rglob("history.jsonl")
        logged = read_history(history)
    rewards = [record["train/reward"] for record in logged if "train/reward" in record]
    mismatch = [record[MEAN] for record in logged if MEAN in record]
    return Curve(training_engine, inference_engine, rewards, fmean(mismatch), seconds)


def draw(curves: list[Curve], destination: Path) -> None:
    """Mean reward over steps: a colour for each training engine, a dash for each inference engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = list(dict.fromkeys(curve.training_engine for curve in curves))
    served = list(dict.fromkeys(curve.inference_engine for curve in curves))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for curve in curves:
        axes.plot(
            range(1, len(curve.rewards) + 1),
            curve.rewards,
            color=f"C{trained.index(curve.training_engine)}",
            linestyle=("-", "--", ":")[served.index(curve.inference_engine) % 3],
            label=f"{curve.training_engine}, served by {curve.inference_engine}",
        )
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1.02), title="Customer replies, SmolLM2-135M")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(destination, dpi=110)
    pyplot.close(figure)


def parse_arguments() -> argparse.Namespace:
    """What to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training-engines", nargs="+", default=["torch", "torchtune", "unsloth"])
    parser.add_argument("--inference-engines", nargs="+", default=["torch"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="attempts at each complaint in a step")
    parser.add_argument("--base-model", default="smollm2-135m-instruct")
    parser.add_argument("--picture", type=Path, help="where to draw the curves")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args()


def main() -> None:
    """Run every pair and say what came of it."""
    arguments = parse_arguments()
    where = {
        "machine": machine(),
        "versions": versions(arguments.inference_engines, ["art-core", "torch"]),
    }
    curves = [
        learn(trained, served, arguments)
        for served in arguments.inference_engines
        for trained in arguments.training_engines
    ]
    if arguments.picture:
        draw(curves, arguments.picture)
    if arguments.json:
        print(json.dumps({**where, "curves": [asdict(curve) for curve in curves]}))
        return
    console = Console()
    console.print(*where.values(), highlight=False)
    table = Table("trained by", "served by", "reward of each step", "mismatch", "seconds")
    for curve in curves:
        rewards = " ".join(f"{reward:.2f}" for reward in curve.rewards)
        table.add_row(
            curve.training_engine, curve.inference_engine, rewards, f"{curve.mismatch:.3f}", f"{curve.seconds:.0f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
