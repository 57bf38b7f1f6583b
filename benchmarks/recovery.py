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
from typing import Any

from measuring.rollout_traffic import SeenSteps, Traffic, small_groups
from measuring.traffic_benchmark import answers_of, run_benchmark, serving_one_model, traffic_parser
from rich.console import Console
from rich.progress import track
from rich.table import Table

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
    steps = SeenSteps()
    installed_plugins().register(steps, name="recovery")
    serving = serving_one_model(arguments, folder, console, inference_replicas=arguments.replicas)
    async with serving as (backend, model, registration):
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
        "base_model": Path(model.base_model).name,
        "replicas": arguments.replicas,
        "in_flight": arguments.in_flight,
        "kills": kills,
        **answers_of(traffic),
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


def main() -> None:
    """Measure and print; exit with 1 when a request failed or was mislabelled."""
    parser = traffic_parser(__doc__)
    parser.add_argument("--kills", type=int, default=3, help="how often a server is killed (default 3)")
    parser.add_argument("--replicas", type=int, default=1, help="how many servers serve the model (default 1)")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds of quiet traffic between kills (default 3)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*(is being restarted|is back, with the adapters).*")
    run_benchmark(arguments, measure, show, packages=("art-backend-local", "art-gateway"))


if __name__ == "__main__":
    main()
