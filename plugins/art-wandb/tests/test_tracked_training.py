"""A real training under three trackers' eyes: what wandb, trackio and MLflow kept of it is what it was; and when they
do all that a tracker can do wrong, no step is lost.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from art_conformance.tiny_model import write_base_model
from art_core.history import read_history

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TRAIN = """
import asyncio, sys
import art
from art.local import LocalBackend


async def rollout(model, question):
    trajectory = art.Trajectory(messages_and_choices=[{"role": "user", "content": question}])
    completion = await model.openai_client().chat.completions.create(
        messages=trajectory.messages(), model=model.name, max_tokens=8
    )
    trajectory.messages_and_choices.append(completion.choices[0])
    trajectory.reward = float(len(completion.choices[0].message.content) % 3)
    return trajectory


async def main():
    async with LocalBackend(in_process=True, path="runs") as backend:
        model = art.TrainableModel(name="agent", project="shop", base_model=sys.argv[1])
        await model.register(backend)
        while (step := await model.get_step()) < 2:
            groups = await art.gather_trajectory_groups(
                art.TrajectoryGroup(rollout(model, question) for _ in range(4)) for question in ("one", "two", "three")
            )
            result = await backend.train(model, groups, learning_rate=1e-3)
            await model.log(groups, metrics=result.metrics, step=result.step, split="train")
    print("trained", flush=True)


asyncio.run(main())
"""

READ_TRACKIO = """
import json, sys
from pathlib import Path
import trackio
from trackio.sqlite_storage import SQLiteStorage

logs = SQLiteStorage.get_logs("shop", "agent")
trackio.init(project="shop", name="reader", embed=False, auto_log_cpu=False, auto_log_gpu=False)
for step in (1, 2):
    trackio.use_artifact(f"agent:step{step}").download(Path(f"downloaded/{step}"))
Path("logs.json").write_text(json.dumps(logs, default=str), encoding="utf-8")
"""

READ_MLFLOW = """
import json
from pathlib import Path
from mlflow import MlflowClient

client = MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
told = [(name, each.step, each.value) for name in run.data.metrics
        for each in client.get_metric_history(run.info.run_id, name)]
Path("kept").mkdir()
client.download_artifacts(run.info.run_id, "checkpoints", "kept")
Path("mlflow.json").write_text(json.dumps(told), encoding="utf-8")
"""

READ_WANDB = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from wandb_files import lora_artifacts, rows, run_folders

(run,) = run_folders(Path("runs"))
artifacts = [
    [sorted(artifact.aliases), {entry.path: entry.local_path for entry in artifact.manifest.contents}]
    for artifact in lora_artifacts(run)
]
Path("wandb.json").write_text(json.dumps({"rows": list(rows(run)), "artifacts": artifacts}), encoding="utf-8")
"""


def python(folder, code, *arguments, **variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRACKIO", "MLFLOW", "ART_"))}
    own = {
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(folder / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env=kept | own | variables, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def adapter(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "optimizer.state"}


def plain(row):
    return {name: value for name, value in row.items() if isinstance(value, int | float) and "/" in name}


def test_what_all_kept_of_a_real_training_is_what_it_was(tmp_path):
    python(tmp_path, TRAIN, write_base_model(tmp_path / "base"))
    model = tmp_path / "runs" / "shop" / "models" / "agent"
    history = {row["step"]: plain(row) for row in read_history(model / "history.jsonl")}
    assert sorted(history) == [1, 2]
    assert "loss/train" in history[1]

    python(tmp_path, READ_WANDB, Path(__file__).parent)
    kept = json.loads((tmp_path / "wandb.json").read_text(encoding="utf-8"))
    metrics = [row for row in kept["rows"] if "train/reward" in row]
    told = {row["training_step"]: row for row in metrics}
    assert {step: {name: told[step][name] for name in history[step]} for step in told} == history
    artifacts = {aliases[-1]: files for aliases, files in kept["artifacts"]}

    python(tmp_path, READ_TRACKIO)
    logs = json.loads((tmp_path / "logs.json").read_text(encoding="utf-8"))
    assert {row["step"]: plain(row) for row in logs if "train/reward" in row} == history

    python(tmp_path, READ_MLFLOW)
    rows = {step: {} for step in history}
    for name, step, value in json.loads((tmp_path / "mlflow.json").read_text(encoding="utf-8")):
        rows[step][name] = value
    assert {step: {name: rows[step].get(name) for name in history[step]} for step in rows} == history
    assert {row["trajectories/train_total"] for row in rows.values()} == {12}

    for step in (1, 2):
        whole = adapter(model / "checkpoints" / f"{step:04d}")
        assert "adapter_model.safetensors" in whole
        assert {name: Path(at).read_bytes() for name, at in artifacts[f"step{step}"].items()} == whole
        assert adapter(tmp_path / "downloaded" / str(step)) == whole
        assert adapter(tmp_path / "kept" / "checkpoints" / f"step{step}") == whole


def test_trackers_that_hang_and_that_raise_cost_a_training_nothing(tmp_path):
    (tmp_path / "trackio").write_text("a file where the folder would be")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # whoever connects waits for an answer
        online = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "5"}
        online |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        online["WANDB_BASE_URL"] = online["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = python(tmp_path, TRAIN, write_base_model(tmp_path / "base"), **online)
    assert "trained" in done.stdout
    assert "so the run of agent is kept in files" in done.stderr
    assert "trackio: the checkpoint of step 1 of shop/agent failed: NotADirectoryError" in done.stderr
    assert "mlflow: opening the run of shop/agent failed: MlflowException" in done.stderr
    model = tmp_path / "runs" / "shop" / "models" / "agent"
    assert [row["step"] for row in read_history(model / "history.jsonl")] == [1, 2]
    assert sorted(file.name for file in (model / "trajectories" / "train").iterdir()) == [
        "0001.parquet",
        "0002.parquet",
    ]
    assert {"0001", "0002"} <= {folder.name for folder in (model / "checkpoints").iterdir()}
