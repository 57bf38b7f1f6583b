"""Describes the torch training worker: art-training-kit's worker with this distribution's policy in it.

Builds a command line and does no I/O. What a job is, `art_engine_kit.training_wire` says.
"""

from __future__ import annotations

from typing import Final

from art_core import LaunchPlan, TrainingCapability, TrainingLaunch
from art_engine_kit.environment import TORCH_VARIABLES
from art_training_kit.launch import refuse_unfit, worker_plan

from .declared import TRAINING
from .names import POLICY_FACTORY

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
        refuse_unfit(config, engine=self.name, init_args=INIT_ARGS)
        return worker_plan(config, POLICY_FACTORY, TORCH_VARIABLES)
