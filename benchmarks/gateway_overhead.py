"""What the gateway costs: in front of an upstream that costs nothing, or in front of a real engine.

    python benchmarks/gateway_overhead.py                  # its ceiling, and the time it adds to one answer
    python benchmarks/gateway_overhead.py --engine torch   # what is lost of an engine's throughput

Upstream, gateway and clients are three processes. Without `--engine` the upstream answers with a fixed chat completion
of `--tokens` tokens (default 64), with ids and logprobs, in the surface of the torch engine, whose dialect the gateway
uses. "Ceiling" asks as fast as answers come; "added" lets the upstream take `--think` seconds, as a real engine does,
and compares the answers' times with and without the gateway in between.

With `--engine` a real engine is started with an adapter loaded, and asked for completions of exactly `--tokens` tokens
(default 16): in the engine's own dialect, and through the gateway, by turns in one run (`--rounds`). "lost" is the
share of requests a second that goes when the gateway is in between, over all rounds; the target is below 3 %. Prints
the machine and the versions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measuring import gateway_process
from measuring.gateway_process import ADAPTER, CHAT_PATH, KEY, cpu_seconds, start_role
from measuring.http_load import Upstream, ask_for, ask_times, request_bytes
from measuring.live_engines import DEFAULT_MODEL, EngineSettings, base_model_folder, running
from measuring.machine import machine, versions
from rich.console import Console
from rich.table import Table

from art_conformance.tiny_model import write_adapter
from art_gateway import raise_file_limit

LIBRARIES = ("art-gateway", "aiohttp", "uvicorn", "httptools", "starlette", "orjson")
TARGET_LOST = 0.03
LEAST_REQUESTS = 16
WARM_UP = 32
WAYS = ("direct", "gateway")


def chat_answer(tokens: int) -> bytes:
    """A chat completion as the torch engine's server gives it."""
    content = [
        {"token": " word", "logprob": -0.12345678901234567, "bytes": [32, 119, 111, 114, 100], "top_logprobs": []}
    ] * tokens
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": " word" * tokens, "tool_calls": None},
        "finish_reason": "stop",
        "logprobs": {"content": content},
        "token_ids": list(range(1000, 1000 + tokens)),
    }
    answer = {"id": "chatcmpl-0123456789", "object": "chat.completion", "created": 1, "model": ADAPTER}
    return json.dumps({**answer, "choices": [choice], "prompt_token_ids": list(range(256))}).encode()


def question(tokens: int) -> dict[str, Any]:
    """What is asked for: exactly `tokens` tokens."""
    messages = [{"role": "user", "content": "Tell me a story about a shop."}]
    return {"model": "agent", "messages": messages, "max_tokens": tokens, "temperature": 1.0, "ignore_eos": True}


async def serve_upstream(port: int, tokens: int, think_s: float) -> None:
    """Run the upstream until it is ended."""
    body = chat_answer(tokens)
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    server = await asyncio.get_running_loop().create_server(
        lambda: Upstream(answer, think_s), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


def figures(took: list[float], seconds: float, gateway_cpu_s: float) -> dict[str, float]:
    """Requests a second, p50 and p99 of what they took, and the gateway's CPU time for each."""
    ordered = sorted(took)
    return {
        "requests_per_s": len(took) / seconds,
        "p50_ms": statistics.median(ordered) * 1000,
        "p99_ms": ordered[int(len(ordered) * 0.99)] * 1000,
        "gateway_cpu_us": gateway_cpu_s / len(took) * 1e6,
    }


def measure_alone(tokens: int, think_s: float, seconds: float, concurrencies: list[int]) -> list[dict[str, Any]]:
    """A canned upstream, direct and through the gateway, at each number of requests at once."""
    rows = []
    body = json.dumps(question(tokens)).encode()
    upstream, upstream_port = start_role(__file__, "upstream", tokens, think_s)
    try:
        gateway, gateway_port = start_role(gateway_process.__file__, "gateway", upstream_port, "torch")
        try:
            for concurrency in concurrencies:
                row: dict[str, Any] = {"concurrency": concurrency, "think_s": think_s}
                for way, port, path in (
                    ("direct", upstream_port, "/v1/chat/completions"),
                    ("gateway", gateway_port, CHAT_PATH),
                ):
                    request = request_bytes(port, path, KEY, body)
                    asyncio.run(ask_for(min(1.0, seconds), port, request, concurrency))
                    began, cpu_began = time.perf_counter(), cpu_seconds(gateway)
                    took = asyncio.run(ask_for(seconds, port, request, concurrency))
                    row[way] = figures(took, time.perf_counter() - began, cpu_seconds(gateway) - cpu_began)
                rows.append(row)
        finally:
            gateway.stop()
    finally:
        upstream.stop()
    return rows


async def measure_engine(arguments: argparse.Namespace, tokens: int, console: Console) -> list[dict[str, Any]]:
    """A real engine, direct and through the gateway by turns, at each number of requests at once."""
    base = await base_model_folder(arguments.base_model)
    rows = []
    with TemporaryDirectory() as folder:
        adapter = write_adapter(Path(folder) / "adapter", base, seed=1, strength=0.05)
        settings = EngineSettings(
            base_model=base,
            log_folder=Path(folder),
            dtype=arguments.dtype,
            auto_install=arguments.auto_install,
            api_key=KEY,
        )
        async with running(arguments.engine, settings, console) as live:
            await live.load(ADAPTER, adapter)
            port = live.launch.port
            gateway, gateway_port = await asyncio.to_thread(
                start_role, gateway_process.__file__, "gateway", port, arguments.engine
            )
            direct = live.engine.prepare_request("chat/completions", question(tokens), ADAPTER)
            asked = {
                "direct": (port, request_bytes(port, "/v1/chat/completions", KEY, json.dumps(direct).encode())),
                "gateway": (
                    gateway_port,
                    request_bytes(gateway_port, CHAT_PATH, KEY, json.dumps(question(tokens)).encode()),
                ),
            }
            try:
                with console.status("measuring") as status:
                    for concurrency in arguments.at_once:
                        status.update(f"{arguments.engine}, {concurrency} at once: warming up")
                        for way in WAYS:
                            await ask_times(min(WARM_UP, concurrency), *asked[way], min(WARM_UP, concurrency))
                        rows.append(await by_turns(arguments, concurrency, asked, gateway, status))
                        console.print(f"{concurrency} at once: {rows[-1]['lost']:.1%} lost", highlight=False)
            finally:
                await asyncio.to_thread(gateway.stop)
    return rows


async def by_turns(
    arguments: argparse.Namespace, concurrency: int, asked: dict[str, tuple[int, bytes]], gateway: Any, status: Any
) -> dict[str, Any]:
    """One number of requests at once: both ways in every round, the first way first in every other one."""
    count = max(LEAST_REQUESTS, arguments.waves * concurrency)
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu = dict.fromkeys(WAYS, 0.0)
    for turn in range(arguments.rounds):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            status.update(f"{arguments.engine}, {concurrency} at once: {way}, {turn + 1} of {arguments.rounds}")
            began, cpu_began = time.perf_counter(), cpu_seconds(gateway)
            took[way] += await ask_times(count, *asked[way], concurrency)
            seconds[way].append(time.perf_counter() - began)
            cpu[way] += cpu_seconds(gateway) - cpu_began
    return {
        "concurrency": concurrency,
        **{way: figures(took[way], sum(seconds[way]), cpu[way]) for way in WAYS},
        "lost": 1 - sum(seconds["direct"]) / sum(seconds["gateway"]),
        "lost_each_round": [1 - d / g for d, g in zip(seconds["direct"], seconds["gateway"], strict=True)],
    }


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Print one table."""
    columns = ["at once", "direct /s", "gateway /s"]
    if "lost" in rows[0]:
        columns += ["lost", "in each round"]
    columns += ["direct p50", "p50 added", "p99 added", "CPU/request"]
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        direct, gateway = row["direct"], row["gateway"]
        cells = [str(row["concurrency"]), f"{direct['requests_per_s']:.1f}", f"{gateway['requests_per_s']:.1f}"]
        if "lost" in row:
            cells += [f"{row['lost']:.1%}", ", ".join(f"{lost:.1%}" for lost in row["lost_each_round"])]
        cells += [
            f"{direct['p50_ms']:.2f} ms",
            f"{gateway['p50_ms'] - direct['p50_ms']:.2f} ms",
            f"{gateway['p99_ms'] - direct['p99_ms']:.2f} ms",
            f"{gateway['gateway_cpu_us']:.0f} µs",
        ]
        table.add_row(*cells)
    console.print(table)


def main() -> None:
    """Measure and print; `--json` prints everything as one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", help="an installed inference engine: torch, vllm, sglang; default: a canned one")
    parser.add_argument("--tokens", type=int, help="tokens of an answer (default 64, with --engine 16)")
    parser.add_argument("--at-once", type=_numbers, default=[1, 64, 512], help="default 1,64,512")
    parser.add_argument(
        "--think", type=float, default=1.0, help="without --engine: seconds an answer takes (default 1)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="without --engine: of each measurement (default 5)")
    parser.add_argument("--rounds", type=int, default=4, help="with --engine: rounds of both ways (default 4)")
    parser.add_argument(
        "--waves", type=int, default=1, help="with --engine: requests in a round, in times of those at once (default 1)"
    )
    parser.add_argument("--base-model", default=DEFAULT_MODEL, help="with --engine: a name, a folder, or a hub name")
    parser.add_argument("--dtype", help="with --engine: default float32 on a CPU and bfloat16 on a GPU")
    parser.add_argument("--auto-install", action="store_true", help="make the engine's environment if it isn't there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    raise_file_limit()
    if arguments.role:
        _, port, tokens, think_s = arguments.role
        asyncio.run(serve_upstream(int(port), int(tokens), float(think_s)))
        return
    tokens = arguments.tokens or (16 if arguments.engine else 64)
    described = {"machine": machine(), "versions": versions(filter(None, [arguments.engine]), LIBRARIES)}
    tables: dict[str, list[dict[str, Any]]] = {}
    if arguments.engine:
        console = Console(stderr=True)
        tables[f"{arguments.engine}, {tokens} tokens an answer"] = asyncio.run(
            measure_engine(arguments, tokens, console)
        )
    else:
        tables[f"Ceiling: an upstream that answers at once, {tokens} tokens an answer"] = measure_alone(
            tokens, 0.0, arguments.seconds, arguments.at_once
        )
        tables[f"Added: an upstream that takes {arguments.think:g} s"] = measure_alone(
            tokens, arguments.think, max(arguments.seconds, 4 * arguments.think), arguments.at_once
        )
    if arguments.json:
        print(json.dumps({**described, "tokens": tokens, **tables}, indent=1))
        return
    out = Console(width=120)
    out.print(f"{described['machine']}\n{described['versions']}", highlight=False)
    for title, rows in tables.items():
        show(title, rows, out)
    lost = [row["lost"] for rows in tables.values() for row in rows if "lost" in row]
    if lost:
        word = "met" if max(lost) < TARGET_LOST else "NOT met"
        out.print(f"lost < {TARGET_LOST:.0%} at each: {word}", highlight=False)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
