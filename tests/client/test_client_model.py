"""A model by itself: how it is made, registered and named, the state it keeps, and which of its checkpoints stay."""

import dataclasses
import json
import math
import pickle
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

import art
from art.best_step import best_step
from art.dev import InternalModelConfig
from art_core import ModelKey
from art_core.errors import InvalidName, NotRegistered, UnknownArgument
from art_core.history import append_history


def folder_of(model):
    return ModelKey(model.project, model.name).folder(Path(model.base_path))


# construction


def test_the_arguments_and_defaults():
    model = art.Model(name="gpt-4.1", project="task")
    assert model.model_dump() == {
        "name": "gpt-4.1",
        "project": "task",
        "entity": None,
        "id": None,
        "config": None,
        "inference_api_key": None,
        "inference_base_url": None,
        "inference_model_name": None,
        "base_path": ".art",
        "report_metrics": None,
    }
    assert model.trainable is False
    trainable = art.TrainableModel(name="agent-001", project="my-agentic-task", base_model="Qwen/Qwen2.5-14B-Instruct")
    assert trainable.trainable is True
    assert trainable.base_model == "Qwen/Qwen2.5-14B-Instruct"
    assert trainable.internal_config == {}


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a b", "name@3", ".hidden", "ünï", "x" * 129, None])
def test_names_that_cannot_be_folders_are_refused(name):
    with pytest.raises(InvalidName, match="model name"):
        art.TrainableModel(name=name, project="p", base_model="b")
    with pytest.raises(InvalidName, match="project"):
        art.Model(name="m", project=name)


def test_unknown_arguments_are_refused_with_the_nearest():
    with pytest.raises(UnknownArgument, match="Did you mean 'base_model'"):
        art.TrainableModel(name="m", project="p", base_modle="b")
    with pytest.raises(UnknownArgument, match="Did you mean 'inference_api_key'"):
        art.Model(name="m", project="p", inference_apikey="k")
    with pytest.raises(UnknownArgument, match="Model has no argument 'base_model'"):
        art.Model(name="m", project="p", base_model="b")
    with pytest.raises(ValidationError, match="project"):
        art.Model(name="m")


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"engine_arg": {}}, UnknownArgument, "Did you mean 'engine_args'"),
        ({"trainer_gpu_ids": [0]}, ValueError, "inference_gpu_ids is not"),
        ({"trainer_gpu_ids": [], "inference_gpu_ids": [1]}, ValueError, "trainer_gpu_ids is empty"),
        ({"trainer_gpu_ids": [0, 1], "inference_gpu_ids": [1]}, ValueError, "share GPU 1"),
        ({"trainer_gpu_ids": [0, 0], "inference_gpu_ids": [1]}, ValueError, "names a GPU twice"),
        ({"trainer_gpu_ids": ["0"], "inference_gpu_ids": [1]}, ValueError, "list of GPU indices"),
        ({"trainer_gpu_ids": [-1], "inference_gpu_ids": [1]}, ValueError, "list of GPU indices"),
        ({"rollout_weights_mode": "merged"}, ValueError, "needs dedicated GPUs"),
        ({"rollout_weights_mode": "both"}, ValueError, "'lora' or 'merged'"),
        ({"engine_args": ["a"]}, TypeError, "must be a dictionary"),
        ({"chat_template": 3}, TypeError, "must be text"),
        ({"chat_template": "x", "chat_template_path": "y"}, ValueError, "not both"),
    ],
)
def test_an_internal_config_that_cannot_work(config, error, words):
    with pytest.raises(error, match=words):
        art.TrainableModel(name="m", project="p", base_model="b", _internal_config=config)


def test_an_internal_config_that_works():
    config = InternalModelConfig(
        trainer_gpu_ids=[0], inference_gpu_ids=[1], rollout_weights_mode="merged", engine_args={"max_num_seqs": 8}
    )
    model = art.TrainableModel(name="m", project="p", base_model="b", _internal_config=config)
    assert model.internal_config == config


def test_the_key_is_not_shown():
    model = art.Model(name="m", project="p", inference_api_key="sk-secret", inference_base_url="http://127.0.0.1:1/v1")
    for text in (repr(model), str(model), json.dumps(model.safe_model_dump())):
        assert "sk-secret" not in text


def test_safe_model_dump_is_json_whatever_the_config():
    class Settings(BaseModel):
        turns: int = 4

    @dataclasses.dataclass
    class Plain:
        turns: int = 4

    for config in (Settings(), Plain(), {"turns": 4}):
        dumped = art.Model(name="m", project="p", config=config).safe_model_dump()
        assert json.loads(json.dumps(dumped))["config"] == {"turns": 4}
        assert dumped["trainable"] is False
    odd = art.Model(name="m", project="p", config={"when": object()}).safe_model_dump()
    assert odd["config"]["when"].startswith("<object")


def test_a_model_can_be_pickled_and_copied():
    model = art.TrainableModel(name="m", project="p", base_model="b", _internal_config={"engine_args": {"a": 1}})
    for other in (pickle.loads(pickle.dumps(model)), model.model_copy()):
        assert other.internal_config == {"engine_args": {"a": 1}}
        assert other == model


# registration and names


async def test_before_registration():
    model = art.TrainableModel(name="m", project="p", base_model="b")
    with pytest.raises(NotRegistered, match="'m' is not registered"):
        model.backend()
    with pytest.raises(NotRegistered):
        await model.get_step()
    assert model.get_inference_name() == "m"
    assert await art.Model(name="m", project="p").get_step() == 0


async def test_registration(backend, endpoint):
    model = art.TrainableModel(name="agent-001", project="task", base_model="b")
    await model.register(backend)
    assert model.backend() is backend
    assert model.inference_base_url == f"{endpoint.url}/task/v1"
    assert model.inference_api_key == "sk-memory"
    assert model.inference_model_name == "agent-001"
    assert model.base_path == str(backend.path)
    backend.steps = [0, 1, 4]
    assert await model.get_step() == 4
    assert model.get_inference_name() == "agent-001@4"
    assert model.get_inference_name(step=1) == "agent-001@1"
    assert model.litellm_completion_params() == {
        "model": "hosted_vllm/agent-001@4",
        "base_url": f"{endpoint.url}/task/v1",
        "api_key": "sk-memory",
        "temperature": 1,
    }
    assert model.litellm_completion_params(step=0)["model"] == "hosted_vllm/agent-001@0"


async def test_a_model_that_is_not_trained(backend):
    model = art.Model(
        name="gpt", project="task", inference_model_name="openai/gpt-4.1", inference_base_url="u", inference_api_key="k"
    )
    await model.register(backend)
    assert model.backend() is backend
    assert backend.calls == []
    assert model.get_inference_name() == "openai/gpt-4.1"
    assert model.litellm_completion_params()["model"] == "openai/gpt-4.1"


# state


def test_state(tmp_path):
    model = art.Model(name="m", project="p", base_path=tmp_path)
    assert model.read_state() is None
    model.overwrite_state({"seed": 1, "seen": [1]})
    assert model.merge_state({"seen": [1, 2]}) == {"seed": 1, "seen": [1, 2]}
    assert model.read_state() == {"seed": 1, "seen": [1, 2]}
    path = tmp_path / "p" / "models" / "m" / "state.json"
    assert json.loads(path.read_text()) == {"seed": 1, "seen": [1, 2]}
    with pytest.raises(TypeError):
        model.overwrite_state({"bad": object()})
    assert model.read_state() == {"seed": 1, "seen": [1, 2]}
    assert [f.name for f in path.parent.iterdir()] == ["state.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match="mend or remove it"):
        model.read_state()
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        model.read_state()


# checkpoints


async def test_delete_checkpoints_keeps_the_latest_and_the_best(model, backend):
    backend.steps = [0, 1, 2, 3, 4]
    for step, reward in ((1, 0.1), (2, 0.9), (3, 0.2)):
        append_history(folder_of(model) / "history.jsonl", {"val/reward": reward}, step=step, split="val")
    assert await model.delete_checkpoints() == [0, 1, 3]
    assert backend.steps == [2, 4]


async def test_a_leased_checkpoint_stays(model, backend):
    backend.steps, backend.leased = [0, 1, 2], {0}
    append_history(folder_of(model) / "history.jsonl", {"train/reward": 1.0}, step=2, split="train")
    assert await model.delete_checkpoints("train/reward") == [1]
    assert backend.steps == [0, 2]


async def test_nothing_is_deleted_when_the_best_is_not_known(model, backend):
    assert await model.delete_checkpoints() == []
    backend.steps = [0, 1, 2]
    with pytest.warns(RuntimeWarning, match=r"has no 'val/reward'.*none was deleted"):
        assert await model.delete_checkpoints() == []
    assert backend.steps == [0, 1, 2]


def test_best_step_is_the_latest_of_equals(tmp_path):
    path = tmp_path / "history.jsonl"
    for step, reward in ((1, 0.5), (2, 0.9), (3, 0.9), (4, math.nan), (5, 0.1)):
        append_history(path, {"val/reward": reward}, step=step, split="val")
    assert best_step(path, "val/reward") == 3
    assert best_step(path, "val/nothing") is None
