"""Describes the Unsloth training worker: art-training-kit's worker, in Unsloth's environment, with its policy.

Builds a command line and starts nothing. What a job is, `art_engine_kit.training_wire` says.
"""

from __future__ import annotations

from typing import Final

from art_core import LaunchPlan, TrainingCapability, TrainingLaunch
from art_engine_kit.environment import TORCH_VARIABLES, Flavour
from art_engine_kit.user_folders import cache_dir
from art_training_kit.launch import refuse_unfit, worker_plan

from .declared import CAPABILITIES, INIT_ARGS, Settings

POLICY_FACTORY: Final = "art_engine_unsloth.in_environment.loading:load_policy"


class UnslothTrainingEngine:
    """See `art_core.engines.TrainingEngine`. Trains on one device, and declares the same in every flavour."""

    def __init__(self, flavour: Flavour | None = None) -> None:
        self.flavour = flavour

    @property
    def name(self) -> str:
        """unsloth"""
        return "unsloth"

    @property
    def capabilities(self) -> frozenset[TrainingCapability]:
        """What the worker can do."""
        return CAPABILITIES

    def launch(self, config: TrainingLaunch) -> LaunchPlan:
        """The worker on a CPU, or on the GPUs of `config.devices`.

        Raises UnknownArgument for an init argument that doesn't exist, ValueError for 4 bits on a CPU, and for
        settings that can't be.
        """
        refuse_unfit(config, engine=self.name, init_args=INIT_ARGS)
        worker = config.init_args.get("gradient_checkpointing")
        Settings.of(config.init_args, worker=worker, on_gpu=bool(config.devices))
        env = {
            **TORCH_VARIABLES,
            # Unsloth would otherwise ask a model hub, to count its users.
            "UNSLOTH_DISABLE_STATISTICS": "1",
            # It writes the code that it compiles, by default into whatever folder a process was started in.
            "UNSLOTH_COMPILE_LOCATION": str(cache_dir() / "unsloth_compiled_cache"),
        }
        return worker_plan(config, POLICY_FACTORY, env, brings="art_engine_unsloth")
