"""Teach SmolLM2-135M to use a tool over several turns: look a price up, read the answer, tell the customer.

Each attempt is a conversation: the model calls `price_of`, the shop answers, and the model replies. The reward is a
quarter for a call that can be parsed, a quarter for the right thing in it, and a half for the right price in the reply.
Run it with `python examples/shop_tool.py --help`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import art
from art.local import LocalBackend
from art_core import installed_plugins
from art_tracker_files import read_history
from reward_display import PublicationDisplay, plain_console, save_curve, show_step

PRICES = {"kettle": 17, "lamp": 24, "chair": 58, "mirror": 31, "clock": 19, "teapot": 12, "radio": 46, "ladder": 65}
QUESTIONS = ["How much is a {}?", "What does the {} cost?"]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "price_of",
            "description": "The price of a thing in the shop, in euros.",
            "parameters": {"type": "object", "properties": {"thing": {"type": "string"}}, "required": ["thing"]},
        },
    }
]


def worked_example(question: str, thing: str, price: int) -> list[dict[str, Any]]:
    """A conversation that shows a small model what a call looks like."""
    call = {
        "id": f"example_{thing}",
        "type": "function",
        "function": {"name": "price_of", "arguments": json.dumps({"thing": thing})},
    }
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"price": price})},
        {"role": "assistant", "content": f"The {thing} costs {price} euros."},
    ]


OPENING: list[dict[str, Any]] = [
    {"role": "system", "content": "You work in a shop. Look prices up with the tool price_of, then answer."},
    *worked_example("How much is a spoon?", "spoon", 3),
    *worked_example("What does the bowl cost?", "bowl", 9),
    *worked_example("How much is a candle?", "candle", 5),
]


def look_up(arguments: str) -> tuple[str, str]:
    """Run the tool. Gives its answer and the thing that was asked for, empty when the call made no sense."""
    try:
        thing = str(json.loads(arguments)["thing"]).strip().lower()
    except (json.JSONDecodeError, KeyError, TypeError):
        return json.dumps({"error": 'call it with {"thing": NAME}'}), ""
    price = PRICES.get(thing)
    return json.dumps({"price": price} if price is not None else {"error": f"there is no {thing} here"}), thing


async def rollout(model: art.Model, thing: str, question: str) -> art.Trajectory:
    """One conversation of at most three turns of the model."""
    client = model.openai_client()
    trajectory = art.Trajectory(
        messages_and_choices=[*OPENING, {"role": "user", "content": question.format(thing)}], tools=TOOLS
    )
    called, asked_right, told_right = False, False, False
    for _ in range(3):
        completion = await client.chat.completions.create(
            messages=trajectory.messages(), model=model.get_inference_name(), tools=TOOLS, max_tokens=40
        )
        choice = completion.choices[0]
        trajectory.messages_and_choices.append(choice)
        if not choice.message.tool_calls:
            told_right = asked_right and str(PRICES[thing]) in (choice.message.content or "")
            break
        for call in choice.message.tool_calls:
            answer, asked = look_up(call.function.arguments)
            called = called or bool(asked)
            asked_right = asked_right or asked == thing
            trajectory.messages_and_choices.append({"role": "tool", "tool_call_id": call.id, "content": answer})
    trajectory.reward = 0.25 * called + 0.25 * asked_right + 0.5 * told_right
    trajectory.metrics.update(called=called, asked_right=asked_right, told_right=told_right)
    return trajectory


def show_conversation(console: Console, trajectory: art.Trajectory) -> None:
    """Print what was said after the worked examples."""
    for message in trajectory.messages()[len(OPENING) :]:
        said = [str(message.get("content") or "").strip()]
        said += [
            f"calls {call['function']['name']}({call['function']['arguments']})"
            for call in message.get("tool_calls") or ()
        ]
        console.print(f"  {message['role']:>9}: {' '.join(filter(None, said))}", markup=False, highlight=False)
    console.print(f"  reward {trajectory.reward:.2f}\n", highlight=False)


async def main(arguments: argparse.Namespace) -> None:
    """Register, gather, train, log, again; with a conversation shown before and after."""
    console = plain_console()
    installed_plugins().register(PublicationDisplay(console), name="publication-display")
    async with LocalBackend(in_process=True, path=arguments.path) as backend:
        model = art.TrainableModel(
            name=arguments.name, project="shop-tool", base_model=arguments.base_model, base_path=arguments.path
        )
        await model.register(backend)
        console.rule("before training")
        show_conversation(console, await rollout(model, "mirror", QUESTIONS[0]))
        first_reward = None
        for step in range(await model.get_step(), arguments.steps):
            start = time.monotonic()
            groups = await art.gather_trajectory_groups(
                (
                    art.TrajectoryGroup(
                        rollout(model, thing, QUESTIONS[(step + i) % len(QUESTIONS)]) for _ in range(arguments.samples)
                    )
                    for i, thing in enumerate(PRICES)
                ),
                pbar_desc="gather",
            )
            reward = sum(trajectory.reward for group in groups for trajectory in group) / sum(map(len, groups))
            result = await backend.train(
                model,
                groups,
                learning_rate=arguments.learning_rate,
                packed_sequence_length=arguments.packed_sequence_length,
            )
            await model.log(groups, metrics=result.metrics, step=result.step, split="train")
            first_reward = reward if first_reward is None else first_reward
            show_step(console, result.step, reward, first_reward, time.monotonic() - start)
        console.rule("after training")
        show_conversation(console, await rollout(model, "mirror", QUESTIONS[1]))
        folder = Path(arguments.path) / model.project / "models" / model.name
        curve = save_curve(
            read_history(folder / "history.jsonl"),
            "Looking a price up with a tool, SmolLM2-135M",
            folder / "reward.png",
        )
        console.print(f"the curve:  {curve}\neverything: {folder}")


def parse_arguments() -> argparse.Namespace:
    """Every setting has a default that works on a laptop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=6, help="training steps in all; a second run goes on from the last"
    )
    parser.add_argument("--samples", type=int, default=8, help="attempts at each question in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--packed-sequence-length", type=int, default=1600, help="tokens in one gradient step; shorter means more steps"
    )
    parser.add_argument("--base-model", default="smollm2-135m-instruct", help="a name, a folder, or a hub name")
    parser.add_argument("--name", default=time.strftime("run-%Y%m%d-%H%M%S"), help="an old name goes on where it ended")
    parser.add_argument("--path", default="./runs", help="where checkpoints, trajectories and logs go")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(parse_arguments()))
