"""Train on an environment of the package verifiers: the shop of customer_replies.py, written as a taskset.

Nothing of it knows ART: tasks with a prompt and rewards, and a program that asks the model. ART runs it as it is. Needs
`pip install 'art-core[verifiers]'`; run it with `python examples/verifiers_replies.py --help`.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI
from verifiers.v1.dialects.chat import message_to_wire

import art
from art.environments.verifiers import VerifiersEnvironment
from art.local import LocalBackend
from art.pipeline_trainer import PipelineTrainer, make_group_rollout_fn
from customer_replies import COMPLAINTS, HELD_OUT, OPENING, Complaint, reward_of


class ShopData(vf.TaskData):
    """A complaint, with the thing that a good reply names."""

    thing: str
    held_out: bool = False


class ShopTask(vf.Task[ShopData, vf.State, vf.TaskConfig]):
    """A good reply says sorry, names the thing, is short and asks back; each is worth a quarter."""

    def points(self, trace: vf.Trace) -> dict[str, bool]:
        return reward_of(trace.last_reply, Complaint("", self.data.thing))

    @vf.reward
    async def good_reply(self, trace: vf.Trace) -> float:
        points = self.points(trace)
        return sum(points.values()) / len(points)

    @vf.metric
    async def does(self, trace: vf.Trace) -> dict[str, float]:
        return {name: float(done) for name, done in self.points(trace).items()}


class Shop(vf.Taskset[ShopTask, vf.TasksetConfig]):
    """The complaints to train on, and after them those that are held out."""

    def load(self) -> Iterator[ShopTask]:
        opening = [dict(message) for message in OPENING]
        for complaint in (*COMPLAINTS, *HELD_OUT):
            prompt = [*opening, {"role": "user", "content": complaint.message}]
            data = ShopData.model_validate({
                "name": complaint.thing, "prompt": prompt, "thing": complaint.thing, "held_out": complaint in HELD_OUT,
            })  # fmt: skip
            yield ShopTask(data, self.config.task)


class AskOnce(vf.Harness[vf.HarnessConfig]):
    """Asks the model once, from this process; verifiers' own programs are processes, which take a second to start."""

    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, _trace: Any, _runtime: Any, endpoint: str, secret: str, _tools: Any, data: Any
    ) -> vf.ProgramResult:
        async with AsyncOpenAI(base_url=endpoint, api_key=secret) as client:
            messages: Any = [message_to_wire(message) for message in data.prompt]
            await client.chat.completions.create(model=ctx.model, messages=messages)
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["AskOnce", "Shop"]


async def main(arguments: argparse.Namespace) -> None:
    """What any training script does, with the environment's scenarios and rollouts in place of its own."""
    config = {"taskset": {"id": "verifiers_replies"}, "agent": {"runtime": {"type": "subprocess"}}}
    async with (
        VerifiersEnvironment(config, sampling={"max_tokens": 32}) as environment,
        LocalBackend(in_process=True, path=arguments.path) as backend,
    ):
        model = art.TrainableModel(name=arguments.name, project="verifiers-replies", base_model="smollm2-135m-instruct")
        await model.register(backend)
        scenarios = list(environment.scenarios())
        trained = [scenario for scenario in scenarios if not scenario["task"].data.held_out]
        held_out = [scenario for scenario in scenarios if scenario["task"].data.held_out]
        before = await mean_reward(environment, model, held_out)
        options: dict[str, Any] = {"learning_rate": 1e-3, "packed_sequence_length": 800}
        if arguments.pipeline:
            trainer = PipelineTrainer(
                model,
                backend,
                make_group_rollout_fn(environment.rollout, n=arguments.samples),
                trained * arguments.steps,
                min_batch_size=len(trained),
                max_batch_size=len(trained),
                max_steps_off_policy=1,
                eval_every_n_steps=0,
                log_interval_seconds=10,
                **options,
            )
            await trainer.train()
        for _ in range(await model.get_step(), 0 if arguments.pipeline else arguments.steps):
            start = time.monotonic()
            groups = await art.gather_trajectory_groups(
                art.TrajectoryGroup(environment.rollout(model, scenario) for _ in range(arguments.samples))
                for scenario in trained
            )
            result = await backend.train(model, groups, **options)
            await model.log(groups, metrics=result.metrics, step=result.step, split="train")
            reward = sum(trajectory.reward for group in groups for trajectory in group) / sum(map(len, groups))
            print(f"step {result.step}: mean reward {reward:.2f}, {time.monotonic() - start:.0f} s", flush=True)
        after = await mean_reward(environment, model, held_out)
        print(f"mean reward on complaints never trained on: {before:.2f} before, {after:.2f} after")
        print(f"everything: {Path(arguments.path) / model.project / 'models' / model.name}")


async def mean_reward(environment: VerifiersEnvironment, model: art.Model, scenarios: list[dict[str, Any]]) -> float:
    """Of four attempts at each scenario."""
    group = await art.TrajectoryGroup(environment.rollout(model, each) for each in scenarios for _ in range(4))
    return sum(trajectory.reward for trajectory in group) / len(group)


def parse_arguments() -> argparse.Namespace:
    """Every setting has a default that works on a laptop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="how often to attempt all complaints")
    parser.add_argument("--samples", type=int, default=8, help="attempts at each complaint in a step")
    parser.add_argument("--pipeline", action="store_true", help="go on with attempts while a step trains")
    parser.add_argument("--name", default=time.strftime("run-%Y%m%d-%H%M%S"), help="an old name goes on where it ended")
    parser.add_argument("--path", default="./runs", help="where checkpoints, trajectories and logs go")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(parse_arguments()))
