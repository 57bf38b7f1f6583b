"""Whether rollouts that outlast many steps are answered by the step they hold, while old steps are deleted.

    python benchmarks/pipeline_leases.py
    python benchmarks/pipeline_leases.py --engine vllm --steps 50 --longest 10

A PipelineTrainer trains a tiny random model through LocalBackend, on a CPU. Every other rollout lasts for 1 to
`--longest` steps and asks again and again meanwhile; after each step every checkpoint that nobody holds is deleted.
What each answer is held against, afterwards: the step that its rollout holds, and the weights of that step, by
transformers and PEFT in fp32 on a copy of its folder (the oracle of the conformance suites). Exits with 1 when a
rollout failed, a step other than the one held answered, or an answer's logprobs are those of other weights.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from measuring.machine import machine, versions
from measuring.traffic_benchmark import serving_one_model
from rich.console import Console

import art
from art.pipeline_trainer import PipelineTrainer, keep_recent_and_top, make_group_rollout_fn
from art_conformance.oracle import Oracle
from art_core import CheckpointRef, hookimpl, installed_plugins

JSON = dict[str, Any]
LEARNING_RATE = 1e-2
# Beyond the noise of fp32 on other kernels, and far below what a step of this rate changes.
SAME_WEIGHTS = 1e-3
# A rollout that would wait for a step which waits for it.
LONGEST_S = 60.0
ASK_EVERY_S = 0.5


@dataclass
class Checkpoints:
    """A plugin: the latest step that is served, a copy of each adapter by its step, and how many were deleted."""

    copies: Path
    published: int = 0
    deleted: int = 0
    art_api: int = 1

    @hookimpl
    def art_checkpoint_saved(self, checkpoint: CheckpointRef) -> None:
        """Kept for the oracle."""
        self.keep(checkpoint.step, checkpoint.path)

    @hookimpl
    def art_checkpoint_published(self, checkpoint: CheckpointRef) -> None:
        """Rollouts that wait for it go on."""
        self.published = checkpoint.step

    @hookimpl
    def art_checkpoint_deleted(self) -> None:
        """Its folder is gone."""
        self.deleted += 1

    def keep(self, step: int, folder: Path) -> None:
        """Copy what PEFT reads."""
        copy = self.folder(step)
        copy.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(folder / name, copy / name)

    def folder(self, step: int) -> Path:
        """Where the adapter of a step is."""
        return self.copies / str(step)


@dataclass
class Rollouts:
    """The rollouts and every answer they got, as (name held, step told, choice)."""

    checkpoints: Checkpoints
    tokens: int
    answers: list[tuple[str, int, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    lasted: list[int] = field(default_factory=list)

    async def attempt(self, model: art.TrainableModel, scenario: JSON, _: object) -> art.Trajectory:
        """One rollout, whose error is noted."""
        try:
            return await self._last(model, scenario)
        except Exception as error:
            self.failed.append(f"{model.get_inference_name()}: {error!r}")
            raise

    async def _last(self, model: art.TrainableModel, scenario: JSON) -> art.Trajectory:
        """Ask until as many steps were published as the scenario says; the last answer is what is trained on."""
        held, began = model.get_inference_name(), time.monotonic()
        first = int(held.rpartition("@")[2])
        messages: art.Messages = [{"role": "user", "content": f"Say number {scenario['number']}."}]
        while True:
            completion = await model.openai_client().chat.completions.create(
                messages=messages, model=model.name, max_tokens=self.tokens
            )
            choice: Any = completion.choices[0]
            self.answers.append((held, choice.policy_version, choice))
            passed = self.checkpoints.published - first
            if passed >= scenario["steps"] or time.monotonic() - began > LONGEST_S:
                self.lasted.append(passed)
                ids = choice.token_ids
                return art.Trajectory(messages_and_choices=[*messages, choice], reward=float(sum(ids) % 7 + len(ids)))
            await asyncio.sleep(ASK_EVERY_S)


def scenarios(longest: int) -> Iterator[JSON]:
    """Without end: every other one lasts for some steps, those between for none, so that there is always something to
    train on.
    """
    return ({"number": number, "steps": 1 + number // 2 % longest if number % 2 else 0} for number in itertools.count())


def other_weights(rollouts: Rollouts, oracle: Oracle, last: int) -> tuple[list[str], JSON]:
    """Answers whose logprobs aren't those of the step they name; and how far from the oracle the answers are, and how
    far from it they would be by the weights of a step beside theirs, in nats a token.
    """
    wrong, own, beside = [], [], []
    for held, step, choice in rollouts.answers:
        said = [token.logprob for token in choice.logprobs.content]

        def off(of: int, choice: Any = choice, said: list[float] = said) -> float:
            folder = rollouts.checkpoints.folder(of)
            true = oracle.logprobs(choice.prompt_token_ids, choice.token_ids, folder)
            return fmean(abs(a - b) for a, b in zip(said, true.tolist(), strict=True))

        own.append(off(step))
        beside.append(min(off(of) for of in (step - 1, step + 1) if 0 <= of <= last))
        if own[-1] > SAME_WEIGHTS:
            wrong.append(f"{held}: {own[-1]:.3f} nats from step {step}")
    told_apart = fmean(other > SAME_WEIGHTS for other in beside)
    return wrong, {"own": max(own), "beside": sorted(beside)[len(beside) // 2], "told_apart": told_apart}


async def measure(arguments: argparse.Namespace, folder: Path, console: Console) -> JSON:
    """Run the pipeline, and judge its answers."""
    checkpoints = Checkpoints(folder / "copies")
    installed_plugins().register(checkpoints, name="pipeline-leases")
    rollouts = Rollouts(checkpoints, arguments.tokens)
    began = time.monotonic()
    serving = serving_one_model(arguments, folder, console, training_engine="torch", max_adapters=arguments.longest + 4)
    async with serving as (backend, model, _):
        checkpoints.keep(0, Path(await backend.pull_checkpoint(model, step=0)))
        trainer = PipelineTrainer(
            model,
            backend,
            make_group_rollout_fn(rollouts.attempt, 2),
            scenarios(arguments.longest),
            num_rollout_workers=arguments.workers,
            min_batch_size=2,
            max_batch_size=2,
            max_steps_off_policy=arguments.longest + 1,
            learning_rate=LEARNING_RATE,
            max_steps=arguments.steps,
            checkpoint_retention_strategy=keep_recent_and_top(recent=1, top=0),
        )
        await trainer.train()
        last = await model.get_step()
    seconds = time.monotonic() - began
    mislabelled = [f"{held}: step {step} answers" for held, step, _ in rollouts.answers if held != f"agent@{step}"]
    wrong, distances = await asyncio.to_thread(other_weights, rollouts, Oracle(Path(model.base_model)), last)
    return {
        "engine": arguments.engine,
        "seconds": seconds,
        "steps": last,
        "steps_deleted": checkpoints.deleted,
        "rollouts": len(rollouts.lasted),
        "rollouts_lasted_steps": {str(n): rollouts.lasted.count(n) for n in sorted(set(rollouts.lasted))},
        "answers": len(rollouts.answers),
        "steps_that_answered": len({step for _, step, _ in rollouts.answers}),
        "nats_from_oracle": distances,
        "failed": rollouts.failed,
        "mislabelled": mislabelled,
        "other_weights": wrong,
    }


def show(result: JSON, out: Console) -> None:
    """The verdict."""
    apart, problems = result["nats_from_oracle"], [*result["failed"], *result["mislabelled"], *result["other_weights"]]
    lasted = ", ".join(f"{steps}: {count}" for steps, count in result["rollouts_lasted_steps"].items())
    out.print(
        f"{result['engine']}: {result['steps']} steps in {result['seconds']:.0f} s, {result['steps_deleted']} of them"
        f" deleted meanwhile\n{result['rollouts']} rollouts, by the steps they lasted: {lasted}\n"
        f"{result['answers']} answers of {result['steps_that_answered']} steps: {len(result['failed'])} failed,"
        f" {len(result['mislabelled'])} of another step than the one held, {len(result['other_weights'])} of other"
        f" weights\nat most {apart['own']:.1e} nats a token from the oracle; {apart['told_apart']:.0%} of them can be"
        f" told from the steps beside theirs, which are {apart['beside']:.2g} nats away (median)",
        highlight=False,
    )
    for problem in problems[:10]:
        out.print(f"  {problem}", highlight=False, markup=False)


def main() -> None:
    """Run, print, and exit with 1 when an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="torch", help="an installed inference engine (default torch)")
    parser.add_argument("--steps", type=int, default=50, help="steps to train (default 50)")
    parser.add_argument("--longest", type=int, default=10, help="steps that the longest rollouts last (default 10)")
    parser.add_argument("--workers", type=int, default=12, help="groups that are gathered at once (default 12)")
    parser.add_argument("--tokens", type=int, default=8, help="max_tokens of each answer (default 8)")
    parser.add_argument("--auto-install", action="store_true", help="make the engine's environment if it isn't there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(tiny=True, dtype="float32")
    arguments = parser.parse_args()
    described = {"machine": machine(), "versions": versions([arguments.engine], ["art-backend-local", "peft"])}
    with TemporaryDirectory() as folder:
        result = asyncio.run(measure(arguments, Path(folder), Console(stderr=True)))
    if arguments.json:
        print(json.dumps({**described, **result}, indent=1))
    else:
        out = Console(width=110)
        out.print(f"{described['machine']}\n{described['versions']}", highlight=False)
        show(result, out)
    sys.exit(1 if result["failed"] or result["mislabelled"] or result["other_weights"] else 0)


if __name__ == "__main__":
    main()
