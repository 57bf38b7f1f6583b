"""art-engine-llamacpp under ART's suites. `pytest --conformance-list` says what each check requires."""

import pytest
from art_engine_llamacpp.engine import LlamaCppEngine

from art_conformance import InferenceEngineConformance, PluginConformance


class TestLlamaCppPlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls) -> str:
        return "llamacpp"


class TestLlamaCppEngine(InferenceEngineConformance):
    flavour = "cpu"

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> LlamaCppEngine:
        return LlamaCppEngine()
