"""What rollouts and training at once cost beside the longer of the two, against one after the other.

    python benchmarks/pipeline_overlap.py
    python benchmarks/pipeline_overlap.py --steps 40 --sigma 1.0
    python benchmarks/pipeline_overlap.py --without-peers

Engine and trainer are simulated: a rollout sleeps for a lognormal time, a step for a fixed one, and as many rollouts
run at once as there are workers. What is measured is the client: admission, queue, kept state, logging. A step takes
max(generate, train) seconds if nothing were ever waited for, where generate is the batch times the mean rollout over
the number of workers. Steps before the pipeline is filled (`--warm`) are left out. openpipe-art's PipelineTrainer does
the same in an environment of its own, which is made at the first run (with torch, which its trainer imports); its
newest release needs a Python 3.12 on the PATH.

A step waits for a rollout that would be too old after it, so rollouts that often take longer than `--off-policy` steps
(a larger `--sigma`, more workers than a batch has groups) cost more than the limit that the ratio is taken of.

    ratio         seconds of a step over max(generate, train)
    trainer idle  share of the time in which no step trains
    stale         share of the groups that were discarded as too old
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

from measuring.machine import machine, versions
from measuring.peer_environment import OPENPIPE, peer_python, run_peer
from measuring.simulated_backend import SimulatedBackend
from rich.console import Console
from rich.table import Table

import art
from art.pipeline_trainer import PipelineTrainer
from art_core import TrajectoryGroup
from art_core.history import HISTORY, read_history


async def measure(arguments: argparse.Namespace, *, train_s: float, pipeline: bool) -> dict[str, Any]:
    """One run of `steps` steps."""
    chance, batch, workers = random.Random(arguments.seed), arguments.batch, arguments.workers
    mu = math.log(arguments.rollout_s) - arguments.sigma**2 / 2
    slept: list[float] = []

    async def rollout(model: Any, scenario: Any, config: Any) -> TrajectoryGroup:  # noqa: ARG001
        slept.append(chance.lognormvariate(mu, arguments.sigma))
        await asyncio.sleep(slept[-1])
        return TrajectoryGroup([art.Trajectory(reward=reward) for reward in (0.0, 1.0)])

    def scenarios() -> Iterator[dict[str, Any]]:
        while True:
            yield {}

    with tempfile.TemporaryDirectory() as folder:
        backend: Any = SimulatedBackend(Path(folder), train_s)
        # As the peer: files, and no other tracker that happens to be installed.
        model = art.TrainableModel(name="agent", project="overlap", base_model="none", report_metrics=["tracker-files"])
        await model.register(backend)
        stale = 0
        if pipeline:
            trainer = PipelineTrainer(
                model, backend, rollout, scenarios(), num_rollout_workers=workers, min_batch_size=batch,
                max_batch_size=batch, max_steps_off_policy=arguments.off_policy, max_steps=arguments.steps,
                log_interval_seconds=3600,
            )  # fmt: skip
            await trainer.train()
            rows = read_history(Path(folder) / "overlap" / "models" / "agent" / HISTORY)
            stale = int(rows[-1]["train/discarded_stale_groups"])
        else:
            places = asyncio.Semaphore(workers)

            async def one() -> TrajectoryGroup:
                async with places:
                    return await rollout(model, {}, None)

            for _ in range(arguments.steps):
                groups = await asyncio.gather(*(one() for _ in range(batch)))
                result = await backend.train(model, groups)
                await model.log(groups, metrics=result.metrics, step=result.step, split="train")
    return figures(arguments, backend.spans, backend.sizes, slept, stale=stale, train_s=train_s)


def measure_peer(arguments: argparse.Namespace, *, train_s: float) -> dict[str, Any]:
    """The same run by openpipe-art's PipelineTrainer, and its version."""
    found = run_peer(OPENPIPE, "openpipe_pipeline.py", {**vars(arguments), "train_s": train_s})
    row = figures(arguments, found["spans"], found["sizes"], found["slept"], stale=found["stale"], train_s=train_s)
    return {"version": found["version"], **row}


def figures(
    arguments: argparse.Namespace,
    all_spans: Sequence[Sequence[float]],
    sizes: Sequence[int],
    slept: Sequence[float],
    *,
    stale: int,
    train_s: float,
) -> dict[str, Any]:
    """Of the steps after the first `warm`, from the end of one to the end of the last."""
    spans = all_spans[arguments.warm :]
    wall_s = spans[-1][1] - all_spans[arguments.warm - 1][1]
    generate_s = arguments.batch * sum(slept) / len(slept) / arguments.workers
    step_s = wall_s / len(spans)
    return {
        "generate_s": generate_s,
        "train_s": train_s,
        "step_s": step_s,
        "ratio": step_s / max(generate_s, train_s),
        "trainer_idle": 1 - sum(end - begin for begin, end in spans) / wall_s,
        "stale": stale / (sum(sizes) + stale),
    }


async def main(arguments: argparse.Namespace) -> None:
    """The pipeline and the plain loop, with a trainer that is the longer part and with one that is as long."""
    where = {"machine": machine(), "versions": versions([], ["art-core"])}
    rows: list[dict[str, Any]] = []
    generate_s = arguments.batch * arguments.rollout_s / arguments.workers
    if not arguments.without_peers:
        peer_python(OPENPIPE)  # made before anything is measured
    for share in (1.25, 1.0, 0.5):
        for pipeline in (True, False):
            row = await measure(arguments, train_s=share * generate_s, pipeline=pipeline)
            rows.append({"loop": "pipeline" if pipeline else "plain", "train_to_generate": share, **row})
        if not arguments.without_peers:
            row = await asyncio.to_thread(measure_peer, arguments, train_s=share * generate_s)
            rows.append({"loop": f"openpipe-art {row.pop('version')}", "train_to_generate": share, **row})
    if arguments.json:
        print(json.dumps({**where, "results": rows}, indent=1))
        return
    table = Table("loop", "train / generate", "step, s", "ratio", "trainer idle", "stale")
    for row in rows:
        table.add_row(
            row["loop"], f"{row['train_to_generate']:g}", f"{row['step_s']:.3f}", f"{row['ratio']:.3f}",
            f"{row['trainer_idle']:.1%}", f"{row['stale']:.1%}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print("\n".join(where.values()), highlight=False)


def parse_arguments() -> argparse.Namespace:
    """Three minutes at the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm", type=int, default=6, help="first steps that are not counted")
    parser.add_argument("--batch", type=int, default=16, help="groups in a step")
    parser.add_argument("--workers", type=int, default=16, help="rollouts at once")
    parser.add_argument("--rollout-s", type=float, default=0.5, help="the mean of a rollout's seconds")
    parser.add_argument("--sigma", type=float, default=0.5, help="of the logarithm of a rollout's seconds")
    parser.add_argument("--off-policy", type=int, default=4)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--without-peers", action="store_true", help="make no environment for openpipe-art")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not 1 <= arguments.warm < arguments.steps:
        parser.error(f"--warm {arguments.warm}: at least 1, and fewer than the {arguments.steps} of --steps")
    return arguments


if __name__ == "__main__":
    asyncio.run(main(parse_arguments()))
