"""The engine descriptions: command lines without secrets, and a dialect that reads what the server answers."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from art_core import InferenceEngine, InferenceLaunch, TrainingEngine, TrainingLaunch
from art_core.errors import UnknownArgument
from art_engine_torch import plugin
from art_engine_torch.declared import OWN_SERVER
from art_engine_torch.inference_engine import ENGINE_ARGS, TorchInferenceEngine
from art_engine_torch.names import API_KEY_VARIABLE
from art_engine_torch.server.__main__ import arguments
from art_engine_torch.training.policy import _INIT_ARGS
from art_engine_torch.training_engine import INIT_ARGS, TorchTrainingEngine

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
    values: dict[type, Any] = {int: 3, float: 1.5, str: "info", bool: True}
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
    assert options.trust_request_chat_template
    assert options.device == "cpu"
    assert plan.env["CUDA_VISIBLE_DEVICES"] == ""


def test_no_secret_is_in_argv_or_repr() -> None:
    for plan in (TorchInferenceEngine().launch(inference()), TorchTrainingEngine().launch(training())):
        assert SECRET in plan.secret_env.values()
        assert SECRET not in " ".join(plan.argv)
        assert SECRET not in repr(plan)


def test_one_gpu_serves_and_each_of_several_trains_with_a_rank() -> None:
    plan = TorchInferenceEngine().launch(inference(devices=(3,)))
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "3"
    assert plan.argv[plan.argv.index("--device") + 1] == "cuda"
    assert TorchTrainingEngine().launch(training(devices=(3,))).env["CUDA_VISIBLE_DEVICES"] == "3"
    with pytest.raises(ValueError, match="one device"):
        TorchInferenceEngine().launch(inference(devices=(0, 1)))
    plan = TorchTrainingEngine().launch(training(devices=(0, 1)))
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert plan.argv[plan.argv.index("--ranks") + 1] == "2"
    spread = TorchTrainingEngine().launch(training(devices=(0, 1), init_args={"shard_base": True}))
    assert spread.argv[spread.argv.index("--init-args") + 1] == '{"shard_base": true}'
    with pytest.raises(ValueError, match="shard_base=True spreads the base over several ranks, and one trains"):
        TorchTrainingEngine().launch(training(devices=(0,), init_args={"shard_base": True}))
    with pytest.raises(ValueError, match="True, False or None"):
        TorchTrainingEngine().launch(training(devices=(0, 1), init_args={"shard_base": "yes"}))


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
    assert set(INIT_ARGS) == set(_INIT_ARGS)


def test_a_server_of_the_users_own_is_started_with_a_command_line_that_it_reads() -> None:
    [command] = re.findall(r"`(.*)`", OWN_SERVER)
    variable, *words = shlex.split(command.replace(" PORT", " 1234"))
    assert variable == f"{API_KEY_VARIABLE}=KEY"
    assert words[:3] == ["python", "-m", "art_engine_torch.server"]
    assert arguments().parse_args(words[3:]).max_adapters == 8
