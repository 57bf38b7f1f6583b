"""The code of the documents that this project implements, run as it stands against LocalBackend.

Only the documents' own typing errors are mended (`in_process: False` is `in_process=False`, lost line breaks), and a
reward stands where a document has `...`. The base models that they name are resolved, by a plugin, to a small one on
this machine.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import art
from art_core import hookimpl, installed_plugins
from art_core.errors import PluginNotInstalled

DECLARE_LOCAL = """
from art.local import LocalBackend

backend = LocalBackend(
    # set to True if you want your backend to shut down automatically
    # when your client process ends
    in_process=False,
    # local path where the backend will store trajectory logs and model weights
    path='./.art',
)
"""

DECLARE_SERVERLESS = """
from art.serverless.backend import ServerlessBackend

backend = ServerlessBackend(
  api_key="my-api-key",
  # or set WANDB_API_KEY in the environment
)
"""

DEDICATED = """
from art import TrainableModel
from art.dev import InternalModelConfig
from art.local import LocalBackend

backend = LocalBackend(path="./.art")
model = TrainableModel(
    name="pipeline-localbackend",
    project="my-project",
    base_model="Qwen/Qwen3-0.6B",
    _internal_config=InternalModelConfig(
        trainer_gpu_ids=[0],
        inference_gpu_ids=[1],
    ),
)
"""

CHOOSE_BACKEND = """
import art

BACKEND_TYPE = "local"

if BACKEND_TYPE == "serverless":
    from art.serverless.backend import ServerlessBackend
    backend = await ServerlessBackend()
else:
    from art.local import LocalBackend
    backend = LocalBackend()

model = art.TrainableModel(
    # the name of your model as it will appear in W&B
    # and other observability platforms
    name="agent-001",
    # keep your project name constant between all the models you train
    # for a given task to consistently group metrics
    project="my-agentic-task",
    # the model that you want to train from
    base_model="Qwen/Qwen2.5-14B-Instruct",
)

await model.register(backend)
"""

SCENARIOS_AND_ROLLOUT = """
from dataclasses import dataclass

@dataclass
class Scenario:
    # add whatever fields differ from one real-world scenario to another
    field_1: str
    field_2: float

scenarios = [
    Scenario(field_1="hello", field_2=0),
    Scenario(field_1="world!", field_2=1),
]

# define a rollout function that puts the model through its paces for a given scenario
async def rollout(model: art.Model, scenario: Scenario) -> art.Trajectory:
    openai_client = model.openai_client()
    trajectory = art.Trajectory(
        messages_and_choices=[
            {"role": "system", "content": "..."},
            {"role": "user", "content": "..."},
        ]
    )
    # generate a completion using the client
    chat_completion = await openai_client.chat.completions.create(
        messages=trajectory.messages(), model=model.name
    )
    choice = chat_completion.choices[0]
    trajectory.messages_and_choices.append(choice)
    # determine how well the agent did during this particular run
    agent_performance_score: float = len(choice.message.content or "")
    trajectory.reward = agent_performance_score
    return trajectory
"""

TRAIN_FIFTY_STEPS = """
async def train():
    # train for 50 steps
    for _ in range(await model.get_step(), 50):
        # Trajectories produced using the same training scenario are automatically grouped
        train_groups = await art.gather_trajectory_groups(
            (
                art.TrajectoryGroup(rollout(model, scenario) for _ in range(8))
                for scenario in scenarios
            ),
            pbar_desc="gather",
        )
        print("num train groups:", len(train_groups))  # num train groups: 2
        print("length of each train group:", len(train_groups[0]))  # length of each train group: 8
        # send the grouped trajectories to the backend and wait until training finishes
        await model.train(
            train_groups,
            config=art.TrainConfig(learning_rate=1e-5),
        )
        # once model.train finishes for the current step
        # the backend updates the LoRA weights for inference and
        # the training loop continues until 50 steps have completed

await train()
"""

TRAIN_AND_LOG = """
train_groups = await art.gather_trajectory_groups(
    art.TrajectoryGroup(rollout(model, scenario) for _ in range(8)) for scenario in scenarios
)
result = await backend.train(model, train_groups, learning_rate=1e-5)
nothing_logged_yet = not (history := project_folder / "models/agent-001/history.jsonl").exists()
await model.log(train_groups, metrics=result.metrics, step=result.step, split="train")
"""

WARM_START = """
import art

model = art.TrainableModel(
    name="agent-002",
    project="my-agentic-task",
    # Point to the local SFT LoRA adapter directory
    # (e.g., contains adapter_config.json and adapter_model.bin/safetensors)
    base_model=my_sft_lora_adapter,
)
await model.register(backend)
"""


async def run(code: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run a document's block, with `await` allowed outside of functions as in a notebook."""
    compiled = compile(textwrap.dedent(code), "<document>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    outcome = eval(compiled, namespace)
    if inspect.isawaitable(outcome):
        await outcome
    return namespace


@pytest.fixture
def documents_folder(tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty repository to run the documents in, where their base models stand for a small one."""

    class NamedInDocuments:
        art_api = 1

        @hookimpl
        def art_resolve_base_model(self, name: str) -> Path | None:
            return tiny_base_model if name.startswith("Qwen/") else None

    registry = installed_plugins()
    registry.register(NamedInDocuments(), name="named-in-documents")
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    registry.unregister("named-in-documents")


async def test_local_backend_is_declared_as_in_the_document(documents_folder: Path) -> None:
    namespace = await run(DECLARE_LOCAL, {})
    assert type(namespace["backend"]).__name__ == "LocalBackend"
    await namespace["backend"].close()


async def test_dedicated_model_is_declared_as_in_the_document(documents_folder: Path) -> None:
    namespace = await run(DEDICATED, {})
    assert namespace["model"].internal_config["trainer_gpu_ids"] == [0]
    assert namespace["model"].internal_config["inference_gpu_ids"] == [1]
    await namespace["backend"].close()


async def test_serverless_shim_names_its_pip_line_until_it_is_installed(documents_folder: Path) -> None:
    if "serverless" in installed_plugins().provided("backend"):
        await run(DECLARE_SERVERLESS, {})
        return
    with pytest.raises(PluginNotInstalled, match="pip install art-backend-serverless"):
        await run(DECLARE_SERVERLESS, {})


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_client_document_trains_fifty_steps(
    documents_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, Any] = {"project_folder": documents_folder / ".art" / "my-agentic-task"}
    await run(CHOOSE_BACKEND, namespace)
    model, backend = namespace["model"], namespace["backend"]
    try:
        assert model.get_inference_name() == "agent-001@0"
        await run(SCENARIOS_AND_ROLLOUT, namespace)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            await run(TRAIN_FIFTY_STEPS, namespace)
        deprecations = [
            w for w in caught if issubclass(w.category, DeprecationWarning) and "backend.train" in str(w.message)
        ]
        assert deprecations, "model.train must say what to write in its place"
        printed = capsys.readouterr().out
        assert printed.count("num train groups: 2") == 50
        assert printed.count("length of each train group: 8") == 50
        assert await model.get_step() == 50
        assert model.get_inference_name() == "agent-001@50"
        answer = await model.openai_client().chat.completions.create(
            messages=[{"role": "user", "content": "hello"}], model=model.name, max_tokens=4
        )
        assert answer.model == "agent-001@50"
    finally:
        await end_host(backend)


@pytest.mark.slow
async def test_backend_train_logs_nothing_and_model_log_both(documents_folder: Path) -> None:
    namespace: dict[str, Any] = {"project_folder": documents_folder / ".art" / "my-agentic-task"}
    await run(CHOOSE_BACKEND, namespace)
    try:
        await run(SCENARIOS_AND_ROLLOUT, namespace)
        await run(TRAIN_AND_LOG, namespace)
        assert namespace["nothing_logged_yet"]
        assert isinstance(namespace["result"], art.LocalTrainResult)
        assert namespace["result"].step == 1
        assert Path(namespace["result"].checkpoint_path, "adapter_config.json").is_file()
        assert namespace["history"].is_file()
        trajectories = namespace["project_folder"] / "models/agent-001/trajectories/train/0001.parquet"
        assert trajectories.is_file()
        namespace["my_sft_lora_adapter"] = namespace["result"].checkpoint_path
        await run(WARM_START, namespace)
        assert namespace["model"].get_inference_name() == "agent-002@0"
    finally:
        await end_host(namespace["backend"])


async def end_host(backend: Any) -> None:
    """Close the client, and end the host that outlives it."""
    path = str(backend.path)
    await backend.close()
    down = await asyncio.create_subprocess_exec(sys.executable, "-m", "art_core", "down", "--path", path)
    assert await asyncio.wait_for(down.wait(), 60) == 0
