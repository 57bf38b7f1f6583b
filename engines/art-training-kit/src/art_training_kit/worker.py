"""The training worker as a process: `python -m art_training_kit.worker --policy MODULE:ATTR --base-model DIR --port N`.

Sets what has to be set before torch is loaded, then serves `worker_app`; with `--ranks N` further processes train with
this one, and it leads. The token comes in the environment, never in argv. Knows a command line; knows neither HTTP nor
training.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from art_engine_kit.training_wire import WORKER_TOKEN

from .allocator import keep_freed_memory
from .rank_processes import Follower, Followers, own_devices

if TYPE_CHECKING:
    from .policy import PolicyFactory
    from .ranks import Ranks
    from .trainer import Trainer
    from .worker_app import JobRunner

_log = logging.getLogger("art_training_kit.worker")


def _load_trainer(arguments: argparse.Namespace, ranks: Ranks) -> Trainer:
    from .policy import PolicyRequest
    from .trainer import Trainer

    module, _, attribute = arguments.policy.partition(":")
    with ranks.alike():
        make: PolicyFactory = getattr(importlib.import_module(module), attribute)
        policy = make(
            PolicyRequest(
                base_model=arguments.base_model,
                device=arguments.device,
                dtype=arguments.dtype,
                gradient_checkpointing={"auto": None, "on": True, "off": False}[arguments.gradient_checkpointing],
                max_seq_length=arguments.max_seq_length,
                init_args=arguments.init_args,
            )
        )
    return Trainer(policy, ranks)


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
    parser.add_argument("--ranks", default=1, type=int, metavar="N", help="processes that train, this one among them")
    # For what this process starts itself.
    parser.add_argument("--rank", default=0, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


async def _serve(arguments: argparse.Namespace, followers: Followers | None) -> int:
    import uvicorn

    from .ranks import Ranks
    from .worker_app import Worker

    def load() -> JobRunner:
        if followers is None:
            return _load_trainer(arguments, Ranks())
        ranks = Ranks.meet(0, arguments.ranks, followers.folder, followers.lost)
        return followers.leading(_load_trainer(arguments, ranks))

    token = os.environ.pop(WORKER_TOKEN, None)
    worker = Worker(load, token)
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


def _follow(arguments: argparse.Namespace) -> NoReturn:
    """Train what the first rank is given, until that is gone."""
    os.environ.pop(WORKER_TOKEN, None)
    from .ranks import Ranks

    follower = Follower(arguments.rank, arguments.meeting)
    try:
        ranks = Ranks.meet(arguments.rank, arguments.ranks, arguments.meeting, follower.lost)
    except Exception as error:
        follower.lost(f"rank {arguments.rank} can't meet the others: {type(error).__name__}: {error}")
    try:
        trainer = _load_trainer(arguments, ranks)
    except Exception as error:
        # Every rank fails to, and the first has to be asked why before it ends: it would end at once if this one did.
        _log.error("the base model could not be loaded: %s: %s", type(error).__name__, error)
        follower.wait()
    for job in follower.jobs():
        try:
            for _ in trainer.run(job):
                pass
        except Exception as error:
            # Every rank has left the job in the same way, and the first says so to the client.
            _log.error("step %d of %s: %s: %s", job.step, job.model, type(error).__name__, error)
    raise AssertionError("jobs are heard as long as the process lives")


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop. Exit status 1 when the base model could not be loaded."""
    arguments = read_arguments(argv)
    leads = arguments.rank == 0
    who = "" if arguments.ranks == 1 else f"rank {arguments.rank} "
    logging.basicConfig(
        # What the others would say is what the first says.
        level=logging.INFO if leads else logging.ERROR,
        format=f"%(asctime)s {who}%(name)s %(levelname)s %(message)s",
    )
    # Threads that wait by spinning take the cores from the rollouts beside us: under load a step gets ten times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    keep_freed_memory()
    if not leads:
        _follow(arguments)
    if arguments.ranks == 1:
        return asyncio.run(_serve(arguments, None))
    followers = Followers(arguments.ranks)
    os.environ.update(own_devices(os.environ, 0, arguments.ranks))
    try:
        return asyncio.run(_serve(arguments, followers))
    finally:
        followers.stop()


if __name__ == "__main__":
    raise SystemExit(main())
