"""Whole numbers that a server's tensors can't hold never reach it, nor anything else in the place of an object."""

from __future__ import annotations

from typing import Any

import pytest

from art_core.errors import InvalidRequest
from art_engine_kit.plain_request import OBJECTS, WHOLE_NUMBERS, plain_request

SCALARS = [name for name in WHOLE_NUMBERS if name not in ("prompt", "stop_token_ids", "logit_bias")]
TOO_LARGE = [2**31, -(2**31), 10**20, 10**400, 1e300, float("inf"), "99999999999"]


@pytest.mark.parametrize("value", TOO_LARGE, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("name", SCALARS)
def test_a_number_of_more_than_32_bits_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: must be a whole number between -2147483647 and") as refused:
        plain_request("completions", {"prompt": "a", name: value})
    assert refused.value.param == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop_token_ids": [5, 2**31]}, "stop_token_ids.1"),
        ({"prompt": [5, 10**20]}, "prompt.1"),
        ({"prompt": [[5], [2**40]]}, "prompt.1.0"),
        ({"logit_bias": {"5": 1, "99999999999": 1}}, "logit_bias.99999999999"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_so_is_one_among_others(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        plain_request("completions", {"prompt": "a", **fields})
    assert refused.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -1},
        {"top_k": 2**31 - 1},
        {"seed": -(2**62)},
        {"prompt": "99999999999"},
        {"prompt": ["99999999999", "b"]},
        {"logprobs": True},
        {"stop_token_ids": "no list"},
        {"logit_bias": {"5": -100.0}},
    ],
)
def test_whatever_else_is_the_servers_to_judge(fields: dict[str, Any]) -> None:
    body = {"prompt": "a", **fields}
    assert plain_request("completions", body) == body


@pytest.mark.parametrize("value", ["x" * 5000, 5, [1], True], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_no_object_is_refused_where_one_belongs(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: must be an object") as refused:
        plain_request("completions", {"prompt": "a", name: value})
    assert refused.value.param == name
