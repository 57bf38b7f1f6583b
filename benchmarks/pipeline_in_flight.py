"""What thousands of rollouts in flight cost a pipeline's own process: the lag of its event loop, and its memory.

    python benchmarks/pipeline_in_flight.py
    python benchmarks/pipeline_in_flight.py --in-flight 2000 --steps 10

Engine and trainer are simulated (a rollout sleeps for a lognormal time, a step for a fixed one); what is measured is
the client: admission, queue, kept state, logging. The lag is how late a task wakes up that sleeps for 5 ms, over all
steps after the pipeline is filled, and "at steps" within half a second of the end of one. "own" is the part of it in
which this process had the processor; the rest is other programs' or the kernel's. Memory is the resident size after
each step, over the rollouts in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from measuring.heartbeat import Heartbeat
from measuring.machine import machine, versions
from measuring.quantiles import quantile
from measuring.simulated_backend import SimulatedBackend
from rich.console import Console
from rich.table import Table

import art
from art.pipeline_trainer import PipelineTrainer
from art_core import TrajectoryGroup

NEAR_STEP_S = 0.5


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run until `steps` steps are trained with all rollouts in flight."""
    chance, process = random.Random(arguments.seed), psutil.Process()
    rollout_s = arguments.in_flight / arguments.batch * arguments.step_s
    mu = math.log(rollout_s) - arguments.sigma**2 / 2
    flying = most = 0
    resident: list[int] = []

    async def rollout(model: Any, scenario: Any, config: Any) -> TrajectoryGroup:  # noqa: ARG001
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        try:
            await asyncio.sleep(chance.lognormvariate(mu, arguments.sigma))
        finally:
            flying -= 1
        return TrajectoryGroup([art.Trajectory(reward=reward) for reward in (0.0, 1.0)])

    def scenarios() -> Iterator[dict[str, Any]]:
        while True:
            yield {}

    backend: Any = SimulatedBackend(
        folder, 0.8 * arguments.step_s, after_step=lambda: resident.append(process.memory_info().rss)
    )
    model = art.TrainableModel(name="agent", project="flight", base_model="none", report_metrics=["tracker-files"])
    await model.register(backend)
    filling = math.ceil(2 * arguments.in_flight / arguments.batch)
    trainer = PipelineTrainer(
        model,
        backend,
        rollout,
        scenarios(),
        num_rollout_workers=arguments.in_flight,
        min_batch_size=arguments.batch,
        max_batch_size=arguments.batch,
        # Far beyond the longest rollouts: waiting for one is not what is measured here.
        max_steps_off_policy=3 * filling,
        max_steps=filling + arguments.steps,
        log_interval_seconds=3600,
    )
    before, heart = process.memory_info().rss, Heartbeat()
    beating = asyncio.create_task(heart.run())
    try:
        await trainer.train()
    finally:
        beating.cancel()
    spans = backend.spans[filling:]
    beats = [beat for beat in heart.beats if spans[0][0] <= beat[0] <= spans[-1][1]]
    ends = [end for _, end in spans]
    near = [beat for beat in beats if any(abs(beat[0] - end) <= NEAR_STEP_S for end in ends)]
    grown = resident[filling:]
    return {
        "in_flight": most,
        "steps": len(spans),
        "step_s": (ends[-1] - ends[0]) / (len(ends) - 1),
        "groups_per_s": arguments.batch * (len(ends) - 1) / (ends[-1] - ends[0]),
        "lag": lags(beats),
        "lag_at_steps": lags(near),
        "kib_a_rollout_first": (grown[0] - before) / 1024 / most,
        "kib_a_rollout_last": (grown[-1] - before) / 1024 / most,
    }


def lags(beats: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    """p50, p99 and the longest, and the same of the own part, in milliseconds."""
    found: dict[str, float] = {}
    for name, column in (("", 1), ("own_", 2)):
        values = [1000 * beat[column] for beat in beats]
        found |= {f"{name}{share}": quantile(values, q) for share, q in QUANTILES.items()}
    return found


QUANTILES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, default=10_000, help="rollouts at once (default 10,000)")
    parser.add_argument("--steps", type=int, default=30, help="steps that are measured (default 30)")
    parser.add_argument("--batch", type=int, default=500, help="groups in a step (default 500)")
    parser.add_argument("--step-s", type=float, default=2.0, help="seconds that a step should take (default 2)")
    parser.add_argument("--sigma", type=float, default=0.5, help="of the logarithm of a rollout's seconds")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    where = {"machine": machine(), "versions": versions([], ["art-core"])}
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(arguments, Path(folder)))
    if arguments.json:
        print(json.dumps({**where, **found}, indent=1))
        return
    console = Console()
    table = Table("event loop", *(f"{name}, ms" for name in found["lag"]))
    for name in ("lag", "lag_at_steps"):
        table.add_row(name.replace("_", " "), *(f"{value:.1f}" for value in found[name].values()))
    console.print(table)
    console.print(
        f"{found['in_flight']} rollouts in flight, {found['steps']} steps of {arguments.batch} groups in"
        f" {found['step_s']:.2f} s each ({found['groups_per_s']:.0f} groups a second)\n"
        f"memory a rollout: {found['kib_a_rollout_first']:.1f} KiB after the first of them,"
        f" {found['kib_a_rollout_last']:.1f} KiB after the last",
        highlight=False,
    )
    console.print("\n".join(where.values()), highlight=False)


if __name__ == "__main__":
    main()
