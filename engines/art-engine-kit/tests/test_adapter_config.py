"""PEFT's configs: every setting of PEFT's is known, and what is taken means what PEFT means by it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_core.errors import AdapterMismatch
from art_engine_kit.adapter_config import (
    HARMLESS,
    PLAIN_INITS,
    REFUSED,
    AdapterConfig,
    base_model_of_adapter,
    read_adapter_config,
)

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
MODULES = [
    *(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1, 10) for name in ("q_proj", "k_proj", "v_proj")),
    *(f"model.layers.{layer}.mlp.{name}" for layer in (0, 1, 10) for name in ("gate_proj", "down_proj")),
    "model.tower.0.layers.1.q_proj",
    "q_proj",
]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def config(**changes: Any) -> Path:
        (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
        return tmp_path

    return config


def test_every_setting_of_pefts_is_known() -> None:
    peft = pytest.importorskip("peft")
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    ours = {*AdapterConfig.model_fields, *HARMLESS, *REFUSED, "init_lora_weights"}
    assert theirs == ours


def test_a_config_that_peft_wrote_is_taken(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.05).save_pretrained(tmp_path)
    config = read_adapter_config(tmp_path)
    assert (config.r, config.lora_alpha, config.target_modules, config.lora_dropout) == (4, 8, ("q_proj",), 0.05)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_changes_more_than_lora_weights_is_refused_by_name_and_taken_where_it_is_off(
    name: str, write: Any
) -> None:
    for on in (True, ["lm_head"], {"a": 1}, "all"):
        with pytest.raises(AdapterMismatch, match=rf"adapter_config\.json says {name}=.* refused\. \w+") as failure:
            read_adapter_config(write(**{name: on}))
        assert REFUSED[name] in str(failure.value)
    for off in (None, False, [], {}, *(["none"] if name == "bias" else [])):
        assert read_adapter_config(write(**{name: off})).r == 4


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_what_says_nothing_about_the_weights_is_passed_over(name: str, write: Any) -> None:
    assert read_adapter_config(write(**{name: {"a": 1}})) == read_adapter_config(write())


@pytest.mark.parametrize("init", [True, False, None, *PLAIN_INITS])
def test_inits_that_leave_the_base_as_it_is(init: Any, write: Any) -> None:
    assert read_adapter_config(write(init_lora_weights=init)).to_peft()["init_lora_weights"] is True


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "unheard_of"])
def test_inits_that_change_the_base_are_refused(init: str, write: Any) -> None:
    with pytest.raises(AdapterMismatch, match=rf"init_lora_weights='{init}'.*path_initial_model_for_weight_conversion"):
        read_adapter_config(write(init_lora_weights=init))


def test_a_setting_of_a_later_peft_is_refused_unless_it_is_off(write: Any) -> None:
    assert read_adapter_config(write(use_tomorrow=False, tomorrow_config=None)).r == 4
    with pytest.raises(AdapterMismatch, match=r"use_tomorrow=True, a setting that is not known here.*turn it off"):
        read_adapter_config(write(use_tomorrow=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; only LoRA"),
        ({"peft_type": None}, r"peft_type is None"),
        ({"r": 0}, r"r: must be greater than or equal to 1. It is 0"),
        ({"r": "four"}, r"r: must be a valid integer. It is 'four'"),
        ({"r": True}, r"r: must be a valid integer"),
        ({"r": None}, r"r: must be a valid integer"),
        ({"lora_alpha": None}, r"lora_alpha: must be a valid number"),
        ({"lora_dropout": 1.0}, r"lora_dropout: must be less than 1"),
        ({"use_rslora": "yes"}, r"use_rslora: must be a valid boolean"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern: must be greater than or equal to 1"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern: must be a valid dictionary"),
        ({"alpha_pattern": {"q_proj": "8"}}, r"alpha_pattern: must be a valid number"),
        ({"alpha_pattern": {"q_proj(": 8}}, r"'q_proj\(' is not a regular expression"),
        ({"target_modules": "q_proj("}, r"'q_proj\(' is not a regular expression"),
        ({"target_modules": None}, r"names no target_modules. Put the names"),
        ({"target_modules": []}, r"names no target_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"names 'lm_head'. .* as the base model has them"),
        ({"target_modules": ["model.embed_tokens"]}, r"names 'model.embed_tokens'"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, r"layers_to_transform needs target_modules"),
        ({"layers_pattern": ["layers"]}, r"layers_pattern says nothing without layers_to_transform"),
    ],
)
def test_what_cannot_be_is_refused_with_the_file_and_the_setting(changes: Any, says: str, write: Any) -> None:
    with pytest.raises(AdapterMismatch, match=rf"(?s)adapter_config\.json.*{says}"):
        read_adapter_config(write(**changes))


def test_files_that_are_no_config(write: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterMismatch, match="there is no adapter folder"):
        read_adapter_config(tmp_path / "nowhere")
    with pytest.raises(AdapterMismatch, match="so it is no PEFT adapter"):
        read_adapter_config(tmp_path)
    for content, says in ((b"{", "cannot be read as JSON"), (b"[1]", "no JSON object"), (b"\xff", "cannot be read")):
        (tmp_path / "adapter_config.json").write_bytes(content)
        with pytest.raises(AdapterMismatch, match=says):
            read_adapter_config(tmp_path)
    with pytest.raises(AdapterMismatch, match="does not say its base model"):
        base_model_of_adapter(write())
    assert base_model_of_adapter(write(base_model_name_or_path="qwen")) == "qwen"


def test_what_is_written_is_read_back_and_says_that_nothing_is_dropped(tmp_path: Path) -> None:
    config = AdapterConfig(
        r=4,
        lora_alpha=8,
        target_modules=("q_proj",),
        exclude_modules=".*layers.0.*",
        layers_to_transform=(1,),
        layers_pattern=("layers",),
        rank_pattern={"q_proj": 2},
        alpha_pattern={"k_proj": 3},
        use_rslora=True,
        lora_dropout=0.1,
    )
    config.write(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    assert read_adapter_config(tmp_path) == config.model_copy(update={"lora_dropout": 0.0})


names = st.sampled_from(["q_proj", "v_proj", "gate_proj", "self_attn.k_proj", *MODULES[:4], "proj"])
patterns = st.sampled_from(
    [
        "q_proj",
        "self_attn.q_proj",
        r"layers\.1\..*",
        r".*\.0\..*",
        "^model.layers.0.self_attn.k_proj",
        "(q|v)_proj",
        "x",
    ]
)
configs = st.fixed_dictionaries(
    {
        "r": st.integers(1, 64),
        "lora_alpha": st.integers(1, 64),
        "use_rslora": st.booleans(),
        "target_modules": st.one_of(
            st.lists(names, min_size=1, max_size=3, unique=True),
            st.sampled_from([r".*\.self_attn\..*", r"model\.layers\.\d+\.mlp\.down_proj", ".*q_proj"]),
        ),
        "rank_pattern": st.dictionaries(patterns, st.integers(1, 64), max_size=3),
        "alpha_pattern": st.dictionaries(patterns, st.integers(1, 64), max_size=3),
        "exclude_modules": st.one_of(
            st.none(), st.lists(names, max_size=2), st.sampled_from([r".*layers\.0.*", ".*k_proj"])
        ),
        "layers_to_transform": st.one_of(st.none(), st.integers(0, 10), st.lists(st.integers(0, 10), min_size=1)),
        "layers_pattern": st.sampled_from([None, [], "layers", ["layers"], ["tower", "layers"]]),
    }
)


@given(given_config=configs)
def test_modules_ranks_and_scales_are_those_that_peft_finds(given_config: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    try:
        theirs = peft.LoraConfig(**given_config)
    except ValueError:
        # An empty list says nothing, so that it is no fault here.
        if given_config["layers_to_transform"] is not None or given_config["layers_pattern"]:
            with pytest.raises(ValueError, match="layers_"):
                AdapterConfig.model_validate(given_config)
        return
    ours = AdapterConfig.model_validate(given_config)
    chosen = [module for module in MODULES if check_target_module_exists(theirs, module)]
    assert ours.modules(MODULES) == chosen
    for module in chosen:
        rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern.keys(), module), theirs.r)
        alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern.keys(), module), theirs.lora_alpha)
        assert ours.rank(module) == rank
        assert ours.scaling(module) == pytest.approx(alpha / (rank**0.5 if theirs.use_rslora else rank))
