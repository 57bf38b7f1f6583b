"""What the gateway costs: its ceiling in requests a second, and the time it adds to one answer.

    python benchmarks/gateway_overhead.py

Upstream, gateway and clients are three processes. The upstream answers at once with a fixed chat completion of
`--tokens` tokens, with ids and logprobs, in the surface of the torch engine, whose dialect the gateway uses. "Ceiling"
asks as fast as answers come; "added" lets the upstream take `--think` seconds, as a real engine does, and compares the
answers' times with and without the gateway in between. Prints the machine and the versions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Collection, Sequence
from importlib.metadata import version
from typing import Any, cast

import psutil
import uvicorn
from rich.console import Console
from rich.table import Table

from art_core import InferenceEngine, installed_plugins, instantiate
from art_gateway import SERVER_OPTIONS, Route, ServedModel, create_app, raise_file_limit
from art_runtime import Child, free_port, spawn_tethered

KEY = "benchmark"
CONCURRENCY = (1, 64, 512)
LIBRARIES = ("art-gateway", "aiohttp", "uvicorn", "httptools", "starlette", "orjson")


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
    answer = {"id": "chatcmpl-0123456789", "object": "chat.completion", "created": 1, "model": "p/agent@3"}
    return json.dumps({**answer, "choices": [choice], "prompt_token_ids": list(range(256))}).encode()


class Upstream(asyncio.Protocol):
    """The least HTTP server that can be: any whole request is answered with the same bytes, after a while."""

    def __init__(self, answer: bytes, think_s: float) -> None:
        self.answer, self.think_s = answer, think_s
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # What the loop gives is always one; the base class says less.
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer once the request is whole."""
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end or len(body) < _length(head):
            return
        self.buffer = b""
        if self.think_s:
            asyncio.get_running_loop().call_later(self.think_s, self.transport.write, self.answer)
        else:
            self.transport.write(self.answer)


class Asker(asyncio.Protocol):
    """The least HTTP client that can be: asks again as soon as it is answered."""

    def __init__(self, request: bytes, seconds: list[float], stop_at: float, done: asyncio.Future[None]) -> None:
        self.request, self.seconds, self.stop_at, self.done = request, seconds, stop_at, done
        self.pieces: list[bytes] = []
        self.missing: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask the first time."""
        # What the loop gives is always one; the base class says less.
        self.transport = cast("asyncio.Transport", transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Ask again once the answer is whole."""
        if self.missing is None:
            head, end, body = data.partition(b"\r\n\r\n")
            if not end or not head.startswith(b"HTTP/1.1 200"):
                self.done.set_exception(RuntimeError(f"not an answer: {data[:500]!r}"))
                self.transport.abort()
                return
            self.missing = _length(head) - len(body)
        else:
            self.missing -= len(data)
        if self.missing > 0:
            return
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        if now < self.stop_at:
            self._ask()
        else:
            self.transport.close()
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """An answer that never came is an error."""
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the connection was closed before the answer came"))

    def _ask(self) -> None:
        self.missing = None
        self.began = time.perf_counter()
        self.transport.write(self.request)


def _length(head: bytes) -> int:
    lowered = head.lower()
    start = lowered.index(b"content-length:") + 15
    return int(lowered[start:].split(b"\r\n", 1)[0])


async def ask(port: int, path: str, concurrency: int, seconds: float) -> list[float]:
    """Keep `concurrency` requests under way for some seconds; the seconds that each answer took."""
    body = json.dumps(
        {"model": "agent", "messages": [{"role": "user", "content": "x" * 1000}], "max_tokens": 64, "temperature": 1.0}
    ).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {KEY}\r\n"
    request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    loop = asyncio.get_running_loop()
    took: list[float] = []
    stop_at = time.perf_counter() + seconds
    ends: list[asyncio.Future[None]] = []
    for _ in range(concurrency):
        done: asyncio.Future[None] = loop.create_future()
        ends.append(done)
        await loop.create_connection(lambda done=done: Asker(request, took, stop_at, done), "127.0.0.1", port)  # type: ignore[misc]
    async with asyncio.timeout(seconds + 60):
        await asyncio.gather(*ends)
    return took


class OneRoute:
    """Routes with one model; acquiring is a few attribute reads, as it is in a backend once a step is loaded."""

    def __init__(self, upstream_url: str, engine: InferenceEngine) -> None:
        self._route = Route(
            upstream_url=upstream_url, upstream_key=KEY, engine=engine, adapter="p/agent@3", name="agent@3", step=3,
            release=lambda: None,
        )  # fmt: skip

    async def acquire(self, project: str, requested_name: str) -> Route:
        """The route."""
        return self._route

    def projects_of(self, name: str) -> Collection[str]:
        """The project."""
        return ("p",)

    def served(self, project: str | None) -> Sequence[ServedModel]:
        """The model."""
        return (ServedModel(project="p", name="agent", step=3, steps=(3,)),)


async def serve_upstream(port: int, tokens: int, think_s: float) -> None:
    """Run the upstream until it is ended."""
    body = chat_answer(tokens)
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    server = await asyncio.get_running_loop().create_server(
        lambda: Upstream(answer, think_s), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


def serve_gateway(port: int, upstream_port: int) -> None:
    """Run the gateway until it is ended, as a host does."""
    engine: InferenceEngine = instantiate(installed_plugins().inference_engine("torch"))
    app = create_app(OneRoute(f"http://127.0.0.1:{upstream_port}", engine), api_key=KEY)
    uvicorn.run(app, host="127.0.0.1", port=port, **SERVER_OPTIONS)


def start(role: str, *arguments: object) -> tuple[Child, int]:
    """Start this file in another role, and wait until it listens."""
    port = free_port()
    child = spawn_tethered([sys.executable, __file__, "--role", role, str(port), *map(str, arguments)])
    for _ in range(600):
        if any(c.laddr.port == port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN):
            return child, port
        if child.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit(f"the {role} did not start; run it alone to see why: --role {role} {port} ...")


def measure(tokens: int, think_s: float, seconds: float) -> list[dict[str, Any]]:
    """Direct and through the gateway, at each number of requests at once."""
    rows = []
    upstream, upstream_port = start("upstream", tokens, think_s)
    gateway, gateway_port = start("gateway", upstream_port)
    try:
        for concurrency in CONCURRENCY:
            row: dict[str, Any] = {"concurrency": concurrency, "think_s": think_s}
            for way, port, path in (
                ("direct", upstream_port, "/v1/chat/completions"),
                ("gateway", gateway_port, "/p/v1/chat/completions"),
            ):
                asyncio.run(ask(port, path, concurrency, min(1.0, seconds)))
                began, cpu_began = time.perf_counter(), cpu_seconds(gateway)
                took = sorted(asyncio.run(ask(port, path, concurrency, seconds)))
                row[way] = {
                    "requests_per_s": len(took) / (time.perf_counter() - began),
                    "p50_ms": statistics.median(took) * 1000,
                    "p99_ms": took[int(len(took) * 0.99)] * 1000,
                    "gateway_cpu_us": (cpu_seconds(gateway) - cpu_began) / len(took) * 1e6,
                }
            rows.append(row)
    finally:
        gateway.stop()
        upstream.stop()
    return rows


def cpu_seconds(child: Child) -> float:
    """CPU time of the program under a tether: what a request costs, however busy the machine is with other things."""
    times = [process.cpu_times() for process in psutil.Process(child.pid).children(recursive=True)]
    return sum(time.user + time.system for time in times)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print one table."""
    table = Table(
        "at once", "direct /s", "gateway /s", "direct p50", "gateway p50", "p50 added", "p99 added", "CPU/request",
        title=title, title_justify="left",
    )  # fmt: skip
    for row in rows:
        direct, gateway = row["direct"], row["gateway"]
        table.add_row(
            str(row["concurrency"]),
            f"{direct['requests_per_s']:.0f}",
            f"{gateway['requests_per_s']:.0f}",
            f"{direct['p50_ms']:.2f} ms",
            f"{gateway['p50_ms']:.2f} ms",
            f"{gateway['p50_ms'] - direct['p50_ms']:.2f} ms",
            f"{gateway['p99_ms'] - direct['p99_ms']:.2f} ms",
            f"{gateway['gateway_cpu_us']:.0f} µs",
        )
    Console(width=110).print(table)


def main() -> None:
    """Measure and print; `--json` prints everything as one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--think", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    raise_file_limit()
    if arguments.role:
        role, port, *rest = arguments.role
        if role == "gateway":
            serve_gateway(int(port), int(rest[0]))
        else:
            asyncio.run(serve_upstream(int(port), int(rest[0]), float(rest[1])))
        return
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("art-gateway", "aiohttp", "uvicorn", "httptools", "starlette", "orjson")},
    }
    ceiling = measure(arguments.tokens, 0.0, arguments.seconds)
    added = measure(arguments.tokens, arguments.think, max(arguments.seconds, 4 * arguments.think))
    if arguments.json:
        print(json.dumps({**machine, "tokens": arguments.tokens, "ceiling": ceiling, "added": added}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    show(f"Ceiling: an upstream that answers at once, {arguments.tokens} tokens an answer", ceiling)
    show(f"Added: an upstream that takes {arguments.think:g} s", added)


if __name__ == "__main__":
    main()
