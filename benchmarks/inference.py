"""Tokens a second of inference engines that hold a LoRA adapter, one after the other in one run.

    python benchmarks/inference.py
    python benchmarks/inference.py --engines torch,vllm --requests 16 --tokens 32

Every engine is started from its launch plan, as a backend starts it, loads one random adapter (r=8 on all seven
projections) and is asked for `--requests` chat completions at once, each of exactly `--tokens` sampled tokens
(`ignore_eos`), with ids and logprobs, as rollouts are. The prompts differ after their first words. What counts is the
time from the first request to the last answer, best of `--repeats`. "against" is the ratio to the first engine.
Without `--engines` those are measured whose environment is there, torch first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measuring.live_engines import DEFAULT_MODEL, EngineSettings, base_model_folder, chat, running
from measuring.machine import machine, versions
from rich.console import Console
from rich.table import Table

from art_conformance.serving import LiveEngine
from art_conformance.tiny_model import write_adapter
from art_core import installed_plugins
from art_runtime.environments import EnvironmentMissing, locate

ADAPTER = "benchmark/agent@1"
WARM_UP_TOKENS = 4


async def ask_all(live: LiveEngine, requests: int, tokens: int, turn: int) -> float:
    """Ask for all completions at once, and give the seconds that they took. Raises RuntimeError when an answer doesn't
    hold exactly `tokens` sampled tokens.
    """

    async def ask(index: int) -> int:
        question = f"Tell me a story about a shop. It sells thing number {turn * requests + index}."
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens,
            "temperature": 1.0,
            "ignore_eos": True,
        }
        [sample] = await chat(live, ADAPTER, body)
        return len(sample.ids)

    start = time.perf_counter()
    lengths = await asyncio.gather(*(ask(index) for index in range(requests)))
    seconds = time.perf_counter() - start
    wrong = [length for length in lengths if length != tokens]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {requests} answers don't hold {tokens} tokens, such as one of {wrong[0]}")
    return seconds


async def measure(
    name: str, settings: EngineSettings, arguments: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Start one engine, load the adapter, warm up, and time the completions."""
    began = time.perf_counter()
    async with running(name, settings, console) as live:
        started = time.perf_counter() - began
        began = time.perf_counter()
        await live.load(ADAPTER, settings.log_folder / "adapter")
        loaded = time.perf_counter() - began
        took = []
        with console.status(f"{name}: warming up") as status:
            await ask_all(live, arguments.requests, WARM_UP_TOKENS, 0)
            for turn in range(1, arguments.repeats + 1):
                status.update(
                    f"{name}: {arguments.requests} × {arguments.tokens} tokens, {turn} of {arguments.repeats}"
                )
                took.append(await ask_all(live, arguments.requests, arguments.tokens, turn))
    total = arguments.requests * arguments.tokens
    result = {
        "engine": name,
        "tokens_per_s": total / min(took),
        "tokens_per_s_each": [total / seconds for seconds in took],
        "start_s": started,
        "load_adapter_s": loaded,
    }
    console.print(f"{name}: {result['tokens_per_s']:.0f} tokens/s", highlight=False)
    return result


def show(results: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    first = results[0]["engine"]
    table = Table("engine", "tokens/s", f"against {first}", "each run", "start", "load adapter")
    for result in results:
        table.add_row(
            result["engine"],
            f"{result['tokens_per_s']:.0f}",
            f"{result['tokens_per_s'] / results[0]['tokens_per_s']:.2f}×",
            ", ".join(f"{value:.0f}" for value in result["tokens_per_s_each"]),
            f"{result['start_s']:.0f} s",
            f"{1000 * result['load_adapter_s']:.0f} ms",
        )
    console.print(table)


def ready_engines(console: Console) -> list[str]:
    """The installed engines that have an interpreter to run in, torch first; the others are named with what to do."""
    names = []
    for name in sorted(installed_plugins().provided("inference engine"), key=lambda name: (name != "torch", name)):
        try:
            locate(installed_plugins().inference_engine(name))
        except EnvironmentMissing as error:
            console.print(f"{name} is left out: {error}", highlight=False, markup=False)
        else:
            names.append(name)
    return names


async def run(arguments: argparse.Namespace) -> None:
    """Measure every engine in turn and print."""
    # The results go to stdout, what happens meanwhile beside it.
    console = Console(stderr=True)
    names = arguments.engines.split(",") if arguments.engines else ready_engines(console)
    for name in names:
        installed_plugins().inference_engine(name)
    results = []
    described = {"machine": machine(), "versions": versions(names)}
    base = await base_model_folder(arguments.base_model)
    with TemporaryDirectory() as folder:
        write_adapter(Path(folder) / "adapter", base, seed=1, strength=0.05)
        settings = EngineSettings(
            base_model=base, log_folder=Path(folder), dtype=arguments.dtype, auto_install=arguments.auto_install
        )
        for name in names:
            results.append(await measure(name, settings, arguments, console))
    if arguments.json:
        print(json.dumps({**described, "dtype": settings.chosen_dtype, "results": results}, indent=1))
        return
    out = Console(width=110)
    out.print(f"{described['machine']}\n{described['versions']}", highlight=False)
    out.print(
        f"{base.name}, {settings.chosen_dtype}, one adapter: {arguments.requests} requests × {arguments.tokens} tokens",
        highlight=False,
    )
    show(results, out)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", help="names with commas between; default: all that are there")
    parser.add_argument("--base-model", default=DEFAULT_MODEL, help="a name, a folder, or a hub name")
    parser.add_argument("--requests", type=int, default=64, help="completions asked for at once (default 64)")
    parser.add_argument("--tokens", type=int, default=64, help="sampled tokens of each completion (default 64)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, of which the best counts (default 3)")
    parser.add_argument("--dtype", help="default: the same for all, float32 on a CPU and bfloat16 on a GPU")
    parser.add_argument("--auto-install", action="store_true", help="make an engine's environment if it isn't there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        asyncio.run(run(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
