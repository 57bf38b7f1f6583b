"""The launch plan that every training engine's worker has, for engines to return as it is or with more environment.

Knows the worker's command line; imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from art_core.engines import LaunchPlan, TrainingLaunch, cuda_env
from art_core.training_jobs import WORKER_TOKEN


def worker_plan(config: TrainingLaunch, policy: str, env: Mapping[str, str] | None = None) -> LaunchPlan:
    """Run `policy`, a "module:attr" naming a PolicyFactory, in the shared worker."""
    argv = (
        config.python, "-m", "art_training.worker",
        "--policy", policy,
        "--base-model", str(config.base_model),
        "--host", config.host,
        "--port", str(config.port),
        "--device", "cuda:0" if config.devices else "cpu",
        "--dtype", config.dtype,
        "--max-seq-length", str(config.max_seq_length),
        "--init-args", json.dumps(dict(config.init_args)),
    )  # fmt: skip
    devices = cuda_env(config.devices) if config.devices else {}
    return LaunchPlan(argv=argv, env={**devices, **(env or {})}, secret_env={WORKER_TOKEN: config.token})
