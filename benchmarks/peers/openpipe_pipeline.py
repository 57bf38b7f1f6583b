"""openpipe-art's PipelineTrainer on the simulated engine and trainer of pipeline_overlap.py.

Runs in an environment that has openpipe-art and nothing of ours, with that benchmark's settings as JSON on its standard
input; prints one JSON object: when each step began and ended, of how many groups it was, how long each rollout slept,
and how many groups were discarded. Knows openpipe-art's public calls, and the private names that its backends must
have.
"""

import asyncio
import json
import math
import random
import sys
import tempfile
import time
from contextlib import asynccontextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path

from art.pipeline_tuner import PipelineRuntimeConfig
from art.types import LocalTrainResult

import art
from art.pipeline_trainer import PipelineTrainer


class SimulatedBackend:
    """Trains by sleeping."""

    def __init__(self, path, train_s):
        self.path, self.train_s, self.step = path, train_s, 0
        self.spans, self.sizes = [], []

    async def register(self, model):
        model.base_path = str(self.path)

    async def close(self):
        pass

    def _model_inference_name(self, model, step=None):
        return f"{model.name}@{self.step if step is None else step}"

    async def _get_step(self, model):
        return self.step

    async def _delete_checkpoint_files(self, model, steps_to_keep):
        pass

    async def _prepare_backend_for_training(self, model, config=None):
        return "http://127.0.0.1:9/v1", "none"

    @asynccontextmanager
    async def exact_adapter_lease(self, model, step):
        yield

    async def train(self, model, groups, **options):
        began = time.monotonic()
        await asyncio.sleep(self.train_s)
        self.spans.append((began, time.monotonic()))
        self.sizes.append(len(list(groups)))
        self.step += 1
        return LocalTrainResult(step=self.step)


async def run(given, folder):
    """As many steps as were asked for."""
    chance = random.Random(given["seed"])
    mu = math.log(given["rollout_s"]) - given["sigma"] ** 2 / 2
    slept = []

    async def rollout(model, scenario, config):
        slept.append(chance.lognormvariate(mu, given["sigma"]))
        await asyncio.sleep(slept[-1])
        messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
        # It refuses to train what has no such metric.
        metrics = {"completion_tokens": 1}
        return art.TrajectoryGroup(
            [art.Trajectory(messages_and_choices=messages, reward=reward, metrics=metrics) for reward in (0.0, 1.0)]
        )

    def scenarios():
        while True:
            yield {}

    backend = SimulatedBackend(Path(folder), given["train_s"])
    model = art.TrainableModel(
        name="agent", project="overlap", run_name="agent", base_model="none", base_path=folder, report_metrics=[]
    )
    await model.register(backend)
    trainer = PipelineTrainer(
        model,
        backend,
        rollout,
        scenarios(),
        None,
        pipeline=PipelineRuntimeConfig(
            num_rollout_workers=given["workers"], min_batch_size=given["batch"], max_batch_size=given["batch"]
        ),
        max_steps_off_policy=given["off_policy"],
        max_steps=given["steps"],
        log_interval_seconds=3600,
        eval_every_n_steps=0,
    )
    await trainer.train()
    return {
        "spans": backend.spans,
        "sizes": backend.sizes,
        "slept": slept,
        "stale": trainer.state.discarded_stale_groups,
        "version": version("openpipe-art"),
    }


if __name__ == "__main__":
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(json.load(sys.stdin), folder))
    print(json.dumps(found))
