"""Teach SmolLM2-135M to answer a shop's customers, by reinforcement learning, on the CPU of this machine or elsewhere.

A good reply says sorry, names the thing that went wrong, is short, and asks the customer back. The reward is the share
of these four that a reply does. Run it with `make demo`, or `python examples/customer_replies.py --help`. With
`--backend serverless` another machine serves and trains, and this one needs only art-core and art-backend-serverless.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import art
from art.pipeline_trainer import PipelineTrainer, make_group_rollout_fn
from art_core import installed_plugins
from art_tracker_files import read_history
from reward_display import PublicationDisplay, plain_console, save_curve, show_next, show_step, shown_path

OPENING: art.Messages = [
    {"role": "system", "content": "You answer customers of a small shop in one short, friendly sentence."},
    {"role": "user", "content": "The pen I bought is dry."},
    {"role": "assistant", "content": "I am sorry about the pen, would you like a new one?"},
]


@dataclass(frozen=True)
class Complaint:
    """A customer's message and the thing it is about."""

    message: str
    thing: str


COMPLAINTS = [
    Complaint("The kettle I bought leaks.", "kettle"),
    Complaint("You sent me the wrong lamp.", "lamp"),
    Complaint("The bicycle bell is broken.", "bell"),
    Complaint("My umbrella came without a handle.", "umbrella"),
    Complaint("The clock I ordered is ten minutes slow.", "clock"),
    Complaint("This teapot has a crack in it.", "teapot"),
    Complaint("The radio makes a strange noise.", "radio"),
    Complaint("My new chair wobbles.", "chair"),
]
HELD_OUT = [
    Complaint("The ladder you delivered is too short.", "ladder"),
    Complaint("My parcel with the mirror never arrived.", "mirror"),
    Complaint("The candles melted on the way.", "candles"),
]


def reward_of(reply: str, complaint: Complaint) -> dict[str, bool]:
    """What a good reply does, each point worth the same."""
    text = reply.strip().lower()
    return {
        "says_sorry": "sorry" in text or "apolog" in text,
        "names_the_thing": complaint.thing in text,
        "is_short": 6 <= len(text.split()) <= 20,
        "asks_back": text.endswith("?"),
    }


async def rollout(model: art.Model, complaint: Complaint) -> art.Trajectory:
    """One attempt at one complaint."""
    trajectory = art.Trajectory(messages_and_choices=[*OPENING, {"role": "user", "content": complaint.message}])
    completion = await model.openai_client().chat.completions.create(
        messages=trajectory.messages(), model=model.get_inference_name(), max_tokens=32
    )
    choice = completion.choices[0]
    trajectory.messages_and_choices.append(choice)
    points = reward_of(choice.message.content or "", complaint)
    trajectory.metrics.update(points)
    trajectory.reward = sum(points.values()) / len(points)
    return trajectory


async def show_samples(console: Console, model: art.Model, title: str) -> float:
    """Print a reply to each complaint that is never trained on; gives their mean reward."""
    group = await art.TrajectoryGroup(rollout(model, complaint) for complaint in HELD_OUT for _ in range(4))
    console.rule(title)
    for complaint, trajectory in zip(HELD_OUT, group.trajectories[::4], strict=True):
        console.print(f"[dim]{complaint.message}[/]", highlight=False)
        reply = (trajectory.messages()[-1].get("content") or "").strip()
        console.print(f"  [bold]{trajectory.reward:.2f}[/]  ", end="", highlight=False)
        console.print(str(reply), markup=False, highlight=False)
    return sum(trajectory.reward for trajectory in group) / len(group)


async def train_in_steps(console: Console, backend: art.Backend, model: art.TrainableModel, options: Namespace) -> None:
    """The plain loop: attempts, then a training step on them, again and again."""
    first_reward = None
    for _ in range(await model.get_step(), options.steps):
        step_start = time.monotonic()
        groups = await art.gather_trajectory_groups(
            (
                art.TrajectoryGroup(rollout(model, complaint) for _ in range(options.samples))
                for complaint in COMPLAINTS
            ),
            pbar_desc="gather",
        )
        reward = sum(trajectory.reward for group in groups for trajectory in group) / sum(map(len, groups))
        result = await backend.train(
            model,
            groups,
            learning_rate=options.learning_rate,
            packed_sequence_length=options.packed_sequence_length,
        )
        await model.log(groups, metrics=result.metrics, step=result.step, split="train")
        first_reward = reward if first_reward is None else first_reward
        show_step(console, result.step, reward, first_reward, time.monotonic() - step_start)


async def train_in_pipeline(backend: art.Backend, model: art.TrainableModel, options: Namespace) -> None:
    """Attempts go on while a step trains; each says by which step it was made."""

    async def attempt(model: art.TrainableModel, scenario: dict[str, Complaint], _: None) -> art.Trajectory:
        return await rollout(model, scenario["complaint"])

    trainer = PipelineTrainer(
        model,
        backend,
        make_group_rollout_fn(attempt, n=options.samples),
        [{"complaint": complaint} for complaint in COMPLAINTS] * options.steps,
        # Steps of half the loop's size: what is attempted meanwhile is then by a policy of half as many attempts ago.
        min_batch_size=len(COMPLAINTS) // 2,
        max_batch_size=len(COMPLAINTS) // 2,
        max_steps_off_policy=1,
        learning_rate=options.learning_rate,
        packed_sequence_length=options.packed_sequence_length,
        eval_every_n_steps=0,
        log_interval_seconds=10,
        total_scenarios=options.steps * len(COMPLAINTS),
    )
    await trainer.train()


def backend_of(arguments: Namespace) -> art.Backend:
    """Where the model is served and trained: all that differs between this machine and another."""
    if arguments.backend == "serverless":
        from art.serverless.backend import ServerlessBackend

        backend: art.Backend = ServerlessBackend(base_url=arguments.base_url)
        return backend
    from art.local import LocalBackend

    backend = LocalBackend(
        in_process=True,
        path=arguments.path,
        inference_engine=arguments.inference_engine,
        training_engine=arguments.training_engine,
        auto_install=arguments.auto_install,
    )
    return backend


async def main(arguments: Namespace) -> None:
    """Everything a training script does: register, gather, train, log, again."""
    console = plain_console()
    start = time.monotonic()
    if arguments.backend == "serverless" and arguments.base_url is None:
        arguments.packed_sequence_length = None  # W&B's cloud packs as it likes
    installed_plugins().register(PublicationDisplay(console), name="publication-display")
    async with backend_of(arguments) as backend:
        model = art.TrainableModel(
            name=arguments.name, project="customer-replies", base_model=arguments.base_model, base_path=arguments.path
        )
        await model.register(backend)
        before = await show_samples(console, model, "before training (complaints that are never trained on)")
        console.rule("training")
        if arguments.pipeline:
            await train_in_pipeline(backend, model, arguments)
        else:
            await train_in_steps(console, backend, model, arguments)
        after = await show_samples(console, model, "after training")
        console.rule()
        console.print(f"mean reward on complaints never trained on: {before:.2f} before, {after:.2f} after")
        folder = Path(arguments.path) / model.project / "models" / model.name
        curve = save_curve(
            read_history(folder / "history.jsonl"), "Customer replies, SmolLM2-135M", folder / "reward.png"
        )
        console.print(f"the curve:  {curve}\neverything: {folder}\n{time.monotonic() - start:.0f} s in all")
        elsewhere = ["--backend", "serverless"] if arguments.backend == "serverless" else []
        elsewhere += ["--base-url", arguments.base_url] if arguments.base_url else []
        here = {
            "a tool over several turns": [str(Path(__file__).with_name("shop_tool.py"))],
            "when something is wrong": ["-m", "art_core", "doctor"],
        }
        show_next(
            console,
            {
                "go on with this model": [
                    __file__, "--name", model.name, "--path", arguments.path, "--steps", str(2 * arguments.steps),
                    *elsewhere,
                ],
                **({} if elsewhere else here),
            },
            f"a task of your own: copy {shown_path(__file__)}, and change COMPLAINTS, rollout and reward_of",
        )  # fmt: skip


def parse_arguments() -> Namespace:
    """Every setting has a default that works on a laptop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=10, help="how often to attempt them all; a second run goes on from the last"
    )
    parser.add_argument("--samples", type=int, default=8, help="attempts at each complaint in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--packed-sequence-length", type=int, default=800, help="tokens in one gradient step; shorter means more steps"
    )
    parser.add_argument("--pipeline", action="store_true", help="go on with attempts while a step trains")
    parser.add_argument("--base-model", default="smollm2-135m-instruct", help="a name, a folder, or a hub name")
    parser.add_argument("--name", default=time.strftime("run-%Y%m%d-%H%M%S"), help="an old name goes on where it ended")
    parser.add_argument("--path", default="./runs", help="where checkpoints, trajectories and logs go")
    parser.add_argument(
        "--backend", choices=["local", "serverless"], default="local", help="this machine, or one elsewhere"
    )
    parser.add_argument(
        "--base-url", help="for serverless: the address of `art serve`, W&B's cloud without; the key is WANDB_API_KEY"
    )
    parser.add_argument("--inference-engine", default="torch", help="torch, vllm, sglang, or another that is installed")
    parser.add_argument("--training-engine", default="torch")
    parser.add_argument(
        "--auto-install",
        action="store_true",
        help="make an engine's own environment when it has none yet, as `art engines install` does (gigabytes, once)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(parse_arguments()))
