"""A pipeline in a process of its own, to be killed: `python pipeline_process.py FOLDER COUNT TRAIN_SECONDS`.

Its backend keeps each batch as a line of `batches`, and the number of lines is its step: as a checkpoint, a line is
there or not. A line of `rollouts` is written for each rollout that begins.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import art
from art.pipeline_trainer import PipelineTrainer
from conftest import SimulatedBackend


class OnDisk(SimulatedBackend):
    async def train(self, model, trajectory_groups, **options):
        result = await super().train(model, trajectory_groups, **options)
        append(self.path / "batches", self.batches[-1][1])
        return result


def append(path, value):
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


async def main(folder: Path, count: int, train_s: float) -> None:
    lines = (folder / "batches").read_text().splitlines() if (folder / "batches").exists() else []
    backend = OnDisk(folder, step=len(lines), train_s=train_s)
    model = art.TrainableModel(name="agent", project="task", base_model="some-base")
    await model.register(backend)

    async def rollout(model, scenario, config):
        append(folder / "rollouts", scenario["metadata"]["scenario_id"])
        await asyncio.sleep(0.01)
        return art.TrajectoryGroup([art.Trajectory(reward=reward) for reward in (0.0, 1.0)])

    scenarios = [{"metadata": {"scenario_id": number}} for number in range(count)]
    await PipelineTrainer(
        model, backend, rollout, scenarios, min_batch_size=2, max_batch_size=4, num_rollout_workers=4
    ).train()
    print("done", os.getpid(), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
