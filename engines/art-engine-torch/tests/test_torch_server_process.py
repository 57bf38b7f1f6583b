"""The server as a process, as a launch plan starts it: readiness, signals, failures, and SmolLM2 answering for real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from art_core import InferenceLaunch
from art_engine_torch.base_model import resolve_base_model, verify_hashes
from art_engine_torch.inference_engine import TorchInferenceEngine

pytestmark = pytest.mark.slow
KEY = "a-process-key"
START_S = 240.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def start(model: Path, port: int, log: Path, **changes: Any) -> subprocess.Popen[bytes]:
    plan = TorchInferenceEngine().launch(
        InferenceLaunch(
            base_model=model,
            served_name="base",
            host="127.0.0.1",
            port=port,
            api_key=KEY,
            python=sys.executable,
            dtype="float32",
            max_model_len=1024,
            **changes,
        )
    )
    with log.open("wb") as output:
        return subprocess.Popen(
            plan.argv, env={**os.environ, **plan.env, **plan.secret_env}, stdout=output, stderr=output
        )


@contextmanager
def running(model: Path, log: Path, **changes: Any) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    port = free_port()
    process = start(model, port, log, **changes)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=START_S) as client:
            seen = wait_ready(client, process, log)
            assert seen <= {None, 503, 200}
            yield client, process
    finally:
        process.kill()
        process.wait()


def wait_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> set[int | None]:
    seen: set[int | None] = set()
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            status: int | None = client.get("/health").status_code
        except httpx.TransportError:
            status = None
        seen.add(status)
        if status == 200:
            return seen
        time.sleep(0.05)
    raise AssertionError(f"not ready after {START_S} s: {log.read_text(encoding='utf-8')}")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    folder = resolve_base_model("smollm2-135m-instruct")
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with running(smollm2, tmp_path_factory.mktemp("log") / "server.log") as (client, _):
        yield client


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"model": "base", "return_token_ids": True, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_embedded_models_folder_is_whole(smollm2: Path) -> None:
    assert verify_hashes(smollm2) is None


def test_it_knows_the_capital_of_france(served: httpx.Client) -> None:
    answer = chat(
        served, messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0, max_tokens=30
    )
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_signal_ends_it_with_its_requests(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with (
        running(tiny_model("llama-tied"), tmp_path / "log") as (client, process),
        ThreadPoolExecutor(1) as pool,
    ):
        body = {"model": "base", "prompt": [1], "max_tokens": 1000, "ignore_eos": True, "n": 16}
        request = pool.submit(client.post, "/v1/completions", json=body)
        while client.get("/stats").json()["running"] == 0:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert request.result().status_code == 500
        process.wait(30)
        assert KEY not in (tmp_path / "log").read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", ["missing", "truncated", "other type"])
def test_a_model_that_cannot_be_loaded_ends_it_with_the_reason(
    damage: str, tiny_model: Callable[[str], Path], tmp_path: Path, json_editor: Callable[..., None]
) -> None:
    import shutil

    folder = tmp_path / "model"
    if damage != "missing":
        shutil.copytree(tiny_model("llama-tied"), folder)
    if damage == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    if damage == "other type":
        json_editor(folder / "config.json", model_type="gpt2")
    process = start(folder, free_port(), tmp_path / "log")
    try:
        assert process.wait(START_S) == 1
    finally:
        process.kill()
        process.wait()
    last = (tmp_path / "log").read_text(encoding="utf-8").strip().splitlines()[-1]
    says = {"missing": "no model folder", "truncated": "safetensors", "other type": "gpt2"}[damage]
    assert "art_engine_torch.server ended" in last
    assert says.lower() in last.lower()


def test_a_taken_port_ends_it(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(tiny_model("llama-tied"), taken.getsockname()[1], tmp_path / "log")
        try:
            assert process.wait(START_S) == 1
        finally:
            process.kill()
            process.wait()
    assert "address already in use" in (tmp_path / "log").read_text(encoding="utf-8")
