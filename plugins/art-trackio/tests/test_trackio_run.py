"""What the real trackio library keeps of hooks tell, read back by its own functions; no fault of it is felt.

Each is a process of its own, as part of the work is done when a process ends.
"""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from art_core.history import read_history

SCRIPT = """
import asyncio, os, sys
from pathlib import Path
import art
from art_core import CheckpointRef, ModelKey, announce, installed_plugins

first, steps, folder, report, then = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5]

async def main():
    assert "trackio" not in sys.modules
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter_config.json").write_text("{}")
        (checkpoint / "adapter_model.safetensors").write_bytes(os.urandom(100_000))
        (checkpoint / "optimizer.state").write_bytes(os.urandom(1000))
    for name in ("agent", "other"):
        model = art.TrainableModel(
            name=name,
            project="shop",
            base_model="tiny",
            base_path=str(folder),
            report_metrics=[report] if report else None,
        )
        for step in range(first, first + steps):
            trajectory = art.Trajectory(
                messages_and_choices=[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
                reward=step,
            )
            group = art.TrajectoryGroup([trajectory])
            await model.log([group], metrics={"loss/train": 1 / (step + 1)}, step=step, split="train")
            ref = CheckpointRef(ModelKey("shop", name), step, checkpoint)
            await announce(installed_plugins(), "art_checkpoint_published", model=model, checkpoint=ref, receipt=None)
    print("logged", flush=True)
    if then == "killed":
        sys.stdin.read()  # until it is

asyncio.run(main())
"""

READ = """
import json, os, sys
from pathlib import Path
import trackio
from trackio.sqlite_storage import SQLiteStorage

logs = {name: SQLiteStorage.get_logs("shop", name) for name in ("agent", "other")}
trackio.init(project="shop", name="reader", embed=False, auto_log_cpu=False, auto_log_gpu=False)
for alias in ("latest", "step1"):
    artifact = trackio.use_artifact(f"agent:{alias}")
    artifact.download(Path(sys.argv[1]) / alias)
print("READ" + json.dumps({"logs": logs, "metadata": artifact.metadata, "type": artifact.type}, default=str))
"""


def environment(folder, **variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRACKIO", "ART_"))}
    own = {"HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    return kept | own | {"WANDB_MODE": "disabled", "ART_MLFLOW_MODE": "disabled"} | variables


def begun(folder, *, first=0, steps=3, report="", then="", **variables):
    command = [sys.executable, "-c", SCRIPT, str(first), str(steps), str(folder), report, then]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment(folder, **variables), text=True, cwd=folder, **pipes)


def logged(folder, **settings):
    process = begun(folder, **settings)
    try:
        out, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "logged" in out
    return said


def read(folder):
    command = [sys.executable, "-c", READ, str(folder / "downloaded")]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.JSONDecoder().raw_decode(done.stdout.rpartition("READ")[2])[0]


def losses(logs):
    return [(row["step"], row["loss/train"], row["train/reward"]) for row in logs if "loss/train" in row]


@pytest.mark.slow
def test_metrics_tables_and_adapters_are_read_back_as_they_were_logged(tmp_path):
    logged(tmp_path)
    found = read(tmp_path)
    for name in ("agent", "other"):
        assert losses(found["logs"][name]) == [(step, 1 / (step + 1), step) for step in range(3)]
        # The same as tracker-files keeps.
        history = read_history(tmp_path / "shop" / "models" / name / "history.jsonl")
        assert losses(found["logs"][name]) == losses(history)
    tables = [row["trajectories/train"] for row in found["logs"]["agent"] if "trajectories/train" in row]
    assert [table["_value"][0]["conversation"] for table in tables] == ["user: hello\n\nassistant: hi"] * 3
    assert (found["type"], found["metadata"]["base_model"]) == ("lora", "tiny")
    for alias in ("latest", "step1"):
        files = {file.name: file.read_bytes() for file in (tmp_path / "downloaded" / alias).iterdir()}
        assert files == {
            name: (tmp_path / "checkpoint" / name).read_bytes()
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }


def rows_written(folder):
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{folder / 'trackio' / 'shop.db'}?mode=ro", uri=True)
        ) as database:
            return database.execute("SELECT count(*) FROM metrics").fetchone()[0]
    except sqlite3.OperationalError:
        return 0  # not there yet


@pytest.mark.slow
def test_what_is_written_when_a_process_is_killed_is_kept_and_the_next_goes_on_with_the_run(tmp_path):
    process = begun(tmp_path, then="killed")
    try:
        deadline = time.monotonic() + 60
        while (
            rows_written(tmp_path) < 12 and time.monotonic() < deadline
        ):  # two models, three steps, metrics and tables
            time.sleep(0.1)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    for name in ("agent", "other"):
        history = read_history(tmp_path / "shop" / "models" / name / "history.jsonl")
        assert [step for step, *_ in losses(history)] == list(range(3))
    logged(tmp_path, first=3)
    found = read(tmp_path)
    for name in ("agent", "other"):
        assert [step for step, *_ in losses(found["logs"][name])] == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("report", "variables", "reports"),
    [("", {}, True), ("tracker-files", {}, False), ("", {"ART_TRACKIO_MODE": "disabled"}, False)],
)
def test_when_it_reports(tmp_path, report, variables, reports):
    logged(tmp_path, steps=1, report=report, **variables)
    assert (tmp_path / "trackio" / "shop.db").exists() is reports


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_said_and_costs_nothing_else(tmp_path):
    (tmp_path / "trackio").write_text("a file where the folder would be")
    said = logged(tmp_path)
    assert "trackio: the checkpoint of step 0 of shop/agent failed: NotADirectoryError" in said
    assert "trackio: 6 reports were lost" in said
    history = read_history(tmp_path / "shop" / "models" / "agent" / "history.jsonl")
    assert [row["step"] for row in history] == [0, 1, 2]


@pytest.mark.slow
def test_a_database_that_another_holds_for_a_while_loses_nothing(tmp_path):
    logged(tmp_path, steps=1)
    with sqlite3.connect(tmp_path / "trackio" / "shop.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        process = begun(tmp_path, first=1, steps=2)
        try:
            assert process.stdout.readline() == "logged\n", "the steps waited for the database"
            other.execute("ROLLBACK")
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert [step for step, *_ in losses(read(tmp_path)["logs"]["agent"])] == [0, 1, 2]
