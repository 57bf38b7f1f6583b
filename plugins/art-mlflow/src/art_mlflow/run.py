"""A model's run in MLflow, by MLflow's own client, which is imported when a run is opened.

All of it is called in the reporter's thread, and may take as long as it takes. Knows no hook, and nothing of the run
that a user has active.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from art_core import CheckpointRef
from art_tracker_kit import COLUMNS, LoggedModel, Table, adapter_files

from .names import allowed

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow shows a file as a table, and finds it by `load_table`, when this tag names it; a tag holds about 80 names.
TABLES = "mlflow.loggedArtifacts"


class MlflowRun:
    """One run, called as the model is, so that a process that goes on with a model goes on with its run."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._id, self._at_ms = client, run_id, 0

    def metrics(self, metrics: dict[str, float], step: int) -> None:
        """One row at a step. A name that MLflow refuses is kept in a tag, as JSON in ASCII, for any database."""
        from mlflow.entities import Metric, RunTag

        # Of two values of one step MLflow takes the one with the later time for the later.
        self._at_ms = max(self._at_ms + 1, int(time.time() * 1000))
        row = [(allowed(name), name, float(value)) for name, value in metrics.items()]
        for part in (row[first : first + 100] for first in range(0, len(row), 100)):  # a server takes 100 tags at once
            told = [Metric(key, value, self._at_ms, step) for key, _, value in part]
            notes = [RunTag(f"metric_name/{key}", json.dumps(name[:400])) for key, name, _ in part if key != name]
            self._client.log_batch(self._id, metrics=told, tags=notes, synchronous=True)

    def trajectories(self, table: Table, step: int, split: str) -> None:
        """The table of a step as a file, and of how many trajectories it was made as a metric."""
        path = f"trajectories/{split}/{step:04d}"
        self.metrics({f"trajectories/{split}_total": table.total}, step)
        if table.rows:
            tag = self._client.get_run(self._id).data.tags.get(TABLES, "[]")
            path += f"-{tag.count(path) + 1}.json" if path in tag else ".json"  # a step that is logged again
            self._client.log_dict(self._id, {"columns": COLUMNS, "data": table.rows}, path)
            tables = [*json.loads(tag), {"path": path, "type": "table"}]
            self._client.set_tag(self._id, TABLES, json.dumps(tables[-50:]))

    def adapter(self, checkpoint: CheckpointRef, base_model: str) -> None:
        """The adapter's files, byte for byte, and then in tags which is the latest and what it is an adapter of."""
        folder = PurePosixPath("checkpoints", f"step{checkpoint.step}")
        for file in adapter_files(checkpoint.path):
            self._client.log_artifact(self._id, str(file), str(folder / file.relative_to(checkpoint.path).parent))
        self._client.set_tag(self._id, "base_model", base_model)
        self._client.set_tag(self._id, "latest_checkpoint", str(folder))

    def close(self) -> None:
        """Say that it is finished, for now."""
        # `set_terminated` would write to the terminal, and end what a user logs to the same place asynchronously.
        self._client.update_run(self._id, "FINISHED")


def open_run(model: LoggedModel) -> MlflowRun:
    """Begin or go on with the model's run, on the server or in the database that MLflow is set to. Raises what MLflow
    raises.

    MLflow reads as it is imported whether it may report its use to its makers, and advise coding agents. A user who
    imported it before has it as they set it. This thread logs nothing for MLflow from here on; others do.
    """
    names = () if "mlflow" in sys.modules else ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_DISABLE_AGENT_HINT")
    quiet = {name: "true" for name in names if name not in os.environ}
    os.environ |= quiet
    try:
        from mlflow import MlflowClient, MlflowException
        from mlflow.utils.logging_utils import should_suppress_logs_in_thread
    finally:
        for name in quiet:
            os.environ.pop(name, None)
    should_suppress_logs_in_thread.set(True)  # type: ignore[no-untyped-call]
    client, project = MlflowClient(), model.project
    try:
        experiment = client.get_experiment_by_name(project) or client.get_experiment(client.create_experiment(project))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return open_run(model)  # another process was first
    found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{model.name}'")
    # A database may take agent and Agent for one.
    run = next((run for run in found if run.info.run_name == model.name), None)
    run = run or client.create_run(experiment.experiment_id, run_name=model.name)
    client.update_run(run.info.run_id, "RUNNING")
    return MlflowRun(client, run.info.run_id)
