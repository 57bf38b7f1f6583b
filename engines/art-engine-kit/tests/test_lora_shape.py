"""`peft_args`: what a new adapter is made with, and what one that is there is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from art_core.errors import AdapterMismatch, UnknownArgument
from art_engine_kit.adapter_config import AdapterConfig
from art_engine_kit.base_shapes import LinearShapes
from art_engine_kit.lora_shape import LoraShape, check_asked

WHERE = Path("there")


@pytest.mark.parametrize(
    ("peft_args", "error", "says"),
    [
        ({"rank": 8}, UnknownArgument, "no argument 'rank'"),
        ({"lora_alpa": 8}, UnknownArgument, "Did you mean 'lora_alpha'"),
        ({"r": 0}, ValueError, r"\['r'\]=0 must be greater than or equal to 1"),
        ({"r": 8.5}, ValueError, r"\['r'\]=8.5 must be a valid integer"),
        ({"lora_alpha": -1}, ValueError, r"\['lora_alpha'\]=-1 must be greater than 0"),
        ({"lora_alpha": float("inf")}, ValueError, r"\['lora_alpha'\]=inf must be a finite number"),
        ({"target_modules": []}, ValueError, r"\['target_modules'\]=\[\] must have at least 1 item"),
        ({"lora_dropout": 0.1}, ValueError, "lora_dropout=0 and bias='none' only"),
        ({"bias": "all"}, ValueError, "lora_dropout=0 and bias='none' only"),
    ],
)
def test_what_cannot_be_is_refused_by_name(peft_args: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        LoraShape.of(peft_args)


def test_what_is_left_out_has_its_default() -> None:
    assert LoraShape.of({"target_modules": {"v_proj", "q_proj"}, "lora_dropout": 0, "bias": "none"}) == LoraShape(
        r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"), use_rslora=False, random_state=3407
    )


def made(**settings: Any) -> AdapterConfig:
    return AdapterConfig(**{"r": 8, "lora_alpha": 16.0, "target_modules": ("q_proj", "v_proj")} | settings)


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({"r": 16}, {}),
        ({"lora_alpha": 8}, {}),
        ({"use_rslora": True}, {}),
        ({"use_rslora": False}, {"use_rslora": True}),
        ({"target_modules": ["q_proj"]}, {}),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, {}),
        ({"target_modules": "all-linear"}, {}),
        ({"target_modules": ".*q_proj"}, {}),
        ({"target_modules": ["q_proj", "v_proj"]}, {"layers_to_transform": (0,)}),
    ],
)
def test_another_shape_than_the_adapter_has_is_refused_with_both(
    asked: dict[str, Any], settings: Any, shapes: LinearShapes
) -> None:
    ((name, value),) = asked.items()
    with pytest.raises(AdapterMismatch) as refusal:
        check_asked(asked, made(**settings), where=WHERE, modules=shapes)
    said = str(refusal.value)
    assert f"peft_args asks for {name}={value!r}, but the adapter in there was made with" in said
    assert "leave it out of peft_args, or use another model name" in said


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({}, {}),
        ({"r": 8, "lora_alpha": 16, "use_rslora": False, "random_state": 1}, {}),
        ({"target_modules": ("v_proj", "q_proj")}, {}),
        ({"target_modules": None}, {}),
        ({"target_modules": r".*\.(q|v)_proj"}, {}),
        ({"target_modules": ["self_attn.q_proj", "self_attn.v_proj"]}, {}),
        ({"target_modules": "all-linear"}, {"target_modules": r"model\.layers\..*_proj"}),
    ],
)
def test_the_same_shape_in_other_words_is_the_same(asked: Any, settings: Any, shapes: LinearShapes) -> None:
    check_asked(asked, made(**settings), where=WHERE, modules=shapes)


def test_without_the_base_lists_are_held_against_lists() -> None:
    check_asked({"target_modules": ["v_proj", "q_proj"]}, made(), where=WHERE)
    check_asked({"target_modules": "all-linear"}, made(), where=WHERE)
    with pytest.raises(AdapterMismatch, match="target_modules"):
        check_asked({"target_modules": ["v_proj"]}, made(), where=WHERE)
