"""A user's settings of a server: written as its command line wants them, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from art_core.errors import UnknownArgument
from art_engine_kit.server_arguments import ServerArguments, users_arguments

SERVER = ServerArguments(
    values=frozenset({"max_model_len", "rope_scaling"}),
    lists=frozenset({"target_modules"}),
    flags=frozenset({"eager"}),
    switches=frozenset({"prefix_caching"}),
)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, []),
        ({"max_model_len": 2048}, ["--max-model-len", "2048"]),
        ({"max-model-len": 2048}, ["--max-model-len", "2048"]),
        ({"max_model_len": None}, []),
        ({"rope_scaling": {"type": "yarn"}}, ["--rope-scaling", '{"type": "yarn"}']),
        ({"target_modules": ["q_proj", "v_proj"]}, ["--target-modules", "q_proj", "v_proj"]),
        ({"target_modules": "q_proj"}, ["--target-modules", "q_proj"]),
        ({"eager": True, "prefix_caching": True}, ["--eager", "--prefix-caching"]),
        ({"eager": False, "prefix_caching": False}, ["--no-prefix-caching"]),
        ({"--brand-new": 3}, ["--brand-new", "3"]),
        ({"--brand-new": True, "--other": False}, ["--brand-new"]),
    ],
)
def test_settings_become_words(options: dict[str, Any], words: list[str]) -> None:
    assert SERVER.command_line(options, where="engine_args") == words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eager": "yes"}, "eager is on or off, so it takes True or False, not 'yes'"),
        ({"prefix_caching": 1}, "prefix_caching is on or off"),
        ({"max_model_len": True}, "max_model_len takes one value, not True"),
        ({"max_model_len": [1, 2]}, "max_model_len takes one value"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^engine_args: {said}"):
        SERVER.command_line(options, where="engine_args")


def test_a_misspelt_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        UnknownArgument, match=r"engine_args has no argument 'max_modl_len'\. Did you mean 'max_model_len'"
    ):
        SERVER.command_line({"max_modl_len": 1}, where="engine_args")


def test_a_users_arguments_are_options_and_variables() -> None:
    given = {"max-model-len": 3, "--brand-new": 1, "env": {"THREADS": 2}}
    assert users_arguments(given, decided={}, where="engine_args") == (
        {"max_model_len": 3, "--brand-new": 1},
        {"THREADS": "2"},
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"host": "0.0.0.0"}, "host can't be set. Servers listen here only."),
        ({"--host": "0.0.0.0"}, "--host can't be set. Servers listen here only."),
        ({"env": "A=1"}, "env takes a dictionary of variables"),
    ],
)
def test_what_follows_from_the_launch_cannot_be_given(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^engine_args: {said}"):
        users_arguments(given, decided={"host": "Servers listen here only."}, where="engine_args")
