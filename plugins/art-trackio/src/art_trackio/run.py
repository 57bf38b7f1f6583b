"""A model's run in Trackio's database, by the trackio library, which is imported when a run is opened.

All of it is called in the reporter's thread, and may take as long as it takes. Knows no hook.
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any

from art_core import CheckpointRef
from art_tracker_kit import COLUMNS, LoggedModel, Table, adapter_files

if TYPE_CHECKING:
    from trackio.run import Run

ARTIFACT_TYPE = "lora"


class TrackioRun:
    """One run, called as the model is, so that a process that goes on with a model goes on with its run."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def metrics(self, metrics: dict[str, float], step: int) -> None:
        """One row at a step."""
        self._run.log(dict(metrics), step=step)

    def trajectories(self, table: Table, step: int, split: str) -> None:
        """The table of a step, and of how many trajectories it was made."""
        import trackio

        name = f"trajectories/{split}"
        row: dict[str, Any] = {f"{name}_total": table.total}
        if table.rows:
            row[name] = trackio.Table(columns=list(COLUMNS), data=[list(cells) for cells in table.rows])
        self._run.log(row, step=step)

    def adapter(self, checkpoint: CheckpointRef, base_model: str) -> None:
        """The adapter as a version of the artifact that is called as the model is."""
        import trackio

        metadata = {"base_model": base_model, "step": checkpoint.step}
        artifact = trackio.Artifact(checkpoint.model.name, type=ARTIFACT_TYPE, metadata=metadata)
        for file in adapter_files(checkpoint.path):
            artifact.add_file(str(file), name=file.relative_to(checkpoint.path).as_posix())
        self._run.log_artifact(artifact, aliases=[f"step{checkpoint.step}", "latest"])

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()  # type: ignore[no-untyped-call]


def open_run(model: LoggedModel) -> TrackioRun:
    """Begin or go on with the model's run. Raises what trackio raises."""
    import trackio

    def init() -> Run:
        return trackio.init(
            project=model.project,
            name=model.name,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    # trackio ends the run that was opened before in the same context: a user's own, or another model's.
    return TrackioRun(contextvars.Context().run(init))
