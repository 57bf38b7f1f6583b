"""The options of train: one list, which signatures show and whose ranges the client holds before anything starts."""

import inspect
import math
import re
import types
import typing
from pathlib import Path

import pytest

import art
from art_backend_local import LocalBackend
from art_core.errors import NotRegistered, UnknownArgument
from art_engine_kit.train_options import TrainOptions

HUGE = 1e300
# Of every numeric option: the lowest and the highest values that are taken, and the nearest that aren't.
RANGES = {
    "learning_rate": ([0, 1e-6, HUGE], [-1e-9]),
    "kl_penalty_coef": ([0, 0.1, HUGE], [-1e-9]),
    "kl_penalty_reference_step": ([0, 7], [-1, 0.5]),
    "epsilon": ([0, 0.2, HUGE], [-1e-9]),
    "epsilon_high": ([0, 4, HUGE], [-1e-9]),
    "advantage_balance": ([-1, 0, 1], [-1.0001, 1.0001]),
    "max_negative_advantage_importance_sampling_weight": ([5e-324, 1, HUGE], [0, -1]),
    "kimi_k2_tau": ([-HUGE, 0, HUGE], []),
    "truncated_importance_sampling": ([5e-324, 1, HUGE], [0, -1]),
    "packed_sequence_length": ([1, 2048], [0, 1.5]),
    "grad_accumulation_sequences": ([1, 1000], [0, 1.5]),
    "num_trajectories_learning_rate_multiplier_power": ([-1, 0, 0.5, 1], [-1.0001, 1.0001]),
}


def kinds_of(annotation):
    union = isinstance(annotation, types.UnionType)
    return set(typing.get_args(annotation)) if union else {annotation}


def test_every_numeric_option_has_a_range():
    numeric = {name for name, field in TrainOptions.model_fields.items() if kinds_of(field.annotation) & {int, float}}
    assert numeric == RANGES.keys()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (good, _) in RANGES.items() for value in good])
async def test_a_value_in_its_range_is_taken(name, value, tmp_path, make_policy, fake_engines):
    async with LocalBackend(path=tmp_path) as backend:
        with pytest.raises(NotRegistered):
            await backend.train(make_policy(), [], **{name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, (_, bad) in RANGES.items()
        for value in (*bad, math.nan, math.inf, -math.inf, "much", [1])
    ],
)
async def test_a_value_outside_of_it_is_refused_by_name_before_anything_starts(
    name, value, tmp_path, make_policy, fake_engines
):
    async with LocalBackend(path=tmp_path) as backend:
        with pytest.raises(ValueError, match=rf"^LocalBackend\.train: {name}: "):
            await backend.train(make_policy(), [], **{name: value})
    assert not list(tmp_path.iterdir())


async def test_an_option_that_nothing_reads_is_named(tmp_path, make_policy, fake_engines):
    async with LocalBackend(path=tmp_path) as backend:
        with pytest.raises(UnknownArgument, match=r"'lerning_rate'.* Did you mean 'learning_rate'"):
            await backend.train(make_policy(), [], lerning_rate=1)


def test_the_signature_is_the_list():
    parameters = inspect.signature(LocalBackend.train).parameters
    shown = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert list(shown.items()) == [(name, field.default) for name, field in TrainOptions.model_fields.items()]
    hints = typing.get_type_hints(LocalBackend.train)
    for name, field in TrainOptions.model_fields.items():
        taken = kinds_of(field.annotation)
        # What becomes a Path may be given as text.
        assert kinds_of(hints[name]) == taken | ({str} if Path in taken else set()), name


def test_the_config_of_the_deprecated_train_has_the_same_defaults_and_ranges():
    for name, field in art.TrainConfig.model_fields.items():
        listed = TrainOptions.model_fields[name]
        assert (field.annotation, field.default) == (listed.annotation, listed.default)
        for value in RANGES[name][0]:
            art.TrainConfig(**{name: value})
        for value in (*RANGES[name][1], math.nan, math.inf):
            with pytest.raises(ValueError, match=name):
                art.TrainConfig(**{name: value})


# Of every numeric setting of the backend.
BACKEND_RANGES = {
    "max_adapters": ([2, 40], [1, 0, -1, True, 2.5, math.nan, math.inf, "8", None]),
    "idle_timeout_s": ([0.5, 1800, math.inf], [0, -1, True, math.nan, -math.inf, "60", None]),
    "inference_replicas": ([1, 2], [0, -1, True, 1.0, math.nan, "2", None]),
}


def test_every_numeric_setting_of_the_backend_has_a_range():
    hints = typing.get_type_hints(LocalBackend.__init__)
    assert {name for name, hint in hints.items() if kinds_of(hint) & {int, float}} == BACKEND_RANGES.keys()


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, (good, _) in BACKEND_RANGES.items() for v in good])
def test_a_setting_of_the_backend_in_its_range_is_taken(name, value, tmp_path, fake_engines):
    LocalBackend(path=tmp_path, **{name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, (_, bad) in BACKEND_RANGES.items() for v in bad])
def test_a_setting_of_the_backend_outside_of_it_is_refused_by_name(name, value, tmp_path, fake_engines):
    with pytest.raises(ValueError, match=rf"^{name} must be a .*not {re.escape(repr(value))}"):
        LocalBackend(path=tmp_path, **{name: value})
    assert not list(tmp_path.iterdir())
