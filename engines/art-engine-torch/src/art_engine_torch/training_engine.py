"""Describes the torch training worker: art-training-kit's worker with this distribution's policy in it.

Builds a command line and does no I/O. What a job is, `art_engine_kit.training_wire` says.
"""

from __future__ import annotations

from typing import Final

from art_core import LaunchPlan, TrainingCapability, TrainingLaunch
from art_engine_kit.environment import TORCH_VARIABLES
from art_training_kit.launch import ranks_of, refuse_unfit, worker_plan

from .declared import TRAINING
from .names import POLICY_FACTORY

# init_args that users may give beside the worker's own. shard_base is the policy's, the others are transformers'.
INIT_ARGS: Final = ("revision", "shard_base", "trust_remote_code")


class TorchTrainingEngine:
    """See `art_core.engines.TrainingEngine`."""

    @property
    def name(self) -> str:
        """torch"""
        return "torch"

    @property
    def capabilities(self) -> frozenset[TrainingCapability]:
        """What the worker can do."""
        return TRAINING

    def launch(self, config: TrainingLaunch) -> LaunchPlan:
        """The worker on a CPU, or on the GPUs of `config.devices`.

        Raises UnknownArgument for an init argument that doesn't exist, ValueError for `ranks` or `shard_base` that
        can't be.
        """
        refuse_unfit(config, engine=self.name, init_args=INIT_ARGS)
        sharded = config.init_args.get("shard_base")
        if sharded not in (None, True, False):
            raise ValueError(f"init_args: shard_base must be True, False or None, not {sharded!r}.")
        if sharded and ranks_of(config) == 1:
            raise ValueError(
                "init_args: shard_base=True spreads the base over several ranks, and one trains: give several"
                " trainer_gpu_ids, or on a CPU ranks."
            )
        return worker_plan(config, POLICY_FACTORY, TORCH_VARIABLES)
