"""art-engine-transformers under ART's suites, where it fails, and says so. `pytest --conformance-list` says what each
check requires.
"""

import pytest
from art_engine_transformers.engine import TransformersEngine

from art_conformance import InferenceEngineConformance, PluginConformance


class TestTransformersPlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls) -> str:
        return "transformers"


class TestTransformersEngine(InferenceEngineConformance):
    flavour = "cpu"

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> TransformersEngine:
        return TransformersEngine()
