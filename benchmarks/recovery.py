"""What a killed inference server costs: seconds without answers, and how many requests were lost.

    python benchmarks/recovery.py --engine torch
    python benchmarks/recovery.py --engine vllm --kills 3 --replicas 2

`--in-flight` chat completions are under way through the gateway all the time. The server's process is ended by SIGKILL,
`--kills` times, in turn among the replicas. For each kill:

    silence       the longest time in which no request was answered
    back          from the kill until the server holds every adapter again, verified
    failed        requests that ended in an error
    mislabelled   answers whose model, x-art-step or policy_version is not what was asked

Exits with 1 when a request failed or was mislabelled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measuring.live_engines import DEFAULT_MODEL, base_model_folder
from measuring.machine import machine, versions
from measuring.rollout_traffic import SeenSteps, Traffic, small_groups
from rich.console import Console
from rich.progress import track
from rich.table import Table

import art
from art.local import LocalBackend
from art_conformance.tiny_model import write_base_model
from art_core import installed_plugins

BACK_LIMIT_S = 900.0
JSON = dict[str, Any]


async def servers(path: Path) -> list[JSON]:
    """What `art ps` says of the inference servers of the backend at `path`."""
    listing = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "art_core", "ps", "--json", stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await asyncio.wait_for(listing.communicate(), 60)
    (host,) = [host for host in json.loads(printed) if host["path"] == str(path)]
    found: list[JSON] = host["engines"]
    return found


async def kill_one(path: Path, index: int, traffic: Traffic) -> JSON:
    """Kill a server and wait until it is back; gives what that cost."""
    before = (await servers(path))[index]
    failed, mislabelled, answered = len(traffic.failed), len(traffic.mislabelled), traffic.answered
    os.kill(before["pid"], signal.SIGKILL)
    killed_at = time.monotonic()
    silence = asyncio.create_task(_longest_silence(traffic))
    try:
        async with asyncio.timeout(BACK_LIMIT_S):
            while not await _is_back(path, index, before):
                await asyncio.sleep(0.5)
        back = time.monotonic() - killed_at
        await asyncio.sleep(0.5)
    finally:
        silence.cancel()
    return {
        "longest_silence_s": await silence,
        "back_s": back,
        "failed": traffic.failed[failed:],
        "mislabelled": traffic.mislabelled[mislabelled:],
        "answered": traffic.answered - answered,
    }


async def _is_back(path: Path, index: int, before: JSON) -> bool:
    now = (await servers(path))[index]
    return bool(now["up"] and now["restarts"] > before["restarts"])


async def _longest_silence(traffic: Traffic) -> float:
    """The longest time without an answer, in seconds, until it is cancelled."""
    longest, answered, last = 0.0, traffic.answered, time.monotonic()
    try:
        while True:
            await asyncio.sleep(0.01)
            if traffic.answered > answered:
                longest, answered, last = max(longest, time.monotonic() - last), traffic.answered, time.monotonic()
    except asyncio.CancelledError:
        return longest


async def measure(arguments: argparse.Namespace, folder: Path, console: Console) -> JSON:
    """Serve, train one step, kill with traffic, and give what was found."""
    base = write_base_model(folder / "tiny") if arguments.tiny else await base_model_folder(arguments.base_model)
    steps = SeenSteps()
    installed_plugins().register(steps, name="recovery")
    backend = LocalBackend(
        in_process=True,
        path=folder / "runs",
        inference_engine=arguments.engine,
        inference_replicas=arguments.replicas,
        auto_install=arguments.auto_install,
        show_progress=False,
    )
    async with backend:
        model = art.TrainableModel(
            name="agent", project="recovery", base_model=str(base), base_path=str(folder / "runs")
        )
        with console.status(f"starting {arguments.engine} and the training worker"):
            registration = await backend.register(model)
            await model.register(backend)
        await backend.train(model, await small_groups(model, arguments.tokens), learning_rate=1e-5)
        async with Traffic(model.name, registration, steps, arguments.tokens) as traffic:
            traffic.keep_in_flight(arguments.in_flight)
            kills = []
            for number in track(range(arguments.kills), "killing", console=console):
                await asyncio.sleep(arguments.pause)
                kills.append(await kill_one(backend.path, number % arguments.replicas, traffic))
            await asyncio.sleep(arguments.pause)
    return {
        "engine": arguments.engine,
        "base_model": base.name,
        "replicas": arguments.replicas,
        "in_flight": arguments.in_flight,
        "kills": kills,
        "requests": traffic.answered,
        "failed": traffic.failed,
        "mislabelled": traffic.mislabelled,
    }


def show(result: JSON, console: Console) -> None:
    """Print the table."""
    title = f"{result['engine']}, {result['replicas']} server(s), {result['in_flight']} requests in flight"
    table = Table("kill", "silence", "back", "answered meanwhile", "failed", "mislabelled", title=title)
    for number, kill in enumerate(result["kills"], 1):
        table.add_row(
            str(number), f"{kill['longest_silence_s']:.1f} s", f"{kill['back_s']:.1f} s", str(kill["answered"]),
            str(len(kill["failed"])), str(len(kill["mislabelled"])),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{result['requests']} requests answered, {len(result['failed'])} failed,"
        f" {len(result['mislabelled'])} mislabelled",
        highlight=False,
    )
    for problem in [*result["failed"], *result["mislabelled"]][:10]:
        console.print(f"  {problem}", highlight=False, markup=False)


def main() -> None:
    """Measure and print; exit with 1 when a request failed or was mislabelled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="torch", help="an installed inference engine (default torch)")
    parser.add_argument("--kills", type=int, default=3, help="how often a server is killed (default 3)")
    parser.add_argument("--replicas", type=int, default=1, help="how many servers serve the model (default 1)")
    parser.add_argument("--in-flight", type=int, default=8, help="chat completions under way all the time (default 8)")
    parser.add_argument("--tokens", type=int, default=32, help="max_tokens of each (default 32)")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds of quiet traffic between kills (default 3)")
    parser.add_argument("--base-model", default=DEFAULT_MODEL, help="a name, a folder, or a hub name")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model instead: the path without the weights")
    parser.add_argument("--auto-install", action="store_true", help="make the engine's environment if it isn't there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    described = {"machine": machine(), "versions": versions([arguments.engine], ("art-backend-local", "art-gateway"))}
    warnings.filterwarnings("ignore", message=".*(is being restarted|is back, with the adapters).*")
    with TemporaryDirectory() as folder:
        result = asyncio.run(measure(arguments, Path(folder), console))
    if arguments.json:
        print(json.dumps({**described, **result}, indent=1))
    else:
        out = Console(width=110)
        out.print(f"{described['machine']}\n{described['versions']}", highlight=False)
        show(result, out)
    sys.exit(1 if result["failed"] or result["mislabelled"] else 0)


if __name__ == "__main__":
    main()
