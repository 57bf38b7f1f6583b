"""The checks for installed plugins, chosen by name on the command line.

`pytest --pyargs art_conformance.by_name --inference-engine mine` from anywhere; in this repository
`pytest conformance_tests --backend local --inference-engine torch --training-engine torch`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from art_conformance.backend_suite import BackendConformance
from art_conformance.inference_suite import InferenceEngineConformance
from art_conformance.plugin_suite import PluginConformance
from art_conformance.publication_suite import PublicationConformance
from art_conformance.targets import (
    backend_arguments,
    command_of,
    inference_engine,
    plugin_names,
    targets,
    training_engine,
)
from art_conformance.training_suite import TrainingEngineConformance
from art_core import Backend, InferenceEngine, TrainingEngine, installed_plugins
from art_core.registry import instantiate


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.cls is TestPlugin and "plugin_name" in metafunc.fixturenames:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the checks say what is wrong with a plugin
            names = plugin_names(metafunc.config, installed_plugins())
        metafunc.parametrize("plugin_name", names, scope="class", indirect=False)


class TestPlugin(PluginConformance):
    conformance_target = "plugin"


class TestInferenceEngine(InferenceEngineConformance):
    conformance_target = "inference_engine"

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, request: pytest.FixtureRequest) -> InferenceEngine:
        return inference_engine(request.config, installed_plugins())  # type: ignore[no-any-return]

    @pytest.fixture(scope="class")
    @classmethod
    def engine_args(cls, request: pytest.FixtureRequest) -> dict[str, Any]:
        return dict(targets(request.config).engine_args)


class TestTrainingEngine(TrainingEngineConformance):
    conformance_target = "training_engine"

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, request: pytest.FixtureRequest) -> TrainingEngine:
        return training_engine(request.config, installed_plugins())  # type: ignore[no-any-return]


class _ByName:
    conformance_target = "backend"

    @pytest.fixture(scope="class")
    @classmethod
    def open_backend(cls, request: pytest.FixtureRequest) -> Any:
        spec = installed_plugins().backend(targets(request.config).backend)

        def make(folder: Path) -> Backend:
            return instantiate(spec, **backend_arguments(request.config, folder))  # type: ignore[no-any-return]

        return make


class TestPublication(_ByName, PublicationConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def inference_command(cls, request: pytest.FixtureRequest, conformance_model: Path) -> tuple[str, ...]:
        return command_of(inference_engine(request.config, installed_plugins()), conformance_model)


class TestBackend(_ByName, BackendConformance):
    pass
