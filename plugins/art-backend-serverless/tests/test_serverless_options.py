"""What train can be told: each argument reaches the wire or is refused by name before anything is sent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import art
from art_backend_serverless import ServerlessBackend
from art_backend_serverless.options import OWN, PUBLISHED, RemoteTrainOptions
from art_core.errors import InvalidTrajectory, NotRegistered, UnknownArgument

PAGE = Path(__file__).parents[3] / "docs" / "serverless.md"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("ppo", True), ("epsilon", 0.1), ("epsilon_high", 5.0), ("advantage_balance", -0.5)),
        *(("scale_rewards", False), ("importance_sampling_level", "sequence"), ("mask_prob_ratio", True)),
        *(("max_negative_advantage_importance_sampling_weight", 2.0), ("kimi_k2_tau", 0.1)),
        ("precalculate_logprobs", True),
    ],
)
async def test_each_published_option_is_sent_as_it_is(
    cloud: Any, serverless: Any, model: Any, groups: Any, argument: str, value: Any
) -> None:
    await serverless.train(model, groups, **{argument: value})
    (job,) = cloud.calls("POST", ".*training-jobs")
    assert job.json["experimental_config"] == {"learning_rate": 5e-6, argument: value}


@pytest.mark.parametrize("argument", [*OWN, "learning_rat", "plot_tensors", "kl_ref_adapter_path"])
async def test_what_the_service_doesn_t_take_is_refused_before_anything_is_sent(
    cloud: Any, serverless: Any, model: Any, groups: Any, argument: str
) -> None:
    value = {"allow_training_without_logprobs": True, "altered_sampling": "refuse"}.get(argument, 1)
    with pytest.raises(UnknownArgument) as refusal:
        await serverless.train(model, groups, **{argument: value})
    assert refusal.value.name == argument
    assert "learning_rate" in refusal.value.known
    assert not cloud.calls("POST", ".*training-jobs")


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": -1},
        {"learning_rate": float("nan")},
        {"advantage_balance": 2},
        {"importance_sampling_level": "word"},
        {"ppo": True, "loss_fn": "cispo"},
        {"scale_rewards": True, "normalize_advantages": False},
    ],
)
async def test_a_bad_value_is_refused_before_anything_is_sent(
    cloud: Any, serverless: Any, model: Any, groups: Any, options: Any
) -> None:
    with pytest.raises(ValueError, match="ServerlessBackend"):
        await serverless.train(model, groups, **options)
    assert not cloud.calls("POST", ".*training-jobs")


async def test_what_can_t_be_trained_on_is_refused_here(cloud: Any, serverless: Any, model: Any, groups: Any) -> None:
    groups[1].trajectories[0].reward = float("inf")
    with pytest.raises(InvalidTrajectory, match=r"trajectory_groups\[1\].trajectories\[0\]"):
        await serverless.train(model, groups)
    assert not cloud.calls("POST", ".*training-jobs")


async def test_settings_of_engines_are_refused_by_name(serverless: Any) -> None:
    model = art.TrainableModel(
        name="a", project="p", base_model="b", _internal_config={"trainer_gpu_ids": [0], "inference_gpu_ids": [1]}
    )
    with pytest.raises(ValueError, match="inference_gpu_ids, trainer_gpu_ids"):
        await model.register(serverless)


async def test_a_model_of_another_base_is_not_taken_for_this_one(serverless: Any, model: Any) -> None:
    other = art.TrainableModel(name=model.name, project=model.project, base_model="another/base")
    with pytest.raises(ValueError, match=r"made from the base model 'Qwen/Qwen2.5-0.5B-Instruct', not 'another/base'"):
        await other.register(serverless)


async def test_a_model_that_isn_t_registered_says_what_to_do(serverless: Any, groups: Any) -> None:
    model = art.TrainableModel(name="never", project="p", base_model="b")
    with pytest.raises(NotRegistered, match="register"):
        await serverless.train(model, groups)


@pytest.mark.parametrize(
    "base_url",
    ["", "api.training.wandb.ai/v1", "ftp://host/v1", "http://", "http://user:secret@host/v1", "http://h/v1?key=1", 3],
)
def test_what_is_no_address_is_refused(base_url: Any) -> None:
    with pytest.raises(ValueError, match="base_url") as refusal:
        ServerlessBackend("k", base_url)
    assert "secret" not in str(refusal.value)


def test_an_address_that_others_can_read_along_is_warned_of() -> None:
    with pytest.warns(RuntimeWarning, match="isn't https"):
        ServerlessBackend("k", "http://training.example/v1/")
    assert ServerlessBackend("k", "http://127.0.0.1:1/v1/").base_url == "http://127.0.0.1:1/v1"


def test_the_page_names_every_argument() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("| argument |") :].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table)) - {"capabilities"}
    assert named == set(RemoteTrainOptions.model_fields)
    assert {*PUBLISHED, *OWN} <= named
