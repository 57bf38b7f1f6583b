"""What the real MLflow keeps of what hooks tell, read back by its own client; no fault of it is felt.

Each is a process of its own, as part of the work is done when a process ends, and as importing MLflow sets up loggers.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import pytest

from art_core.history import read_history

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SCRIPT = """
import asyncio, os, sys
from pathlib import Path
import art
from art_core import CheckpointRef, ModelKey, announce, installed_plugins

first, steps, folder, report, then = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5]

async def main():
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        (checkpoint / "tokens").mkdir(parents=True)
        (checkpoint / "adapter_config.json").write_text("{}")
        (checkpoint / "adapter_model.safetensors").write_bytes(os.urandom(100_000))
        (checkpoint / "tokens" / "added.json").write_text("[]")
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
    if then == "loaded":
        assert "mlflow" not in sys.modules
    print("logged", flush=True)
    if then == "killed":
        sys.stdin.read()  # until it is

asyncio.run(main())
"""

READ = """
import json, sys
from pathlib import Path
from mlflow import MlflowClient

client = MlflowClient()
found = {}
for experiment in client.search_experiments(filter_string="name != 'Default'"):
    for run in client.search_runs([experiment.experiment_id]):
        run_id, name = run.info.run_id, run.info.run_name
        folder = Path(sys.argv[1], experiment.name, name)
        folder.mkdir(parents=True)
        client.download_artifacts(run_id, "", str(folder))
        history = {key: client.get_metric_history(run_id, key) for key in run.data.metrics}
        found[f"{experiment.name}/{name}"] = {
            "metrics": {key: [(each.step, each.value) for each in values] for key, values in history.items()},
            "tags": run.data.tags,
            "status": run.info.status,
        }
print("READ" + json.dumps(found))
"""


def environment(folder, **variables):
    # A test, and CI, are where MLflow sends nothing anyway.
    told = ("MLFLOW", "ART_", "PYTEST_CURRENT_TEST", "CI", "GITHUB_ACTIONS", "DO_NOT_TRACK")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(told)}
    own = {"HOME": str(folder), "ART_TRACKIO_MODE": "disabled", "WANDB_MODE": "disabled"}
    return kept | own | variables


def begun(folder, *, code=SCRIPT, first=0, steps=3, report="", then="", **variables):
    command = [sys.executable, "-c", code, str(first), str(steps), str(folder), report, then]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment(folder, **variables), text=True, cwd=folder, **pipes)


def logged(folder, **settings):
    """What was said on the terminal while all was logged; of the script, that it logged."""
    process = begun(folder, **settings)
    try:
        out, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert out == "logged\n"
    return said


def read(folder):
    """What MLflow's own client finds; the files of a run lie in downloaded/project/name."""
    command = [sys.executable, "-c", READ, str(folder / "downloaded")]
    own = environment(folder, MLFLOW_DISABLE_TELEMETRY="true")
    done = subprocess.run(command, env=own, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("READ")[2])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which three steps of two models were logged, and what was said meanwhile."""
    folder = tmp_path_factory.mktemp("made")
    return folder, logged(folder)


@pytest.fixture
def prepared(made, tmp_path):
    """A folder with a database in which the project is not yet: making one takes MLflow seconds."""
    shutil.copy(made[0] / "mlflow.db", tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET name = 'another' WHERE name = 'shop'")
    return tmp_path


def steps_of(model):
    """The steps whose losses were kept."""
    return [row.step for row in model.rows if "loss/train" in row.metrics]


def test_metrics_tables_and_adapters_are_read_back_as_they_were_logged(made):
    folder, _ = made
    found = read(folder)
    assert sorted(found) == ["shop/agent", "shop/other"]
    for name, run in found.items():
        history = read_history(folder / "shop" / "models" / name.removeprefix("shop/") / "history.jsonl")
        # The same as tracker-files keeps.
        assert run["metrics"]["loss/train"] == [[row["step"], row["loss/train"]] for row in history]
        assert len(history) == 3
        assert run["metrics"]["train/reward"] == [[step, step] for step in range(3)]
        assert run["status"] == "FINISHED"
        assert (run["tags"]["base_model"], run["tags"]["latest_checkpoint"]) == ("tiny", "checkpoints/step2")
        downloaded = folder / "downloaded" / name
        for step in range(3):
            table = json.loads((downloaded / "trajectories" / "train" / f"{step:04d}.json").read_text(encoding="utf-8"))
            (row,) = (dict(zip(table["columns"], cells, strict=True)) for cells in table["data"])
            assert (row["reward"], row["conversation"]) == (step, "user: hello\n\nassistant: hi")
            adapter = downloaded / "checkpoints" / f"step{step}"
            files = {file.relative_to(adapter).as_posix() for file in adapter.rglob("*") if file.is_file()}
            assert files == {"adapter_config.json", "adapter_model.safetensors", "tokens/added.json"}
            for file in files:
                assert (adapter / file).read_bytes() == (folder / "checkpoint" / file).read_bytes()


def test_nothing_is_said_on_the_terminal_and_nobody_is_told_of_the_use(made):
    folder, said = made
    assert said == ""
    assert not list(folder.rglob("telemetry.json")), "MLflow gave this installation a number to report it under"


def test_what_is_written_when_a_process_is_killed_is_kept_and_the_next_goes_on_with_the_run(
    prepared, in_database, run_of
):
    process = begun(prepared, then="killed")
    try:
        deadline = time.monotonic() + 60
        written = []
        while written != [0, 1, 2] and time.monotonic() < deadline:
            time.sleep(0.1)
            with contextlib.suppress(ValueError):  # the run isn't there yet
                written = steps_of(in_database(prepared, "shop", "other"))  # reported after the first model
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    run_id, status = run_of(prepared, "shop", "agent")
    assert status == "RUNNING"
    logged(prepared, first=3)
    for name in ("agent", "other"):
        assert steps_of(in_database(prepared, "shop", name)) == list(range(6))
    assert run_of(prepared, "shop", "agent") == (run_id, "FINISHED")


@pytest.mark.parametrize(
    ("report", "variables"), [("tracker-files", {}), ("", {"ART_MLFLOW_MODE": "disabled"})], ids=["others", "disabled"]
)
def test_where_it_is_not_asked_for_nothing_is_imported_or_written(tmp_path, report, variables):
    logged(tmp_path, steps=1, report=report, then="loaded", **variables)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_server_that_never_answers_is_said_and_costs_nothing_else(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # whoever connects waits for an answer
        variables = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        variables["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = begun(tmp_path, **variables)
        try:
            assert process.stdout.readline() == "logged\n"
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert "mlflow: opening the run of shop/agent failed: MlflowException" in said
    assert "mlflow: 18 reports were lost" in said
    history = read_history(tmp_path / "shop" / "models" / "agent" / "history.jsonl")
    assert [row["step"] for row in history] == [0, 1, 2]


def test_a_database_that_another_holds_for_a_while_loses_nothing(prepared, in_database):
    with sqlite3.connect(prepared / "mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        process = begun(prepared)
        try:
            assert process.stdout.readline() == "logged\n", "the steps waited for the database"
            time.sleep(1)  # MLflow is at the database by now, or will be soon
            other.execute("ROLLBACK")
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    other.close()
    assert process.returncode == 0, said
    assert steps_of(in_database(prepared, "shop", "agent")) == [0, 1, 2]


ODD = """
import asyncio, math
import art

async def main():
    model = art.Model(name="agent", project="shop", base_path="runs", report_metrics=["mlflow"])
    odd = {"loss/a//b": 1.0, "loss/": 2.0, "loss/half \\ud83d": 3.0, "loss/" + "x" * 300: 4.0}
    await model.log(metrics=odd, step=1)
    await model.log(metrics={f"loss/{n}!": float(n) for n in range(1500)} | {"loss/fine": 5.0}, step=2)
    await model.log([art.TrajectoryGroup([art.Trajectory(reward=1.0)])], step=3, split="val")
    await model.log([art.TrajectoryGroup([art.Trajectory(reward=0.0)])], step=3, split="val")
    print("logged")

asyncio.run(main())
"""


def test_odd_names_long_rows_and_a_step_that_is_logged_again_cost_nothing(prepared, in_database):
    assert logged(prepared, code=ODD) == ""
    model = in_database(prepared, "shop", "agent")
    first, second = (row.metrics for row in model.rows if row.step < 3)
    odd = {"loss/a//b": 1, "loss/": 2, "loss/half \ud83d": 3, "loss/" + "x" * 300: 4}
    assert {name: first.get(name) for name in odd} == odd
    assert second == {f"loss/{n}!": n for n in range(1500)} | {"loss/fine": 5}
    assert model.trajectories == {(3, "val"): 2}
    (first_table,) = prepared.glob("mlruns/*/*/artifacts/trajectories/val/0003.json")
    tables = [first_table, first_table.with_name("0003-2.json")]
    assert [json.loads(table.read_text(encoding="utf-8"))["data"][0][1] for table in tables] == [1, 0]


OWN_USE = """
import asyncio, os, sys
if sys.argv[4] == "before":
    import mlflow
    from mlflow.telemetry import get_telemetry_client
    assert get_telemetry_client() is not None
    mine = mlflow.start_run()
import art
from art_mlflow.plugin import reporter

async def main():
    model = art.Model(name="agent", project="shop", base_path="runs", report_metrics=["mlflow"])
    await model.log(metrics={"val/reward": 1.0}, step=1)

before = dict(os.environ)
asyncio.run(main())
assert reporter.flush()
import mlflow
from mlflow.telemetry import get_telemetry_client
from mlflow.utils.logging_utils import should_suppress_logs_in_thread

assert {k: v for k, v in os.environ.items() if k.startswith("MLFLOW")} == {
    k: v for k, v in before.items() if k.startswith("MLFLOW")
}
assert not should_suppress_logs_in_thread.get()
if sys.argv[4] == "before":
    assert mlflow.active_run().info.run_id == mine.info.run_id
    mlflow.log_metric("mine", 2.0)
else:
    assert get_telemetry_client() is None
    assert mlflow.active_run() is None
reporter.close()
print("logged")
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_users_own_use_of_mlflow_is_as_they_set_it(prepared, in_database, when):
    logged(prepared, code=OWN_USE, report=when)
    (row,) = in_database(prepared, "shop", "agent").rows
    assert (row.step, row.metrics) == (1, {"val/reward": 1})
