"""Kills a training run with SIGKILL at random moments and checks that it goes on as if nothing had happened.

    python kill_at_random.py BASE_MODEL_FOLDER WORK_FOLDER [--kills 20] [--steps 30] [--seed 0]

A run without kills comes first. Every step trains on trajectories that depend on its number only, so the loss of a
step is a function of the weights and of the optimizer's state: it must be the same in both runs. What is killed is, in
turn, the client alone, the client with all processes below it, and the host alone. Prints what it did; exit status 1
when a loss differs or a step is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

TARGETS = ("client", "everything", "host")


def groups_of(step: int) -> list[Any]:
    """Trajectories that depend on the step's number only."""
    from art_core import Trajectory, TrajectoryGroup

    rng = random.Random(step)

    def trajectory() -> Trajectory:
        ids = [rng.randrange(3, 98) for _ in range(12)]
        logprobs = [{"token": "x", "logprob": -4.5 - rng.random() / 10, "bytes": None, "top_logprobs": []} for _ in ids]
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "x"},
            "logprobs": {"content": logprobs, "refusal": None},
            "token_ids": ids,
            "prompt_token_ids": [1, 40 + step % 20, 41],
            "policy_version": step - 1,
        }
        return Trajectory(messages_and_choices=[{"role": "user", "content": "x"}, choice], reward=rng.random())

    return [TrajectoryGroup([trajectory() for _ in range(4)]) for _ in range(2)]


async def client(base: str, path: str, steps: int) -> None:
    """Train up to `steps` and print each step's loss."""
    from art_backend_local import LocalBackend

    model = SimpleNamespace(name="m", project="p", entity=None, base_model=base, internal_config={})
    engine = "torch"
    async with LocalBackend(
        path=path, in_process=True, inference_engine=engine, training_engine=engine, show_progress=False
    ) as backend:
        await backend.register(model)
        print(json.dumps({"begins_at": await backend.get_step(model)}), flush=True)
        while (step := await backend.get_step(model)) < steps:
            result = await backend.train(model, groups_of(step + 1), learning_rate=1e-3)
            print(json.dumps({"step": result.step, "loss": result.metrics["loss/train"]}), flush=True)


class Run:
    """One run of the client and what it has said so far."""

    def __init__(self, base: Path, path: Path, steps: int) -> None:
        arguments = [sys.executable, __file__, str(base), str(path), "--steps", str(steps), "--client"]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self._lines = iter(self.process.stdout)

    def until(self, key: str) -> dict[str, Any]:
        """Read on until a line has this key."""
        for line in self._lines:
            said = json.loads(line)
            if key in said:
                return dict(said)
        raise RuntimeError(f"the client ended with {self.process.wait()} before it said {key}")

    def rest(self) -> list[dict[str, Any]]:
        """Everything else that it says until its end."""
        return [json.loads(line) for line in self._lines if line.endswith("}\n")]

    def kill(self, target: str, path: Path) -> None:
        """SIGKILL."""
        if target == "host":
            # The client then fails; what it says of that is not of interest.
            os.kill(json.loads((path / "host.json").read_text())["pid"], signal.SIGKILL)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
            return
        below = psutil.Process(self.process.pid).children(recursive=True) if target == "everything" else []
        self.process.kill()
        for process in below:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def undisturbed(base: Path, path: Path, steps: int) -> tuple[dict[int, float], float]:
    """The losses of a run that nobody kills, and how long a step takes."""
    run = Run(base, path, steps)
    run.until("begins_at")
    began = time.monotonic()
    losses = {said["step"]: said["loss"] for said in run.rest()}
    if run.process.wait() or set(losses) != set(range(1, steps + 1)):
        raise SystemExit(f"the undisturbed run failed at {sorted(losses)}")
    return losses, (time.monotonic() - began) / steps


def compare(expected: dict[int, float], found: dict[int, float]) -> float:
    """The largest difference of the losses that were heard of."""
    return max((abs(found[step] - expected[step]) for step in found), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--client", action="store_true")
    arguments = parser.parse_args()
    if arguments.client:
        asyncio.run(client(str(arguments.base), str(arguments.work), arguments.steps))
        return
    shutil.rmtree(arguments.work, ignore_errors=True)
    rng = random.Random(arguments.seed)
    # Enough steps that no run ends by itself before it is killed.
    steps = arguments.steps or 6 * arguments.kills
    expected, step_s = undisturbed(arguments.base, arguments.work / "undisturbed", steps)
    print(f"undisturbed: {steps} steps of {step_s:.3f} s")
    path = arguments.work / "killed"
    found: dict[int, float] = {}
    resumed: list[int] = []
    for kill in range(arguments.kills):
        run = Run(arguments.base, path, steps)
        begins_at = run.until("begins_at")["begins_at"]
        resumed.append(begins_at)
        if begins_at < max(found, default=0):
            raise SystemExit(
                f"a published step was lost: {max(found)} was published, the next run began at {begins_at}"
            )
        if begins_at >= steps - 3:
            raise SystemExit("the run is over before all kills: give more --steps")
        target = TARGETS[kill % len(TARGETS)]
        for _ in range(rng.randrange(4)):
            said = run.until("step")
            found[said["step"]] = said["loss"]
        pause = rng.uniform(0, 1.5 * step_s)
        time.sleep(pause)
        run.kill(target, path)
        found |= {said["step"]: said["loss"] for said in run.rest() if "step" in said}
        run.process.wait()
        difference = compare(expected, found)
        print(
            f"kill {kill + 1}: {target} after {pause:.2f} s, from step {begins_at}; largest difference"
            f" {difference:.2e}",
            flush=True,
        )
    last = Run(arguments.base, path, steps)
    last.until("begins_at")
    found |= {said["step"]: said["loss"] for said in last.rest() if "step" in said}
    if last.process.wait():
        raise SystemExit("the last run failed")
    difference = compare(expected, found)
    unheard = sorted(set(expected) - set(found))
    print(
        f"{arguments.kills} kills, resumed at {resumed}; {len(found)} of {steps} losses compared, largest difference"
        f" {difference:.2e}; published without being heard of: {unheard}"
    )
    raise SystemExit(0 if difference <= 1e-6 and max(found) == steps else 1)


if __name__ == "__main__":
    main()
