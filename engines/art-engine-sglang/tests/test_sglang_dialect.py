"""What SGLang is started with, and how requests and answers are turned; no server runs here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from art_core import InferenceEngine, InferenceLaunch
from art_core.errors import EngineRefused, UnknownArgument, UnsupportedCapability
from art_engine_sglang.declared import OWN_SERVER
from art_engine_sglang.environment import CPU_SHIMS, ENVIRONMENT, FOLDER, SERVE
from art_engine_sglang.inference_engine import KEY_VARIABLE, SglangInferenceEngine
from art_engine_sglang.options import ARGUMENTS
from art_engine_sglang.plugin import art_register_inference_engines

LAUNCH = InferenceLaunch(
    base_model=Path("/models/base"),
    served_name="base",
    host="127.0.0.1",
    port=4711,
    api_key="sk-secret",
    python="/env/bin/python",
)
CHAT = {"model": "agent", "messages": [{"role": "user", "content": "Hello"}]}


def launched(**changes: Any) -> tuple[str, dict[str, str]]:
    plan = SglangInferenceEngine().launch(replace(LAUNCH, **changes))
    return " ".join(plan.argv), dict(plan.env)


def test_the_card_is_that_of_the_engine() -> None:
    [spec] = art_register_inference_engines()
    assert isinstance(SglangInferenceEngine(), InferenceEngine)
    assert SglangInferenceEngine().capabilities == spec.capabilities
    for flavour in ENVIRONMENT.flavours:
        assert SglangInferenceEngine(flavour).capabilities >= spec.capabilities


def test_on_a_cpu() -> None:
    words, env = launched()
    assert words.startswith(f"/env/bin/python {SERVE} --model-path /models/base --host 127.0.0.1 --port 4711")
    assert "--device cpu" in words
    assert "--lora-backend torch_native" in words
    assert env["PYTHONPATH"] == f"{FOLDER}{os.pathsep}{CPU_SHIMS}"
    assert env["SGLANG_USE_CPU_ENGINE"] == env["OMP_NUM_THREADS"] == "1"
    assert env["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "1"
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert "sk-secret" not in words + repr(SglangInferenceEngine().launch(LAUNCH))
    assert SglangInferenceEngine().launch(LAUNCH).secret_env == {KEY_VARIABLE: "sk-secret"}


def test_on_gpus_nothing_stands_in() -> None:
    words, env = launched(devices=(1, 2))
    assert "--device cuda" in words
    assert "--tensor-parallel-size 2" in words
    assert "torch_native" not in words
    assert "SGLANG_USE_CPU_ENGINE" not in env
    assert env["PYTHONPATH"] == str(FOLDER)
    assert env["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert "--tensor-parallel-size" not in launched(devices=(1, 2), engine_args={"tp_size": 1})[0]


def test_engine_args_pass_through_and_win() -> None:
    words, env = launched(
        engine_args={
            "max_total_tokens": 4096,
            "mem-fraction-static": 0.5,
            "disable_radix_cache": True,
            "skip_server_warmup": False,
            "--newer-than-us": "yes",
            "env": {"OMP_NUM_THREADS": 8},
        }
    )
    for part in (
        "--max-total-tokens 4096",
        "--mem-fraction-static 0.5",
        "--disable-radix-cache",
        "--newer-than-us yes",
    ):
        assert part in words
    assert "32768" not in words
    assert "warmup" not in words
    assert env["OMP_NUM_THREADS"] == "8"


def test_a_misspelt_argument_names_the_nearest() -> None:
    with pytest.raises(UnknownArgument, match="'mem_fraction_static'"):
        launched(engine_args={"mem_fraction_statik": 0.5})


@pytest.mark.parametrize(
    ("name", "value"), [("port", 1), ("--api-key", "x"), ("device", "cpu"), ("disable_radix_cache", 1), ("env", "A=1")]
)
def test_what_is_decided_elsewhere_or_does_not_fit(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"engine_args of the sglang inference engine"):
        launched(engine_args={name: value})


def test_an_adapter_is_named_behind_a_colon() -> None:
    engine = SglangInferenceEngine()
    for endpoint, body in (("chat/completions", CHAT), ("completions", {"model": "agent", "prompt": [1]})):
        asked = engine.prepare_request(endpoint, body, "p/m@1")  # type: ignore[arg-type]
        assert asked["model"] == "base:p/m@1"
        assert asked["return_token_ids"] is True
    # A user must not be able to name an adapter that the gateway didn't route to.
    assert "lora_path" not in engine.prepare_request("chat/completions", {**CHAT, "lora_path": "p/other@1"}, "p/m@1")


def test_a_stream_of_chat_asks_for_its_ids_in_another_way() -> None:
    asked = SglangInferenceEngine().prepare_request("chat/completions", {**CHAT, "stream": True}, "p/m@1")
    assert "return_token_ids" not in asked
    assert asked["return_input_ids_in_sglext"]
    assert asked["return_output_ids_in_sglext"]
    assert asked["logprobs"]


def test_answers_come_into_the_one_form() -> None:
    engine = SglangInferenceEngine()
    choice = {"index": 0, "logprobs": {"content": []}, "prompt_token_ids": [1], "response_token_ids": [7]}
    [read] = engine.read_response("chat/completions", {"choices": [choice]})["choices"]
    assert read == {"index": 0, "logprobs": {"content": []}, "prompt_token_ids": [1], "token_ids": [7]}
    with pytest.raises(EngineRefused, match="choice 0 has no token_ids"):
        engine.read_response("chat/completions", {"choices": [{**choice, "response_token_ids": None}]})


def test_metadata_that_no_client_could_read_is_left_out() -> None:
    choice = {"index": 0, "logprobs": {"content": []}, "prompt_token_ids": [1], "response_token_ids": [7]}
    metadata = {"weight_versions": [{"version": "default", "start": 0, "end": 8}]}
    answer = SglangInferenceEngine().read_response("chat/completions", {"choices": [choice], "metadata": metadata})
    assert answer.keys() == {"choices"}


def test_the_ids_of_a_stream_become_its_last_chunks() -> None:
    engine = SglangInferenceEngine()
    text = {"id": "x", "choices": [{"index": 0, "delta": {"content": "a"}}]}
    assert engine.read_chunk("chat/completions", text)["choices"][0]["token_ids"] == []
    end = {"id": "x", "choices": [], "sglext": {"input_ids": [1, 2], "output_ids": [[7], [8, 9]]}}
    read = engine.read_chunk("chat/completions", end)
    assert [(c["index"], c["token_ids"], c["prompt_token_ids"]) for c in read["choices"]] == [
        (0, [7], [1, 2]),
        (1, [8, 9], [1, 2]),
    ]
    assert "sglext" not in read


def test_a_server_of_the_users_own_is_started_with_options_that_exist() -> None:
    named = {name.replace("-", "_") for name in re.findall(r" --([a-z-]+)", OWN_SERVER)}
    assert "enable_lora" in named
    assert named <= ARGUMENTS.names
    assert "SGLANG_RETURN_ORIGINAL_LOGPROB" in SglangInferenceEngine().launch(LAUNCH).env


def test_sleep_is_not_declared() -> None:
    for call in (SglangInferenceEngine("cuda").sleep, SglangInferenceEngine("cpu").wake):
        with pytest.raises(UnsupportedCapability, match="art-engine-vllm"):
            call()


def test_the_launcher_keeps_the_key_out_of_logs() -> None:
    code = (
        f"import runpy, logging; runpy.run_path({str(SERVE)!r}, run_name='__mp_main__');"
        "logging.basicConfig(); logging.warning('api_key=%s', 'sk-secret'); logging.warning({'api_key': 'sk-secret'});"
        "logging.warning('fine %d', 1)"
    )
    env = {**os.environ, KEY_VARIABLE: "sk-secret"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert "sk-secret" not in answer.stderr
    assert answer.stderr.count("***") == 2
    assert "fine 1" in answer.stderr
