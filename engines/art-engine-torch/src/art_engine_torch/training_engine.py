"""Describes the torch training worker: art-training's worker with this distribution's policy in it.

Builds a command line and does no I/O. What a job is, `art_core.training_jobs` says.
"""

from __future__ import annotations

import json
from typing import Final

from art_core import LaunchPlan, TrainingCapability, TrainingLaunch, UnknownArgument
from art_core.engines import cuda_env
from art_core.training_jobs import WORKER_TOKEN

from .declared import TRAINING
from .names import ENVIRONMENT, POLICY_FACTORY

# init_args that users may give. gradient_checkpointing is the worker's, the others are transformers'.
INIT_ARGS: Final = ("gradient_checkpointing", "revision", "trust_remote_code")


class TorchTrainingEngine:
    """See `art_core.engines.TrainingEngine`. Trains on one device."""

    @property
    def name(self) -> str:
        """torch"""
        return "torch"

    @property
    def capabilities(self) -> frozenset[TrainingCapability]:
        """What the worker can do."""
        return TRAINING

    def launch(self, config: TrainingLaunch) -> LaunchPlan:
        """The worker on a CPU, or on the one GPU of `config.devices`.

        Raises UnknownArgument for an init argument that doesn't exist, ValueError for several devices.
        """
        if len(config.devices) > 1:
            raise ValueError(
                f"Engine torch trains on one device, not on {len(config.devices)} ({config.devices}): give one id in "
                "trainer_gpu_ids."
            )
        for name in config.init_args:
            if name not in INIT_ARGS:
                raise UnknownArgument(name, where="init_args of the torch training engine", known=INIT_ARGS)
        argv = [config.python, "-m", "art_training.worker", "--policy", POLICY_FACTORY]
        argv += ["--base-model", str(config.base_model), "--host", config.host, "--port", str(config.port)]
        argv += ["--device", "cuda:0" if config.devices else "cpu", "--dtype", config.dtype]
        argv += ["--max-seq-length", str(config.max_seq_length)]
        init_args = dict(config.init_args)
        checkpointing = init_args.pop("gradient_checkpointing", None)
        if checkpointing is not None:
            argv += ["--gradient-checkpointing", "on" if checkpointing else "off"]
        if init_args:
            argv += ["--init-args", json.dumps(init_args)]
        env = {**ENVIRONMENT, **cuda_env(config.devices)}
        return LaunchPlan(argv=tuple(argv), env=env, secret_env={WORKER_TOKEN: config.token})
