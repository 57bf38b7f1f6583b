"""The launch plan that every training engine's worker has, for engines to return as it is or with more environment.

Knows the worker's command line; imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from art_core.engines import LaunchPlan, TrainingLaunch
from art_engine_kit.environment import cuda_env
from art_engine_kit.training_wire import WORKER_TOKEN


def worker_plan(config: TrainingLaunch, policy: str, env: Mapping[str, str] | None = None) -> LaunchPlan:
    """Run `policy`, a "module:attr" naming a PolicyFactory, in the shared worker.

    Of `config.init_args`, `gradient_checkpointing` (True, False, or None for automatic) is the worker's own; the others
    reach the factory.
    """
    init_args = dict(config.init_args)
    checkpointing = init_args.pop("gradient_checkpointing", None)
    argv = [
        config.python, "-m", "art_training_kit.worker",
        "--policy", policy,
        "--base-model", str(config.base_model),
        "--host", config.host,
        "--port", str(config.port),
        "--device", "cuda:0" if config.devices else "cpu",
        "--dtype", config.dtype,
        "--max-seq-length", str(config.max_seq_length),
        "--init-args", json.dumps(init_args),
    ]  # fmt: skip
    if checkpointing is not None:
        argv += ["--gradient-checkpointing", "on" if checkpointing else "off"]
    return LaunchPlan(
        argv=tuple(argv), env={**(env or {}), **cuda_env(config.devices)}, secret_env={WORKER_TOKEN: config.token}
    )
