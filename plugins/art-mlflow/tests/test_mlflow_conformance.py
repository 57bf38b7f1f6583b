"""art-mlflow under ART's suites, with the real library and its database; also a cell of the conformance matrix."""

import pytest

from art_conformance import PluginConformance, TrackerConformance


class TestMlflowPlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "mlflow"


class TestMlflow(TrackerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "mlflow"

    @pytest.fixture(scope="class")
    @classmethod
    def tracker_environment(cls):
        return lambda folder: {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}

    @pytest.fixture(scope="class")
    @classmethod
    def read_back(cls, in_database):
        return in_database
