"""Names: what may be a project or a model, and how steps are written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_core import ModelKey, check_name, inference_name
from art_core.errors import InvalidName
from art_core.names import adapter_name, parse_inference_name

GOOD = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)


@given(GOOD)
def test_a_good_name_is_given_back_and_is_one_folder(name: str) -> None:
    assert check_name(name, what="model name") == name
    assert ModelKey("p", name).folder(Path("/base")) == Path("/base/p/models") / name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-flag",
        "_x",
        "a/b",
        "a\\b",
        "../up",
        "a b",
        "a@3",
        "ä",
        "a\n",
        "a\x00",
        "a:b",
        "x" * 129,
    ],
)
def test_other_names_are_refused_in_either_place(name: str) -> None:
    for make in (lambda: ModelKey("project", name), lambda: ModelKey(name, "agent")):
        with pytest.raises(InvalidName, match="letters, digits"):
            make()


@pytest.mark.parametrize("name", [None, 3, b"agent", ["agent"]])
def test_what_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(InvalidName):
        check_name(name, what="project")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "found"), [("a b", "a-b"), ("../up", "up"), ("agent@3", "agent-3"), ("ünï 1", "n-1")])
def test_a_refusal_suggests_a_name_that_would_do(name: str, found: str) -> None:
    with pytest.raises(InvalidName, match=f"'{found}' would do"):
        ModelKey("project", name)


@given(st.text())
def test_a_refusal_suggests_only_names_that_are_allowed(name: str) -> None:
    try:
        check_name(name, what="model name")
    except InvalidName as error:
        _, found, rest = str(error).rpartition("characters. ")
        if found and rest:
            suggestion = rest.removesuffix(" would do.").strip("'")
            assert check_name(suggestion, what="model name") == suggestion


@given(GOOD, st.none() | st.integers(0, 10**9 - 1))
def test_a_name_and_a_step_survive_being_written(name: str, step: int | None) -> None:
    assert parse_inference_name(inference_name(name, step)) == (name, step)


@pytest.mark.parametrize(
    "text", ["agent@", "agent@latest", "agent@-1", "agent@1.5", "agent@3@4", "agent@٣", "a@" + "9" * 5000]
)
def test_a_step_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidName, match="after '@' comes a step number"):
        parse_inference_name(text)


def test_an_adapter_name_holds_the_project_too() -> None:
    key = ModelKey("shop", "agent")
    assert adapter_name(key, 12) == "shop/agent@12"
    assert str(key) == "shop/agent"
    assert {key: 1}[ModelKey("shop", "agent")] == 1
    assert ModelKey("a", "z") < ModelKey("b", "a")
