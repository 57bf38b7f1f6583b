"""What vLLM is started with, and how requests and answers are turned; no server runs here."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import re
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from art_core import InferenceCapability, InferenceEngine, InferenceLaunch
from art_core.errors import UnknownArgument, UnsupportedCapability
from art_engine_vllm.declared import OWN_SERVER
from art_engine_vllm.environment import ENVIRONMENT, FOLDER
from art_engine_vllm.inference_engine import VllmInferenceEngine
from art_engine_vllm.options import ARGUMENTS
from art_engine_vllm.plugin import art_register_inference_engines

LAUNCH = InferenceLaunch(
    base_model=Path("/models/base"),
    served_name="base",
    host="127.0.0.1",
    port=4711,
    api_key="sk-secret",
    python="/env/bin/python",
)


def launched(**changes: Any) -> tuple[str, dict[str, str]]:
    plan = VllmInferenceEngine().launch(replace(LAUNCH, **changes))
    return " ".join(plan.argv), dict(plan.env)


def test_the_card_is_that_of_the_engine() -> None:
    [spec] = art_register_inference_engines()
    assert isinstance(VllmInferenceEngine(), InferenceEngine)
    assert VllmInferenceEngine().capabilities == spec.capabilities
    for flavour in ENVIRONMENT.flavours:
        assert VllmInferenceEngine(flavour).capabilities >= spec.capabilities


def test_on_a_cpu() -> None:
    words, env = launched()
    assert words.startswith("/env/bin/python ")
    assert "serve /models/base --host 127.0.0.1 --port 4711 --served-model-name base --enable-lora" in words
    assert "--kv-cache-memory-bytes" in words
    assert "--block-size 32" in words
    assert "--block-size 64" in launched(engine_args={"block_size": 64})[0]
    assert "--enable-sleep-mode" not in words
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["VLLM_HOST_IP"] == "127.0.0.1"
    assert "sk-secret" not in words + repr(VllmInferenceEngine().launch(LAUNCH))


def test_on_gpus() -> None:
    words, env = launched(devices=(1, 2))
    assert "--tensor-parallel-size 2" in words
    assert "--enable-sleep-mode" in words
    assert env["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert "--tensor-parallel-size 2" not in launched(devices=(1, 2), engine_args={"data_parallel_size": 2})[0]


def test_engine_args_pass_through_and_win() -> None:
    words, env = launched(
        devices=(0,),
        engine_args={
            "gpu_memory_utilization": 0.5,
            "enforce-eager": True,
            "enable_prefix_caching": False,
            "enable_sleep_mode": None,
            "tool_call_parser": "llama3_json",
            "speculative_config": {"method": "ngram"},
            "lora_target_modules": ["q_proj", "v_proj"],
            "--newer-than-us": 3,
            "env": {"VLLM_LOGGING_LEVEL": "DEBUG"},
        },
    )
    for part in (
        "--gpu-memory-utilization 0.5",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--tool-call-parser llama3_json",
        '--speculative-config {"method": "ngram"}',
        "--lora-target-modules q_proj v_proj",
        "--newer-than-us 3",
    ):
        assert part in words
    assert "hermes" not in words
    assert "sleep" not in words
    assert env["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_a_misspelt_argument_names_the_nearest() -> None:
    with pytest.raises(UnknownArgument, match="'gpu_memory_utilization'"):
        launched(engine_args={"gpu_memory_utilisation": 0.5})


@pytest.mark.parametrize(
    ("name", "value"), [("port", 1), ("api_key", "x"), ("--api-key", "x"), ("enforce_eager", "yes"), ("env", "A=1")]
)
def test_what_is_decided_elsewhere_or_does_not_fit(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"engine_args of the vllm inference engine"):
        launched(engine_args={name: value})


def test_ranks_are_rounded_up_to_those_that_vllm_has() -> None:
    assert "--max-lora-rank 32" in launched(max_lora_rank=17)[0]
    with pytest.raises(ValueError, match="at most"):
        launched(max_lora_rank=1000)


def test_a_server_of_the_users_own_is_started_with_options_that_exist() -> None:
    named = {name.replace("-", "_") for name in re.findall(r" --([a-z-]+)", OWN_SERVER)}
    assert "enable_lora" in named
    assert named <= ARGUMENTS.names
    plan = VllmInferenceEngine().launch(LAUNCH)
    for variable in re.findall(r"VLLM_[A-Z_]+=", OWN_SERVER):
        assert variable[:-1] in plan.env


def test_sleep_is_declared_for_cuda_alone() -> None:
    cpu, cuda = VllmInferenceEngine("cpu"), VllmInferenceEngine("cuda")
    assert InferenceCapability.SLEEP in cuda.capabilities
    assert cuda.sleep().path == "/sleep?level=1&mode=keep"
    assert cuda.wake().path == "/wake_up"
    for engine in (cpu, VllmInferenceEngine()):
        with pytest.raises(UnsupportedCapability, match="art-engine-torch"):
            engine.sleep()
    assert InferenceCapability.BASE_BESIDE_ADAPTERS in cpu.capabilities
    assert InferenceCapability.BASE_BESIDE_ADAPTERS in cuda.capabilities


def test_vllm_finds_its_platform_beside_its_server() -> None:
    [found] = distributions(path=[str(FOLDER)])
    [entry] = found.entry_points.select(group="vllm.platform_plugins")
    source = ast.parse((FOLDER / f"{entry.module}.py").read_text(encoding="utf-8"))
    assert entry.attr in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}


async def answer_of(path: str, authorization: str | None, monkeypatch: pytest.MonkeyPatch) -> int:
    """The status that the guard gives, with an application behind it that answers 200 to everything."""
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret")
    found = importlib.util.spec_from_file_location("art_vllm_guard", FOLDER / "art_vllm_guard.py")
    assert found is not None
    assert found.loader is not None
    guard = importlib.util.module_from_spec(found)
    found.loader.exec_module(guard)
    sent: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    scope = {"type": "http", "path": path, "method": "POST", "headers": headers}
    await guard.RequireKey(application)(scope, None, send)
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("path", "authorization", "status"),
    [
        ("/pause", None, 401),
        ("/pause", "Bearer wrong", 401),
        ("/pause", "sk-secret", 401),
        ("/pause", "Bearer sk-secret", 200),
        ("/sleep", "bearer sk-secret", 200),
        ("/health", None, 200),
        ("/health/../pause", None, 401),
    ],
)
def test_the_guard_covers_what_vllm_leaves_open(
    path: str, authorization: str | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asyncio.run(answer_of(path, authorization, monkeypatch)) == status
