"""art-engine-example under ART's suites. `pytest --conformance-list` says what each check requires."""

import pytest
from art_engine_example.engine import ExampleEngine

from art_conformance import InferenceEngineConformance, PluginConformance


class TestExamplePlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls) -> str:
        return "example"


class TestExampleEngine(InferenceEngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> ExampleEngine:
        return ExampleEngine()
