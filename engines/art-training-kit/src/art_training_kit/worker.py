"""The training worker as a process: `python -m art_training_kit.worker --policy MODULE:ATTR --base-model DIR --port N`.

Sets what has to be set before torch is loaded, then serves `worker_app`. The token comes in the environment, never in
argv. Knows a command line; knows neither HTTP nor training.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from art_engine_kit.training_wire import WORKER_TOKEN

from .allocator import keep_freed_memory

if TYPE_CHECKING:
    from .policy import Policy, PolicyFactory, PolicyRequest
    from .trainer import Trainer


def _load_trainer(factory: str, request: PolicyRequest) -> Trainer:
    from .trainer import Trainer

    module, _, attribute = factory.partition(":")
    make: PolicyFactory = getattr(importlib.import_module(module), attribute)
    policy: Policy = make(request)
    return Trainer(policy)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """What a worker is told on its command line; None reads this process's own."""
    parser = argparse.ArgumentParser(prog="python -m art_training_kit.worker", description="Run a training worker.")
    parser.add_argument("--policy", required=True, metavar="MODULE:ATTR", help="factory of the policy to train")
    parser.add_argument("--base-model", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0, ...")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--gradient-checkpointing", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--max-seq-length", default=32768, type=int)
    parser.add_argument("--init-args", default="{}", type=json.loads, metavar="JSON", help="the engine's own arguments")
    return parser.parse_args(argv)


async def _serve(arguments: argparse.Namespace) -> int:
    import uvicorn

    from .policy import PolicyRequest
    from .worker_app import Worker

    request = PolicyRequest(
        base_model=arguments.base_model,
        device=arguments.device,
        dtype=arguments.dtype,
        gradient_checkpointing={"auto": None, "on": True, "off": False}[arguments.gradient_checkpointing],
        max_seq_length=arguments.max_seq_length,
        init_args=arguments.init_args,
    )
    token = os.environ.pop(WORKER_TOKEN, None)
    worker = Worker(lambda: _load_trainer(arguments.policy, request), token)
    config = uvicorn.Config(
        worker.app(),
        host=arguments.host,
        port=arguments.port,
        # Not whichever loop another package happened to install.
        loop="asyncio",
        log_level="warning",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    failed = asyncio.create_task(worker.failed.wait())
    await asyncio.wait({serving, failed}, return_when=asyncio.FIRST_COMPLETED)
    if failed.done():
        # Long enough for whoever polls /health to read the reason; the log has it too.
        await asyncio.sleep(1.0)
        server.should_exit = True
    failed.cancel()
    await serving
    return 1 if worker.failed.is_set() else 0


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop. Exit status 1 when the base model could not be loaded."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # Threads that wait by spinning take the cores from the rollouts beside us: under load a step gets ten times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    keep_freed_memory()
    return asyncio.run(_serve(read_arguments(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
