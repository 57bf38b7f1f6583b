"""Which engines are taken when none is named: what the cards say, among those that can run as things are."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from art_backend_local.client.engine_choice import choose_engines
from art_core import InferenceEngineSpec, PluginRegistry, TrainingEngineSpec, hookimpl
from art_engine_kit.environment import EnvironmentSpec

HERE = EnvironmentSpec(provided_by=("pytest",), shown=(), flavours={})
MISSING = EnvironmentSpec(provided_by=("no-such-distribution",), shown=(), flavours={})


def registry_of(*training: TrainingEngineSpec) -> PluginRegistry:
    """A registry with one inference engine and these training engines."""

    class Engines:
        art_api = 1

        @hookimpl
        def art_register_inference_engines(self) -> Iterable[InferenceEngineSpec]:
            return [InferenceEngineSpec(name="serves", factory="nowhere:Serves", summary="Serves.")]

        @hookimpl
        def art_register_training_engines(self) -> Iterable[TrainingEngineSpec]:
            return training

    registry = PluginRegistry()
    registry.register(Engines(), name="engines")
    return registry


def card(name: str, environment: str | None = None, **settings: bool) -> TrainingEngineSpec:
    return TrainingEngineSpec(name=name, factory="nowhere:X", summary="Trains.", environment=environment, **settings)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    """`engine_places:HERE` is an environment that this process holds, `engine_places:MISSING` is still to be made."""
    monkeypatch.setitem(sys.modules, "engine_places", SimpleNamespace(HERE=HERE, MISSING=MISSING))


EMBEDDED = card("embedded")
OWN = card("a-own", "engine_places:HERE")
RECOMMENDED = card("z-recommended", "engine_places:HERE", recommended_on_gpu=True)


@pytest.mark.usefixtures("places")
def test_on_a_gpu_the_recommended_one_is_taken_and_elsewhere_the_embedded_one() -> None:
    registry = registry_of(EMBEDDED, OWN, RECOMMENDED)
    on_gpu = choose_engines(registry, inference=None, training=None, has_gpu=True)
    assert on_gpu.training == "z-recommended"
    assert "recommended" in on_gpu.reason
    assert choose_engines(registry, inference=None, training=None, has_gpu=False).training == "embedded"


@pytest.mark.usefixtures("places")
def test_the_recommended_one_is_passed_over_until_its_environment_is_made() -> None:
    unmade = card("z-recommended", "engine_places:MISSING", recommended_on_gpu=True)
    chosen = choose_engines(registry_of(EMBEDDED, OWN, unmade), inference=None, training=None, has_gpu=True)
    assert chosen.training == "a-own"


@pytest.mark.usefixtures("places")
def test_a_name_that_was_given_stays() -> None:
    registry = registry_of(EMBEDDED, OWN, RECOMMENDED)
    assert choose_engines(registry, inference=None, training="embedded", has_gpu=True).training == "embedded"
