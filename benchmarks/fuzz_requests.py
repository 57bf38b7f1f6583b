"""Requests that nobody should send, thousands of them, at the gateway in front of a real engine, beside honest ones.

    python benchmarks/fuzz_requests.py                        # 20,000 at engine torch
    python benchmarks/fuzz_requests.py --engine vllm --requests 2000

Each request is an honest one of which up to four fields are replaced by values of other kinds, by malformed messages
and tools, by templates, token ids and schemas, or whose bytes are no JSON. Numbers that only make an answer long are
kept small. Ten honest clients ask all the while, as they did before it for as many answers. What counts: no answer of
500 or above, no server ended, no honest request failed, and how much longer an honest request takes. Exits with 1 when
one of the first three isn't so. A seed gives the same requests again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from measuring import gateway_process
from measuring.gateway_process import ADAPTER, KEY, NAME, PROJECT, start_role
from measuring.live_engines import EngineSettings, running
from measuring.machine import machine, versions
from rich.console import Console

from art_conformance.request_probes import TOOLS, probes
from art_conformance.tiny_model import write_adapter, write_base_model

HONEST_CLIENTS = 10
LIMIT_S = 120.0
# They only make an answer longer.
SMALL = ("max_tokens", "max_completion_tokens", "n", "min_tokens", "best_of")
WORDS = ("", "auto", "required", "none", "text", "function", "json_schema", "user", "tool", "é", "\x00", "{{ 7 * 7 }}")
KEYS = ("role", "content", "type", "function", "name", "arguments", "tool_calls", "text", "schema", "json_schema", "1")
TEMPLATES = (
    "{# nothing #}", "{{ 1 // 0 }}", "{% if %}", "{{ messages[9].x.y }}", "{{ raise_exception('no') }}",
    "{{ 'x' * 9999999 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ messages }}",
)  # fmt: skip


@dataclass
class Found:
    """What came of the requests: answers by status, the first of each kind of failure, and seconds of honest ones."""

    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    honest_failures: list[str] = field(default_factory=list)
    before_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)


def anything(rng: random.Random, depth: int = 0) -> Any:
    """A value of any kind that JSON has."""
    kind = rng.randrange(6 if depth > 2 else 8)
    match kind:
        case 0:
            return rng.choice([None, True, False])
        case 1:
            return rng.choice([0, 1, -1, 5, 2**31, 10**20, -(2**63)])
        case 2:
            return rng.choice([0.0, 0.5, -1.5, 1e-320, 1e300])
        case 3 | 4:
            return rng.choice(WORDS)
        case 5:
            return rng.choice(["x" * 5000, "\ud7ff", "\U0001f600" * 3])
        case 6:
            return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): anything(rng, depth + 1) for _ in range(rng.randrange(4))}


def spoiled(rng: random.Random, value: Any) -> Any:
    """A value with one part of it, somewhere inside, replaced by anything or taken out."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.2:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: spoiled(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        return [*value[:place], spoiled(rng, value[place]), *value[place + 1 :]]
    return anything(rng)


def fuzzed(rng: random.Random, *, templates: bool) -> tuple[str, bytes]:
    """The endpoint and the body of one request."""
    known = probes()
    endpoint = rng.choice(["chat/completions"] * 3 + ["completions"])
    body: dict[str, Any] = {"model": NAME, "max_tokens": 4}
    body |= (
        {"messages": rng.choice([p.value for p in known if p.field == "messages"])}
        if endpoint == "chat/completions"
        else {"prompt": rng.choice(["a", ["a", "b"], [5, 6], [[5], [6, 7]]])}
    )
    if rng.random() < 0.3:
        body |= {"tools": TOOLS}
    for probe in rng.sample(known, rng.randrange(4)):
        body[probe.field] = probe.value
    if templates and rng.random() < 0.05:
        body["chat_template"] = rng.choice(TEMPLATES)
    for _ in range(rng.randrange(3)):
        name = rng.choice([*sorted(body), "chat_template_kwargs", "stop_token_ids", "add_generation_prompt", "top_k"])
        body[name] = spoiled(rng, body.get(name))
    for name in SMALL:
        if isinstance(body.get(name), int | float) and not -1 <= body[name] <= 4:
            body[name] = 4
    if endpoint == "chat/completions" and not isinstance(body.get("max_completion_tokens", 4), int):
        body["max_tokens"] = 4
    body["model"] = NAME if rng.random() < 0.97 else body["model"]
    content = json.dumps(body).encode()
    return endpoint, content[: rng.randrange(len(content))] if rng.random() < 0.01 else content


async def ask_honestly(client: httpx.AsyncClient, took: list[float], found: Found) -> None:
    """One honest request, and how long it took."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 8}
    began = time.perf_counter()
    try:
        answer = await client.post(f"/{PROJECT}/v1/chat/completions", json=body)
        if answer.status_code != 200 or not answer.json()["choices"][0]["token_ids"]:
            found.honest_failures.append(f"HTTP {answer.status_code}: {answer.text[:300]}")
    except httpx.HTTPError as error:
        found.honest_failures.append(repr(error))
    took.append(time.perf_counter() - began)


async def fuzz(client: httpx.AsyncClient, arguments: argparse.Namespace, found: Found) -> None:
    """All requests, with honest ones before and beside them."""
    left = iter(range(arguments.requests))

    async def spoil() -> None:
        for number in left:
            rng = random.Random(f"{arguments.seed}-{number}")
            endpoint, content = fuzzed(rng, templates=arguments.engine == "torch")
            try:
                answer = await client.post(f"/{PROJECT}/v1/{endpoint}", content=content)
            except httpx.HTTPError as error:
                found.statuses[type(error).__name__] += 1
                found.failures.append(f"request {number}: {error!r}: {content[:600]!r}")
                continue
            found.statuses[str(answer.status_code)] += 1
            if answer.status_code >= 500 or (
                answer.status_code == 200 and b'"code":"generation_failed"' in answer.content
            ):
                found.failures.append(f"request {number}: {answer.status_code} {answer.text[:300]}: {content[:600]!r}")

    over = asyncio.Event()

    async def honest(took: list[float], most: int | None) -> None:
        while not over.is_set() and (most is None or len(took) < most):
            await ask_honestly(client, took, found)
            await asyncio.sleep(0.02)

    await asyncio.gather(*(honest(found.before_s, 10 * HONEST_CLIENTS) for _ in range(HONEST_CLIENTS)))
    beside = [asyncio.create_task(honest(found.beside_s, None)) for _ in range(HONEST_CLIENTS)]
    await asyncio.gather(*(spoil() for _ in range(arguments.at_once)))
    over.set()
    await asyncio.gather(*beside)


async def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Start engine and gateway, fuzz, and look whether both are still there."""
    found = Found()
    with TemporaryDirectory() as folder:
        base = write_base_model(Path(folder) / "base")
        trusts = {"trust_request_chat_template": True} if arguments.engine == "torch" else {}
        settings = EngineSettings(base_model=base, log_folder=Path(folder), engine_args=trusts, api_key=KEY)
        async with running(arguments.engine, settings, console) as live:
            await live.load(ADAPTER, write_adapter(Path(folder) / "adapter", base, seed=1))
            script = str(gateway_process.__file__)
            gateway, port = start_role(script, "gateway", live.launch.port, arguments.engine)
            try:
                headers, limits = {"Authorization": f"Bearer {KEY}"}, httpx.Limits(max_connections=None)
                url = f"http://127.0.0.1:{port}"
                async with httpx.AsyncClient(
                    base_url=url, headers=headers, limits=limits, timeout=LIMIT_S, trust_env=False
                ) as client:
                    await fuzz(client, arguments, found)
                    alive = (await client.get("/health")).status_code == 200 and gateway.poll() is None
                engine_alive = (await live.client.get("/health")).status_code == 200
            finally:
                gateway.kill()
    before, beside = statistics.median(found.before_s), statistics.median(found.beside_s)
    return {
        "engine": arguments.engine,
        "requests": arguments.requests,
        "statuses": dict(sorted(found.statuses.items())),
        "failures": len(found.failures),
        "first_failures": found.failures[:5],
        "servers_alive": alive and engine_alive,
        "honest_requests": len(found.beside_s),
        "honest_failures": len(found.honest_failures),
        "first_honest_failures": found.honest_failures[:3],
        "honest_before_s": before,
        "honest_beside_s": beside,
        "honest_slowest_s": max(found.beside_s),
        "slowed": beside / before,
    }


def main() -> int:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print nothing but one JSON object")
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json)
    result = asyncio.run(run(arguments, console))
    if arguments.json:
        print(json.dumps(result))
    else:
        console.print(machine(), highlight=False)
        console.print(versions([arguments.engine], ["art-gateway", "httpx"]), highlight=False)
        console.print_json(data=result)
    sound = result["servers_alive"] and not result["failures"] and not result["honest_failures"]
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
