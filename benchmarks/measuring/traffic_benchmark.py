"""What the benchmarks share that serve one model while rollouts run: their options, the model's backend, their verdict.

Knows LocalBackend; what is done to it while the traffic runs, and what is measured of that, is each benchmark's own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

import art
from art.local import LocalBackend
from art_conformance.tiny_model import write_base_model
from art_core import Registration

from .live_engines import DEFAULT_MODEL, base_model_folder
from .machine import machine, versions
from .rollout_traffic import Traffic

JSON = dict[str, Any]


def traffic_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all of them have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="torch", help="an installed inference engine (default torch)")
    parser.add_argument("--in-flight", type=int, default=8, help="chat completions under way all the time (default 8)")
    parser.add_argument("--tokens", type=int, default=32, help="max_tokens of each (default 32)")
    parser.add_argument("--base-model", default=DEFAULT_MODEL, help="a name, a folder, or a hub name")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model instead: the path without the weights")
    parser.add_argument("--dtype", help="the inference engine's; default: its own choice")
    parser.add_argument("--auto-install", action="store_true", help="make the engine's environment if it isn't there")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every single measurement")
    return parser


@asynccontextmanager
async def serving_one_model(
    arguments: argparse.Namespace, folder: Path, console: Console, **options: Any
) -> AsyncIterator[tuple[LocalBackend, art.TrainableModel, Registration]]:
    """A registered model under `folder`, served by `arguments.engine`; `options` are LocalBackend's."""
    base = write_base_model(folder / "tiny") if arguments.tiny else await base_model_folder(arguments.base_model)
    settings: art.dev.InternalModelConfig = {"engine_args": {"dtype": arguments.dtype}} if arguments.dtype else {}
    backend = LocalBackend(
        in_process=True,
        path=folder / "runs",
        inference_engine=arguments.engine,
        auto_install=arguments.auto_install,
        show_progress=False,
        **options,
    )
    async with backend:
        model = art.TrainableModel(
            name="agent",
            project="benchmark",
            base_model=str(base),
            base_path=str(folder / "runs"),
            report_metrics=[],
            _internal_config=settings,
        )
        with console.status(f"starting {arguments.engine} and the training worker"):
            registration = await backend.register(model)
            await model.register(backend)
        yield backend, model, registration


def answers_of(traffic: Traffic) -> JSON:
    """What became of the requests."""
    return {"requests": traffic.answered, "failed": traffic.failed, "mislabelled": traffic.mislabelled}


def run_benchmark(
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Path, Console], Awaitable[JSON]],
    show: Callable[[JSON, Console], None],
    *,
    packages: Sequence[str],
) -> None:
    """Measure, print machine, versions and result, and exit: with 1 when a request failed or was mislabelled."""
    described = {"machine": machine(), "versions": versions([arguments.engine], packages)}

    async def measured(folder: Path) -> JSON:
        return await measure(arguments, folder, Console(stderr=True))

    with TemporaryDirectory() as folder:
        result = asyncio.run(measured(Path(folder)))
    if arguments.json:
        print(json.dumps({**described, **result}, indent=1))
    else:
        out = Console(width=110)
        out.print(f"{described['machine']}\n{described['versions']}", highlight=False)
        show(result, out)
        failed, mislabelled = result["failed"], result["mislabelled"]
        out.print(
            f"{result['requests']} requests answered, {len(failed)} failed, {len(mislabelled)} mislabelled",
            highlight=False,
        )
        for problem in [*failed, *mislabelled][:10]:
            out.print(f"  {problem}", highlight=False, markup=False)
    sys.exit(1 if result["failed"] or result["mislabelled"] else 0)
