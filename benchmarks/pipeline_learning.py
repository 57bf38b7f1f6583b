"""How fast a real model learns with rollouts and training at once, beside the plain loop of the same task.

    python benchmarks/pipeline_learning.py
    python benchmarks/pipeline_learning.py --inference-engine vllm --pairs 3 --picture learning.png

Runs `examples/customer_replies.py` both ways, in turn and each in a process of its own, and keeps when each attempt
ended and what it earned, those too that were never trained on. The clock starts when the model is registered.

    rollouts  attempts until the mean reward of the last 64 reached `--goal`
    seconds   the same in time
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

from measuring.machine import machine, versions
from rich.console import Console
from rich.table import Table

import art

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WINDOW = 64
WAYS = ("plain", "pipeline")
Attempt = tuple[float, float]


def means(attempts: list[Attempt]) -> list[float]:
    """The mean reward of the last WINDOW attempts, after each; the first few have fewer before them."""
    rewards = [reward for _, reward in attempts]
    return [fmean(rewards[max(0, i - WINDOW) : i]) for i in range(1, len(rewards) + 1)]


def reached(attempts: list[Attempt], goal: float) -> tuple[int, float] | None:
    """How many attempts and seconds it took until the mean of a full window was at the goal; None if it never was."""
    for number, ((seconds, _), mean) in enumerate(zip(attempts, means(attempts), strict=True), 1):
        if number >= WINDOW and mean >= goal:
            return number, seconds
    return None


async def learn(way: str, folder: str, arguments: argparse.Namespace) -> list[Attempt]:
    """One run in this process: (seconds, reward) of each attempt in the order of their ends."""
    sys.path.insert(0, str(EXAMPLES))
    import customer_replies as task
    from art.local import LocalBackend

    attempts: list[Attempt] = []
    plain_rollout = task.rollout

    async def timed_rollout(model: art.Model, complaint: Any) -> art.Trajectory:
        trajectory = await plain_rollout(model, complaint)
        attempts.append((time.monotonic() - start, trajectory.reward))
        return trajectory

    task.rollout = timed_rollout
    options = argparse.Namespace(
        steps=arguments.steps, samples=8, learning_rate=1e-3, packed_sequence_length=800, pipeline=way == "pipeline"
    )
    async with LocalBackend(in_process=True, path=folder, inference_engine=arguments.inference_engine) as backend:
        model = art.TrainableModel(
            name=way, project="learning", base_model=arguments.base_model, base_path=folder, report_metrics=[]
        )
        await model.register(backend)
        start = time.monotonic()
        if options.pipeline:
            await task.train_in_pipeline(backend, model, options)
        else:
            await task.train_in_steps(Console(stderr=True), backend, model, options)
    return attempts


def run_apart(way: str, arguments: argparse.Namespace) -> list[Attempt]:
    """The same in a process of its own, so that neither way inherits the other's memory or caches."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "attempts.json"
        own = [way, "--keep", str(kept), "--folder", folder, "--steps", str(arguments.steps)]
        engine = ["--inference-engine", arguments.inference_engine, "--base-model", arguments.base_model]
        subprocess.run([sys.executable, __file__, "--way", *own, *engine], check=True, stdout=sys.stderr)
        return [(seconds, reward) for seconds, reward in json.loads(kept.read_text(encoding="utf-8"))]


def draw(runs: dict[str, list[list[Attempt]]], title: str, destination: Path) -> None:
    """Two pictures side by side: mean reward over attempts, and over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_attempt, by_time) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for way, colour in zip(WAYS, ("tab:grey", "tab:blue"), strict=True):
        for number, attempts in enumerate(runs[way]):
            label = {"plain": "one after the other", "pipeline": "PipelineTrainer"}[way] if number == 0 else None
            by_attempt.plot(means(attempts), color=colour, label=label)
            by_time.plot([seconds for seconds, _ in attempts], means(attempts), color=colour)
    by_attempt.set(xlabel="rollouts", ylabel=f"mean reward of the last {WINDOW}", ylim=(0, 1.02))
    by_time.set(xlabel="seconds")
    for axes in (by_attempt, by_time):
        axes.grid(alpha=0.3)
    by_attempt.legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(destination, dpi=110)
    pyplot.close(figure)


def parse_arguments() -> argparse.Namespace:
    """What to run; `--way` is for the processes that this one starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1, help="runs of each way")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--goal", type=float, default=0.9)
    parser.add_argument("--inference-engine", default="torch")
    parser.add_argument("--base-model", default="smollm2-135m-instruct")
    parser.add_argument("--picture", type=Path, help="where to draw the curves")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the pairs and say what came of them."""
    arguments = parse_arguments()
    if arguments.way:
        attempts = asyncio.run(learn(arguments.way, arguments.folder, arguments))
        arguments.keep.write_text(json.dumps(attempts), encoding="utf-8")
        return
    runs: dict[str, list[list[Attempt]]] = {way: [] for way in WAYS}
    for number in range(arguments.pairs):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            runs[way].append(run_apart(way, arguments))
    if arguments.picture:
        draw(runs, f"Customer replies, SmolLM2-135M, served by {arguments.inference_engine}", arguments.picture)
    goals = {way: [reached(attempts, arguments.goal) for attempts in runs[way]] for way in WAYS}
    where = {"machine": machine(), "versions": versions([arguments.inference_engine], ["art-core", "torch"])}
    if arguments.json:
        print(json.dumps({**where, "reached": goals}))
        return
    console = Console()
    console.print(*where.values(), highlight=False)
    table = Table("way", f"rollouts until {arguments.goal}", "seconds", "rollouts in all", "seconds in all")
    for way in WAYS:
        for attempts, goal in zip(runs[way], goals[way], strict=True):
            number_and_seconds = (str(goal[0]), f"{goal[1]:.0f}") if goal else ("never", "")
            table.add_row(way, *number_and_seconds, str(len(attempts)), f"{attempts[-1][0]:.0f}")
    console.print(table)
    plain, pipeline = ([goal for goal in goals[way] if goal] for way in WAYS)
    if len(plain) == len(pipeline) == arguments.pairs:
        rollouts, seconds = (median(g[i] for g in plain) / median(g[i] for g in pipeline) for i in (0, 1))
        console.print(f"plain over pipeline, medians: {rollouts:.2f} in rollouts, {seconds:.2f} in seconds")


if __name__ == "__main__":
    main()
