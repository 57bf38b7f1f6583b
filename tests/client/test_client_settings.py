"""`_internal_config`: read once, when a model is made, and refused there by name, kind and range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import art
from art.dev import InternalModelConfig, PeftArgs, TrainerArgs, read_internal_config
from art_core.errors import UnknownArgument


def model(**config: Any) -> art.TrainableModel:
    return art.TrainableModel(name="m", project="p", base_model="b", _internal_config=InternalModelConfig(**config))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_arg": {}}, r"InternalModelConfig has no argument 'peft_arg'. Did you mean 'peft_args'"),
        ({"peft_args": {"lora_alhpa": 8}}, r"InternalModelConfig\['peft_args'\] has .* Did you mean 'lora_alpha'"),
        ({"peft_args": {"rank": 8}}, r"has no argument 'rank'.*It takes: bias, .*, use_rslora"),
        ({"trainer_args": {"adam_beta": 0.9}}, r"InternalModelConfig\['trainer_args'\].*Did you mean 'adam_beta"),
        # Of several faults the unknown word comes first: it may be all that is wrong.
        ({"peft_args": {"r": 0, "alpha": 1}}, "has no argument 'alpha'"),
    ],
)
def test_a_name_that_nothing_reads_is_refused_with_the_nearest(config: Any, says: str) -> None:
    with pytest.raises(UnknownArgument, match=says):
        model(**config)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"peft_args": None}, TypeError, r"\['peft_args'\] must be a dictionary, not None"),
        ({"peft_args": {"r": "8"}}, TypeError, r"\['peft_args'\]\['r'\] must be a whole number, not '8'"),
        ({"peft_args": {"r": 8.0}}, TypeError, r"must be a whole number, not 8.0"),
        ({"peft_args": {"r": True}}, TypeError, r"must be a whole number, not True"),
        ({"peft_args": {"r": 0}}, ValueError, r"\['r'\] must be greater than or equal to 1, not 0"),
        ({"peft_args": {"lora_alpha": 0}}, ValueError, r"\['lora_alpha'\] must be greater than 0, not 0"),
        ({"peft_args": {"lora_alpha": float("nan")}}, ValueError, r"must be a finite number, not nan"),
        ({"peft_args": {"lora_dropout": 1}}, ValueError, r"\['lora_dropout'\] must be less than 1"),
        ({"peft_args": {"use_rslora": 1}}, TypeError, r"\['use_rslora'\] must be a valid boolean"),
        ({"peft_args": {"bias": "some"}}, ValueError, r"must be 'none', 'all' or 'lora_only', not 'some'"),
        ({"peft_args": {"target_modules": []}}, TypeError, r"\['target_modules'\] must be text or a list of names"),
        ({"peft_args": {"target_modules": ["q", 3]}}, TypeError, r"must be text or a list of names, not \['q', 3\]"),
        ({"trainer_args": {"adam_beta1": 1.0}}, ValueError, r"\['adam_beta1'\] must be less than 1"),
        ({"trainer_args": {"adam_beta2": -0.1}}, ValueError, r"must be greater than or equal to 0"),
        ({"trainer_args": {"adam_epsilon": 0}}, ValueError, r"must be greater than 0"),
        ({"trainer_args": {"weight_decay": -1}}, ValueError, r"must be greater than or equal to 0"),
        ({"trainer_args": {"max_grad_norm": 0}}, ValueError, r"must be greater than 0"),
        ({"trainer_args": {"max_seq_length": 0}}, ValueError, r"\['max_seq_length'\] must be greater than or equal"),
        ({"init_args": {"max_seq_length": 0}}, ValueError, r"\['init_args'\]\['max_seq_length'\] must be greater"),
        ({"init_args": {"dtype": 16}}, TypeError, r"\['dtype'\] must be text, not 16"),
        ({"engine_args": {"max_model_len": 0}}, ValueError, r"\['max_model_len'\] must be greater than or equal to 1"),
        ({"engine_args": {"max_lora_rank": "16"}}, TypeError, r"\['max_lora_rank'\] must be a whole number"),
        ({"chat_template_kwargs": []}, TypeError, r"\['chat_template_kwargs'\] must be a dictionary"),
        ({"inference_gpu_ids": [1]}, ValueError, "trainer_gpu_ids is missing"),
        ({"inference_gpu_ids": [0, 0]}, ValueError, "names a GPU twice"),
        ({"trainer_gpu_ids": [0], "inference_gpu_ids": (1, 1)}, ValueError, "names a GPU twice"),
        ({"trainer_gpu_ids": 0, "inference_gpu_ids": [1]}, ValueError, "list of GPU indices such as"),
        ({"trainer_gpu_ids": [True], "inference_gpu_ids": [1]}, ValueError, "list of GPU indices such as"),
        ({"trainer_gpu_ids": None, "inference_gpu_ids": None}, ValueError, "list of GPU indices such as"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_setting(config: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        model(**config)


@pytest.mark.parametrize("config", [["engine_args"], "engine_args", 3])
def test_what_is_no_dictionary_of_settings_is_refused(config: Any) -> None:
    with pytest.raises(TypeError, match="_internal_config must be a dictionary"):
        art.TrainableModel(name="m", project="p", base_model="b", _internal_config=config)


def test_what_was_read_is_handed_to_the_backend_and_cannot_be_changed_from_outside() -> None:
    given: Any = {
        "engine_args": {"max_model_len": None, "swap_space": 4, "nested": {"a": [1]}},
        "init_args": {"load_in_4bit": True, "max_seq_length": 512},
        "peft_args": {"r": 4, "lora_alpha": 8, "target_modules": ("q_proj", "v_proj"), "lora_dropout": 0.05},
        "trainer_args": {"adam_beta1": 0, "weight_decay": 0.0},
        "trainer_gpu_ids": (0, 1),
        "inference_gpu_ids": [2],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    made = model(**given)
    assert made.internal_config == given | {"peft_args": given["peft_args"] | {"target_modules": ["q_proj", "v_proj"]}}
    given["peft_args"]["r"] = 0
    assert made.internal_config["peft_args"]["r"] == 4
    assert read_internal_config(made.internal_config) == made.internal_config


def test_a_folder_may_be_given_as_a_path() -> None:
    made = art.TrainableModel(name="m", project="p", base_model=Path("weights") / "llama", base_path=Path("there"))
    assert (made.base_model, made.base_path) == ("weights/llama", "there")


def test_the_lists_of_names_are_those_of_the_kits_that_read_them() -> None:
    lora_shape = pytest.importorskip("art_engine_kit.lora_shape")
    optimizer = pytest.importorskip("art_training_kit.optimizer")
    assert PeftArgs.__annotations__.keys() == lora_shape.LoraShape.model_fields.keys()
    assert TrainerArgs.__annotations__.keys() == {*optimizer.OptimizerOptions.model_fields, "max_seq_length"}


numbers = st.one_of(st.integers(-2, 40), st.floats(allow_subnormal=False), st.booleans(), st.none(), st.just("8"))
peft_args = st.fixed_dictionaries(
    {},
    optional={
        "r": numbers,
        "lora_alpha": numbers,
        "use_rslora": numbers,
        "random_state": numbers,
        "target_modules": st.one_of(st.none(), st.text(max_size=2), st.lists(st.text(min_size=1, max_size=3)), numbers),
    },
)
trainer_args = st.fixed_dictionaries(
    {},
    optional={name: numbers for name in TrainerArgs.__annotations__ if name != "max_seq_length"},
)


@given(given_args=peft_args)
def test_what_is_taken_for_an_adapter_is_what_the_kit_takes(given_args: dict[str, Any]) -> None:
    lora_shape = pytest.importorskip("art_engine_kit.lora_shape")
    try:
        read = read_internal_config({"peft_args": given_args})
    except (TypeError, ValueError):
        with pytest.raises(ValueError, match="peft_args"):
            lora_shape.LoraShape.of(given_args)
    else:
        lora_shape.LoraShape.of(read["peft_args"])


@given(given_args=trainer_args)
def test_what_is_taken_for_the_optimizer_is_what_the_training_kit_takes(given_args: dict[str, Any]) -> None:
    optimizer = pytest.importorskip("art_training_kit.optimizer")
    try:
        read = read_internal_config({"trainer_args": given_args})
    except (TypeError, ValueError):
        return
    optimizer.OptimizerOptions.of(read["trainer_args"])
