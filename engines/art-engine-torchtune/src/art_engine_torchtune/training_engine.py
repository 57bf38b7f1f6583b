"""Describes the torchtune training worker: art-training-kit's worker, in torchtune's environment, with its policy.

Builds a command line and does no I/O. What a job is, `art_engine_kit.training_wire` says.
"""

from __future__ import annotations

from typing import Final

from art_core import LaunchPlan, TrainingCapability, TrainingLaunch
from art_engine_kit.environment import TORCH_VARIABLES, Flavour
from art_training_kit.launch import refuse_unfit, worker_plan

from .declared import CAPABILITIES, INIT_ARGS

POLICY_FACTORY: Final = "art_engine_torchtune.in_environment.loading:load_policy"


class TorchtuneTrainingEngine:
    """See `art_core.engines.TrainingEngine`. Trains on one device, and declares the same in every flavour."""

    def __init__(self, flavour: Flavour | None = None) -> None:
        self.flavour = flavour

    @property
    def name(self) -> str:
        """torchtune"""
        return "torchtune"

    @property
    def capabilities(self) -> frozenset[TrainingCapability]:
        """What the worker can do."""
        return CAPABILITIES

    def launch(self, config: TrainingLaunch) -> LaunchPlan:
        """The worker on a CPU, or on the GPUs of `config.devices`.

        Raises UnknownArgument for an init argument that doesn't exist, ValueError for `ranks` that can't be.
        """
        refuse_unfit(config, engine=self.name, init_args=INIT_ARGS)
        return worker_plan(config, POLICY_FACTORY, TORCH_VARIABLES, brings="art_engine_torchtune")
