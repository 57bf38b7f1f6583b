"""Real Unsloth workers, in the environment that art-runtime makes for them: the conformance suite."""

from __future__ import annotations

from typing import ClassVar

import pytest

from art_conformance import TrainingEngineConformance
from art_core import TrainingEngine
from art_engine_kit.environment import Flavour
from art_engine_unsloth.training_engine import UnslothTrainingEngine


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestUnsloth(TrainingEngineConformance):
    """A tiny model."""

    flavour: ClassVar[Flavour] = "cpu"

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> TrainingEngine:
        return UnslothTrainingEngine(cls.flavour)
