"""What `backend.train` returns. Nothing here logs, publishes or computes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of one training step.

    `step` is the step of the checkpoint that came out, `metrics` what `model.log(..., metrics=result.metrics)` takes.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LocalTrainResult(TrainResult):
    """A step trained on this machine; `checkpoint_path` is the folder of its PEFT adapter, None when none was kept."""

    checkpoint_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class ServerlessTrainResult(TrainResult):
    """A step trained remotely; `artifact_name` names the stored adapter, None when none was kept."""

    artifact_name: str | None = None
