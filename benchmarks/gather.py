"""How many 4-turn rollouts a second the client gathers against a mock endpoint, beside raw keep-alive clients.

    python benchmarks/gather.py [--rollouts 2000 10000] [--repeats 3] [--tokens 8] [--json FILE]

The endpoint is a process of its own, pinned to another core, and answers at once with eight tokens (or `--tokens`),
their ids and logprobs. Every contestant runs in a fresh process pinned to the first core, all rollouts at once, each
rollout four requests one after the other whose conversation grows. Contestants take turns; medians are printed, with
the lag of the event loop: how late a task that sleeps 5 ms wakes up. "own" is the part of it in which this process had
the processor, which tells the client's own stalls from those of a busy machine.

- art: `art.gather_trajectory_groups` of rollouts that use `model.openai_client()` and keep every choice
- aiohttp: one aiohttp session without connection limit, `json.loads` of each answer, nothing kept
- protocol: an asyncio.Protocol that writes bytes and finds the answer by its content length: the limit of asyncio
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from measuring.heartbeat import HEARTBEAT_S, Heartbeat
from measuring.quantiles import quantile

TURNS = 4
GROUP = 8
TOKENS = 8


def answer_of(tokens: int) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m@3",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "I would go left."},
                "token_ids": list(range(tokens)),
                "prompt_token_ids": list(range(60)),
                "policy_version": 3,
                "logprobs": {
                    "content": [
                        {"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []} for _ in range(tokens)
                    ],
                    "refusal": None,
                },
            }
        ],
        "usage": {"prompt_tokens": 60, "completion_tokens": tokens, "total_tokens": 60 + tokens},
    }


OPENING = [
    {"role": "system", "content": "You walk through a maze. Say where you go."},
    {"role": "user", "content": "There is a door to the left and a stair to the right."},
]
NEXT = "You are in the next room. There is a door and a stair."


def pin(core: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})


# the endpoint


class Server(asyncio.Protocol):
    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.received = b""
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (whole := whole_message(self.received)) is not None:
            self.received = self.received[whole[1] :]
            self.transport.write(self.answer)


def whole_message(data: bytes) -> tuple[int, int] | None:
    """Where the body of the first HTTP message begins and ends, when it is there whole."""
    start = data.find(b"\r\n\r\n") + 4
    if start < 4:
        return None
    head = data[:start].lower()
    at = head.find(b"content-length:") + 15
    end = start + int(head[at : head.index(b"\r\n", at)])
    return (start, end) if len(data) >= end else None


async def serve(tokens: int) -> None:
    pin(1)
    body = json.dumps(answer_of(tokens)).encode()
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Server(answer), "127.0.0.1", 0, backlog=16384)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# the contestants


async def art_rollouts(port: int, count: int) -> list[Any]:
    import art

    model = art.Model(
        name="m", project="benchmark", inference_base_url=f"http://127.0.0.1:{port}/v1", inference_api_key="key"
    )

    async def rollout() -> art.Trajectory:
        client = model.openai_client()
        opening: list[Any] = list(OPENING)
        trajectory = art.Trajectory(messages_and_choices=opening)
        for _ in range(TURNS):
            completion = await client.chat.completions.create(messages=trajectory.messages(), model=model.name)
            trajectory.messages_and_choices.append(completion.choices[0])
            trajectory.messages_and_choices.append({"role": "user", "content": NEXT})
        trajectory.reward = 1.0
        return trajectory

    return await art.gather_trajectory_groups(
        art.TrajectoryGroup(rollout() for _ in range(GROUP)) for _ in range(count // GROUP)
    )


def check_groups(groups: list[Any], count: int, tokens: int) -> None:
    assert sum(map(len, groups)) == count
    for group in groups:
        for trajectory in group:
            assert len(trajectory.choices()) == TURNS
            assert trajectory.choices()[0].token_ids == list(range(tokens))
            assert trajectory.final_policy_version == 3


async def aiohttp_rollouts(port: int, count: int) -> None:
    import aiohttp

    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(messages: list[dict[str, str]]) -> dict[str, str]:
            body = {"messages": messages, "model": "m"}
            async with session.post(url, json=body, headers={"authorization": "Bearer key"}) as response:
                message: dict[str, str] = json.loads(await response.read())["choices"][0]["message"]
                return message

        await asyncio.gather(*(converse(ask) for _ in range(count)))


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.received = b""
        self.transport: Any = None
        self.answer: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        if (whole := whole_message(self.received)) is not None:
            body, self.received = self.received[whole[0] : whole[1]], self.received[whole[1] :]
            self.answer.set_result(body)


async def protocol_rollouts(port: int, count: int) -> None:
    loop = asyncio.get_running_loop()
    idle: list[Connection] = []

    async def ask(messages: list[dict[str, str]]) -> dict[str, str]:
        if idle:
            connection = idle.pop()
        else:
            _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
        body = json.dumps({"messages": messages, "model": "m"}).encode()
        connection.answer = loop.create_future()
        connection.transport.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer key\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        answer = json.loads(await connection.answer)
        idle.append(connection)
        message: dict[str, str] = answer["choices"][0]["message"]
        return message

    await asyncio.gather(*(converse(ask) for _ in range(count)))
    for connection in idle:
        connection.transport.abort()


async def converse(ask: Callable[[list[dict[str, str]]], Awaitable[dict[str, str]]]) -> None:
    messages = list(OPENING)
    for _ in range(TURNS):
        messages += [await ask(messages), {"role": "user", "content": NEXT}]


CONTESTANTS: dict[str, Callable[[int, int], Awaitable[Any]]] = {
    "art": art_rollouts,
    "aiohttp": aiohttp_rollouts,
    "protocol": protocol_rollouts,
}


async def measure(name: str, port: int, count: int, tokens: int) -> dict[str, float]:
    await CONTESTANTS[name](port, GROUP)  # imports and first-use work
    heart = Heartbeat()
    beating = asyncio.ensure_future(heart.run())
    await asyncio.sleep(0)
    start, cpu = time.perf_counter(), time.process_time()
    kept = await CONTESTANTS[name](port, count)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    await asyncio.sleep(2 * HEARTBEAT_S)
    beating.cancel()
    if kept is not None:
        check_groups(kept, count, tokens)
    lags, own_lags = [beat[1] for beat in heart.beats], [beat[2] for beat in heart.beats]
    return {
        "rollouts_per_s": count / seconds,
        "cpu_us_per_request": cpu / count / TURNS * 1e6,
        "lag_p50_ms": 1000 * quantile(lags, 0.5),
        "lag_p99_ms": 1000 * quantile(lags, 0.99),
        "lag_max_ms": 1000 * max(lags),
        "own_lag_p99_ms": 1000 * quantile(own_lags, 0.99),
        "own_lag_max_ms": 1000 * max(own_lags),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, nargs="+", default=[2000, 10_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of each answer")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.serve:
        asyncio.run(serve(options.tokens))
    elif options.measure:
        pin(0)
        name, port, count = options.measure
        print(json.dumps(asyncio.run(measure(name, int(port), int(count), options.tokens))))
    else:
        compare(options.rollouts, options.repeats, options.tokens, options.json)


def compare(counts: list[int], repeats: int, tokens: int, file: str | None) -> None:
    figures = {}
    for count in counts:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
        for _ in range(repeats):
            for name in CONTESTANTS:
                runs[name].append(one_run(name, count, tokens))
        medians = {
            name: {key: statistics.median(run[key] for run in each) for key in each[0]} for name, each in runs.items()
        }
        figures[count] = medians
        print(
            f"\n{count} rollouts at once, {TURNS} turns of {tokens} tokens each, median of {repeats};"
            f" load average {os.getloadavg()[0]:.1f}"
        )
        print(
            f"{'':10}{'rollouts/s':>12}{'CPU µs/req':>12}{'lag p50 ms':>12}{'p99':>8}{'max':>8}{'own p99':>9}{'max':>8}"
            f"{'art is':>10}{'by CPU':>8}"
        )
        for name, row in medians.items():
            share = medians["art"]["rollouts_per_s"] / row["rollouts_per_s"]
            by_cpu = row["cpu_us_per_request"] / medians["art"]["cpu_us_per_request"]
            print(
                f"{name:10}{row['rollouts_per_s']:12.0f}{row['cpu_us_per_request']:12.0f}{row['lag_p50_ms']:12.1f}"
                f"{row['lag_p99_ms']:8.1f}{row['lag_max_ms']:8.1f}{row['own_lag_p99_ms']:9.1f}{row['own_lag_max_ms']:8.1f}"
                f"{share:10.0%}{by_cpu:8.0%}"
            )
    if file:
        with open(file, "w", encoding="utf-8") as out:
            json.dump(figures, out, indent=1)


def one_run(name: str, count: int, tokens: int) -> dict[str, float]:
    script = [sys.executable, __file__, "--tokens", str(tokens)]
    server = subprocess.Popen([*script, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        done = subprocess.run(
            [*script, "--measure", name, port, str(count)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        result: dict[str, float] = json.loads(done.stdout)
        return result
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
