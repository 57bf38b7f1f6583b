"""What a pipeline loses when its parts are killed: nothing that was finished, and no step is trained twice.

    python benchmarks/pipeline_kills.py
    python benchmarks/pipeline_kills.py --engine vllm --kills 5 --parts worker server

A PipelineTrainer trains a tiny random model through LocalBackend, whose host outlives its client. SIGKILL ends, at
random moments, `--kills` times each: the client (the process with the training loop), the host (which routes, and
publishes checkpoints), the training worker and the inference server. A run that ends in an error is begun again, as its
user would. Afterwards every scenario must be in the batch of exactly one step that is on disk, and no more rollouts may
have been begun again than were under way at the kills. At the end no process of the run may be left. Exits with 1 when
any of this isn't so.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from measuring.machine import machine, versions
from rich.console import Console
from rich.progress import track

import art
from art.local import LocalBackend
from art.pipeline_trainer import PipelineTrainer, make_group_rollout_fn
from art_conformance.tiny_model import write_base_model
from art_core import TrajectoryGroup, hookimpl, installed_plugins

JSON = dict[str, Any]
PARTS = ("client", "host", "worker", "server")
# From the first scenario after a start until the kill.
LONGEST_PAUSE_S = 4.0
WORKERS = 4
START_LIMIT_S = 300.0
END_LIMIT_S = 900.0


@dataclass(frozen=True)
class Notes:
    """What the runs of one folder noted, a line of JSON each, in files that outlive them."""

    folder: Path

    def add(self, kind: str, **what: Any) -> None:
        """One more."""
        with (self.folder / f"{kind}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")

    def all(self, kind: str) -> list[JSON]:
        """Those of a kind, oldest first. A line that a kill cut off is no note."""
        file = self.folder / f"{kind}.jsonl"
        found = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    @property
    def last_scenario(self) -> float:
        """The number of the last scenario: none, until the kills are over."""
        over = self.folder / "over"
        return int(over.read_text()) if over.exists() else float("inf")


class Batches:
    """A plugin: notes what each step is trained on."""

    art_api = 1

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    @hookimpl
    def art_before_train(self, step: int, trajectory_groups: list[TrajectoryGroup]) -> None:
        """Written before the step begins."""
        self._notes.add("batches", step=step, scenarios=[group.metadata["scenario_id"] for group in trajectory_groups])


async def run(folder: Path, engine: str) -> None:
    """One run of the pipeline, to its end or until it is killed."""
    notes = Notes(folder)
    installed_plugins().register(Batches(notes), name="pipeline-kills")

    async def attempt(model: art.TrainableModel, scenario: JSON, _: object) -> art.Trajectory:
        messages: art.Messages = [{"role": "user", "content": f"Say {scenario['metadata']['scenario_id']}."}]
        completion = await model.openai_client().chat.completions.create(
            messages=messages, model=model.name, max_tokens=8
        )
        return art.Trajectory(messages_and_choices=[*messages, completion.choices[0]], reward=random.random())

    gather = make_group_rollout_fn(attempt, 2)

    async def rollout(model: art.TrainableModel, scenario: JSON, config: object) -> TrajectoryGroup:
        number = scenario["metadata"]["scenario_id"]
        notes.add("begun", scenario=number)
        group = await gather(model, scenario, config)
        if len(group) < 2:
            raise RuntimeError(f"half of scenario {number} failed: {group.exceptions}")
        return group

    async def evaluate(*_: object) -> list[art.Trajectory]:
        return []  # that every step is one to be evaluated keeps its checkpoint

    def scenarios() -> Iterator[JSON]:
        for number in itertools.count():
            if number > notes.last_scenario:
                return
            yield {"metadata": {"scenario_id": number}}

    async with LocalBackend(
        path=folder / "runs", inference_engine=engine, training_engine="torch", show_progress=False
    ) as backend:
        model = art.TrainableModel(
            name="agent",
            project="kills",
            base_model=str(folder / "tiny"),
            base_path=str(folder / "runs"),
            report_metrics=[],
        )
        await model.register(backend)
        trainer = PipelineTrainer(
            model,
            backend,
            rollout,
            scenarios(),
            eval_fn=evaluate,
            num_rollout_workers=WORKERS,
            min_batch_size=2,
            max_batch_size=4,
            max_steps_off_policy=3,
            max_attempts=1000,
            max_failures_in_a_row=1000,
            eval_every_n_steps=1,
            learning_rate=1e-5,
        )
        await trainer.train()
        notes.add("ends", steps=list(await backend.list_steps(model)))


@dataclass
class Killer:
    """Begins runs, and kills their parts."""

    folder: Path
    engine: str
    notes: Notes
    starts: int = 0
    errors: list[str] = field(default_factory=list)
    _client: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Have a client run, and wait until it has begun a rollout."""
        client = self._client
        if client is not None and client.poll() is None:
            return
        if client is not None and client.returncode not in (-signal.SIGKILL, 0):
            self.errors.append(last_error((self.folder / "client.log").read_text(errors="replace")))
        begun = len(self.notes.all("begun"))
        self.starts += 1
        with (self.folder / "client.log").open("wb") as log:
            command = [sys.executable, __file__, "--run", str(self.folder), "--engine", self.engine]
            client = self._client = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_LIMIT_S
        while len(self.notes.all("begun")) == begun and client.poll() is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no rollout began within {START_LIMIT_S:g} s:\n{self.log()}")
            time.sleep(0.02)

    def kill(self, part: str) -> bool:
        """End one part; False when it isn't there just now."""
        client = self._client
        assert client is not None
        if part == "client":
            client.kill()
            client.wait()
            return True
        pid = self._pid(part)
        if pid is None:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False  # it has ended since, with its client's connection or of an earlier kill
        return True

    def end(self) -> None:
        """Let the run come to its end, with a scenario or two more."""
        begun = max(note["scenario"] for note in self.notes.all("begun"))
        (self.folder / "over").write_text(str(begun + 2))
        deadline = time.monotonic() + END_LIMIT_S
        while not self.notes.all("ends"):
            self.begin()
            if time.monotonic() > deadline:
                raise RuntimeError(f"the run did not end within {END_LIMIT_S:g} s:\n{self.log()}")
            time.sleep(0.1)
        assert self._client is not None
        self._client.wait(60)
        self._down()

    def left(self) -> list[str]:
        """The processes that still name the folder in their command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or ())
            if str(self.folder) in command and process.pid != os.getpid():
                found.append(f"{process.pid}: {command[:200]}")
        return found

    def log(self) -> str:
        """The end of what the client said."""
        return (self.folder / "client.log").read_text(errors="replace")[-3000:]

    def close(self) -> None:
        """End whatever runs."""
        if self._client is not None:
            self._client.kill()
            self._client.wait()
        self._down()

    def _down(self) -> None:
        command = [sys.executable, "-m", "art_core", "down", "--path", str(self.folder / "runs")]
        subprocess.run(command, check=False, stdout=sys.stderr)

    def _pid(self, part: str) -> int | None:
        if part == "host":
            file = self.folder / "runs" / "host.json"
            return int(json.loads(file.read_text())["pid"]) if file.exists() else None
        listing = subprocess.run([sys.executable, "-m", "art_core", "ps", "--json"], capture_output=True, check=True)
        for host in json.loads(listing.stdout):
            if host["path"] == str(self.folder / "runs"):
                found = host["engines" if part == "server" else "workers"]
                return next((each["pid"] for each in found if each["pid"]), None)
        return None


def last_error(log: str) -> str:
    """The name of the error that ended a run, of those within a group the last."""
    names: list[str] = re.findall(r"^[ |]*([A-Za-z_.]+): ", log, re.MULTILINE)
    return ["it said nothing", *names][-1]


def judge(notes: Notes) -> JSON:
    """What was trained, lost, trained twice and begun again, by the batches of the steps that are on disk."""
    steps = set(notes.all("ends")[-1]["steps"])
    # Of a step that was tried again the last batch is what it was trained on.
    batches = {note["step"]: note["scenarios"] for note in notes.all("batches") if note["step"] in steps}
    trained = Counter(scenario for batch in batches.values() for scenario in batch)
    wanted = range(int(notes.last_scenario) + 1)
    begun = Counter(note["scenario"] for note in notes.all("begun"))
    return {
        "steps": len(batches),
        "scenarios": len(wanted),
        "lost": [scenario for scenario in wanted if scenario not in trained],
        "trained_twice": [scenario for scenario, times in trained.items() if times > 1],
        "rollouts_begun_again": sum(begun.values()) - len(begun),
    }


def measure(arguments: argparse.Namespace, folder: Path, console: Console) -> JSON:
    """Kill as often as asked for, and judge."""
    write_base_model(folder / "tiny")
    notes = Notes(folder)
    killer = Killer(folder, arguments.engine, notes)
    chance, kills, began = random.Random(arguments.seed), Counter[str](), time.monotonic()
    try:
        order = [part for part in arguments.parts for _ in range(arguments.kills)]
        chance.shuffle(order)
        for part in track(order, "killing", console=console):
            while True:
                killer.begin()
                time.sleep(chance.uniform(0, LONGEST_PAUSE_S))
                if killer.kill(part):
                    break
            kills[part] += 1
        killer.end()
        left = killer.left()
    finally:
        killer.close()
    seconds = time.monotonic() - began
    return {
        "engine": arguments.engine,
        "seconds": seconds,
        "kills": dict(kills),
        "starts": killer.starts,
        "ended_in_words": dict(Counter(killer.errors)),
        **judge(notes),
        "processes_left": left,
    }


def main() -> None:
    """Kill, print, and exit with 1 when something was lost, trained twice or left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="torch", help="an installed inference engine (default torch)")
    parser.add_argument("--kills", type=int, default=20, help="how often each part is killed (default 20)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is killed (default all)")
    parser.add_argument("--seed", type=int, default=11, help="of the moments and of their order (default 11)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        asyncio.run(run(arguments.run, arguments.engine))
        return
    described = {"machine": machine(), "versions": versions([arguments.engine], ["art-backend-local"])}
    with TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder), Console(stderr=True))
    if arguments.json:
        print(json.dumps({**described, **result}, indent=1))
    else:
        out = Console(width=110)
        out.print(f"{described['machine']}\n{described['versions']}", highlight=False)
        killed = ", ".join(f"{part} {times}" for part, times in result["kills"].items())
        out.print(
            f"{result['engine']}: killed {killed}, in {result['seconds']:.0f} s; {result['starts']} starts\n"
            f"{result['scenarios']} scenarios in {result['steps']} steps: {len(result['lost'])} lost,"
            f" {len(result['trained_twice'])} trained twice; {result['rollouts_begun_again']} rollouts begun again\n"
            f"runs that ended in words: {result['ended_in_words'] or 'none'}\n"
            f"processes left: {len(result['processes_left'])}",
            highlight=False,
        )
        for problem in [*result["lost"], *result["trained_twice"], *result["processes_left"]][:20]:
            out.print(f"  {problem}", highlight=False, markup=False)
    too_many = result["rollouts_begun_again"] > WORKERS * sum(result["kills"].values())
    sys.exit(1 if result["lost"] or result["trained_twice"] or too_many or result["processes_left"] else 0)


if __name__ == "__main__":
    main()
