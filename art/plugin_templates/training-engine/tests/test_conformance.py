"""art-engine-example under ART's suites. `pytest --conformance-list` says what each check requires."""

import pytest
from art_engine_example.engine import ExampleTrainingEngine

from art_conformance import PluginConformance, TrainingEngineConformance


class TestExamplePlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls) -> str:
        return "example"


class TestExampleTrainingEngine(TrainingEngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> ExampleTrainingEngine:
        return ExampleTrainingEngine()
