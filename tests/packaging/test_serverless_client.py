"""A client of a training service, alone in its environment: what pip brings along, and that it trains as one that has
the engines beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from art_core.history import read_history

ROOT = Path(__file__).parents[2]
ART = [sys.executable, "-m", "art_core"]
STEPS = 4
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def client(environment_for: Any, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An environment with what the documents install for a service, and nothing else."""
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder, with_pip=True)
    made = environment_for(folder, wheels)
    made.install("art-core", "art-backend-serverless")
    return made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """`art serve` on real weights; its address and a key."""
    data = tmp_path_factory.mktemp("served")
    create = [*ART, "serve", "keys", "create", "acme", "--data", str(data)]
    key = subprocess.run(create, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    command = [*ART, "serve", "--data", str(data), "--port", "0", "--base-model", "smollm2-135m-instruct"]
    with (data / "server.log").open("w", encoding="utf-8") as log:
        engines = ["--inference-engine", "torch", "--training-engine", "torch"]
        process = subprocess.Popen([*command, *engines], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said, (data / "server.log").read_text(encoding="utf-8")[-3000:]
        yield said.split()[-1], key
    finally:
        process.terminate()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()
        down = [*ART, "down", "--path", str(data / "backend")]
        subprocess.run(down, check=False, capture_output=True, timeout=120)


def test_pip_brings_neither_torch_nor_a_server(client: Any, tmp_path: Path) -> None:
    listed = client.run("python", "-m", "pip", "list", "--format", "json", cwd=tmp_path)
    names = {each["name"].lower() for each in json.loads(listed.stdout)}
    print(sorted(names))
    assert {name for name in names if name.startswith("art-")} == {
        "art-core",
        "art-backend-serverless",
        "art-tracker-files",
    }
    assert not names & {"torch", "transformers", "peft", "uvicorn", "starlette", "fastapi", "sqlalchemy", "wandb"}


def test_the_example_learns_from_there_as_it_does_here(
    client: Any, server: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, key = server
    monkeypatch.setenv("WANDB_API_KEY", key)
    for name in list(os.environ):
        if name.startswith("WANDB_") and name != "WANDB_API_KEY":
            monkeypatch.delenv(name)
    example = [str(ROOT / "examples" / "customer_replies.py"), "--name", "test", "--path", str(tmp_path)]
    options = ["--backend", "serverless", "--base-url", url, "--steps", str(STEPS)]
    ran = client.run("python", *example, *options, cwd=tmp_path, timeout=600)
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}\n{ran.stderr[-6000:]}"
    rows = read_history(tmp_path / "customer-replies" / "models" / "test" / "history.jsonl")
    curve = [row["train/reward"] for row in rows if "train/reward" in row]
    print(curve)
    assert len(curve) == STEPS
    assert max(curve[-2:]) > curve[0] + 0.1, f"the reward did not rise: {curve}"
    assert f"published wandb-artifact:///acme/customer-replies/test:step{STEPS}" in ran.stdout
    assert key not in ran.stdout + ran.stderr
