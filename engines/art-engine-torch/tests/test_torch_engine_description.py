"""The engine descriptions: command lines without secrets, and a dialect that reads what the server answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from art_core import (
    EngineRefused,
    InferenceEngine,
    InferenceLaunch,
    TrainingEngine,
    TrainingLaunch,
    UnknownArgument,
)
from art_engine_torch import plugin
from art_engine_torch.inference_engine import ENGINE_ARGS, TorchInferenceEngine
from art_engine_torch.server import arguments
from art_engine_torch.training_engine import INIT_ARGS, TorchTrainingEngine
from art_engine_torch.training_policy import _INIT_ARGS

SECRET = "not-for-argv"


def inference(**changes: Any) -> InferenceLaunch:
    facts: dict[str, Any] = {
        "base_model": Path("/models/base"),
        "served_name": "base",
        "host": "127.0.0.1",
        "port": 1234,
        "api_key": SECRET,
        "python": sys.executable,
    }
    return InferenceLaunch(**{**facts, **changes})


def training(**changes: Any) -> TrainingLaunch:
    facts: dict[str, Any] = {
        "base_model": Path("/models/base"),
        "host": "127.0.0.1",
        "port": 1234,
        "token": SECRET,
        "python": sys.executable,
    }
    return TrainingLaunch(**{**facts, **changes})


def test_the_specs_name_what_can_be_imported() -> None:
    import importlib

    for spec in [*plugin.art_register_inference_engines(), *plugin.art_register_training_engines()]:
        module, _, attribute = spec.factory.partition(":")
        engine = getattr(importlib.import_module(module), attribute)()
        assert engine.name == spec.name == "torch"
        assert engine.capabilities == spec.capabilities
    assert isinstance(TorchInferenceEngine(), InferenceEngine)
    assert isinstance(TorchTrainingEngine(), TrainingEngine)


def test_the_server_reads_every_argument_that_the_plan_writes() -> None:
    values: dict[type, Any] = {int: 3, float: 1.5, str: "info"}
    plan = TorchInferenceEngine().launch(
        inference(
            max_model_len=100,
            chat_template=Path("/t.jinja"),
            engine_args={name: values[kind] for name, kind in ENGINE_ARGS.items()},
        )
    )
    assert plan.argv[1:3] == ("-m", "art_engine_torch.server")
    options = arguments().parse_args(plan.argv[3:])
    assert options.model == Path("/models/base")
    assert options.max_model_len == 100
    assert options.kv_cache_gb == 1.5
    assert options.max_num_seqs == 3
    assert options.device == "cpu"
    assert plan.env["CUDA_VISIBLE_DEVICES"] == ""


def test_no_secret_is_in_argv_or_repr() -> None:
    for plan in (TorchInferenceEngine().launch(inference()), TorchTrainingEngine().launch(training())):
        assert SECRET in plan.secret_env.values()
        assert SECRET not in " ".join(plan.argv)
        assert SECRET not in repr(plan)


def test_one_gpu_is_taken_and_several_are_refused() -> None:
    plan = TorchInferenceEngine().launch(inference(devices=(3,)))
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "3"
    assert plan.argv[plan.argv.index("--device") + 1] == "cuda"
    assert TorchTrainingEngine().launch(training(devices=(3,))).env["CUDA_VISIBLE_DEVICES"] == "3"
    with pytest.raises(ValueError, match="one device"):
        TorchInferenceEngine().launch(inference(devices=(0, 1)))
    with pytest.raises(ValueError, match="one device"):
        TorchTrainingEngine().launch(training(devices=(0, 1)))


def test_unknown_arguments_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownArgument, match="max_num_seqs"):
        TorchInferenceEngine().launch(inference(engine_args={"max_num_seq": 3}))
    with pytest.raises(ValueError, match="threads"):
        TorchInferenceEngine().launch(inference(engine_args={"threads": "two"}))
    with pytest.raises(UnknownArgument, match="gradient_checkpointing"):
        TorchTrainingEngine().launch(training(init_args={"gradient_checkpoint": True}))


def test_the_training_plan_passes_init_args_on() -> None:
    plan = TorchTrainingEngine().launch(training(init_args={"gradient_checkpointing": True, "revision": "main"}))
    assert plan.argv[plan.argv.index("--gradient-checkpointing") + 1] == "on"
    assert plan.argv[plan.argv.index("--init-args") + 1] == '{"revision": "main"}'
    assert set(INIT_ARGS) - {"gradient_checkpointing"} == set(_INIT_ARGS)


def test_a_refusal_carries_the_servers_sentence() -> None:
    engine = TorchInferenceEngine()
    call = engine.load_adapter("p/m@1", Path("/adapters/1"))
    engine.check_answer(call, 200, b"Success")
    with pytest.raises(EngineRefused, match=r"load adapter p/m@1.*NaN here"):
        engine.check_answer(call, 400, b'{"error": {"message": "NaN here"}}')
    with pytest.raises(EngineRefused, match="plain words"):
        engine.check_answer(call, 502, b"plain words")


def test_requests_ask_for_ids_and_logprobs_and_leave_the_users_alone() -> None:
    engine = TorchInferenceEngine()
    chat = {"model": "m", "messages": [], "logprobs": False}
    prepared = engine.prepare_request("chat/completions", chat, "p/m@3")
    assert prepared == {"model": "p/m@3", "messages": [], "logprobs": True, "return_token_ids": True}
    assert chat == {"model": "m", "messages": [], "logprobs": False}
    assert engine.prepare_request("completions", {"model": "m", "prompt": "x"}, None)["logprobs"] == 0
    assert engine.prepare_request("completions", {"model": "m", "prompt": "x", "logprobs": 4}, None)["logprobs"] == 4


def test_answers_are_brought_into_one_form() -> None:
    engine = TorchInferenceEngine()
    choice = {"index": 0, "token_ids": [5], "logprobs": {"content": []}}
    read = engine.read_response("chat/completions", {"prompt_token_ids": [1, 2], "choices": [choice]})
    assert read == {"choices": [{**choice, "prompt_token_ids": [1, 2]}]}
    inside = {**choice, "prompt_token_ids": [9]}
    assert engine.read_response("completions", {"choices": [inside]}) == {"choices": [inside]}
    with pytest.raises(EngineRefused, match="token_ids"):
        engine.read_response("completions", {"choices": [{"index": 0, "logprobs": {}}]})
    chunk = engine.read_chunk("chat/completions", {"prompt_token_ids": [1], "choices": [{"index": 0, "delta": {}}]})
    assert chunk == {"choices": [{"index": 0, "delta": {}, "token_ids": [], "prompt_token_ids": [1]}]}
    assert engine.read_chunk("completions", {"choices": [], "usage": {}}) == {"choices": [], "usage": {}}


def test_listed_adapters_are_the_models_with_a_parent() -> None:
    body = b'{"data": [{"id": "base", "parent": null}, {"id": "p/m@1", "parent": "base"}]}'
    assert TorchInferenceEngine().read_adapters(body) == {"p/m@1"}
