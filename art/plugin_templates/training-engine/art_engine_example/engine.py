"""Describes the training worker: ART's own, with this distribution's policy in it. Does no I/O and imports no torch."""

from art_core import LaunchPlan, TrainingCapability, TrainingLaunch
from art_engine_kit.environment import TORCH_VARIABLES
from art_training_kit.launch import refuse_unfit, worker_plan

from .plugin import CAPABILITIES

INIT_ARGS = ("gradient_checkpointing",)  # yours: what users may give in init_args


class ExampleTrainingEngine:
    """See `art_core.engines.TrainingEngine`."""

    @property
    def name(self) -> str:
        return "example"

    @property
    def capabilities(self) -> frozenset[TrainingCapability]:
        return CAPABILITIES

    def launch(self, config: TrainingLaunch) -> LaunchPlan:
        """The worker on a CPU, or on the one GPU of `config.devices`."""
        refuse_unfit(config, engine=self.name, init_args=INIT_ARGS)
        return worker_plan(config, "art_engine_example.policy:load_policy", TORCH_VARIABLES)
