"""art-tracker-example under ART's suite, and what it writes."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import art_tracker_example
import pytest

from art_conformance import PluginConformance
from art_core import CheckpointRef, ModelKey, PluginRegistry, PublicationReceipt, Trajectory, TrajectoryGroup, announce


class TestExamplePlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls) -> str:
        return "example"


def test_what_happens_in_a_step_is_written_line_by_line(tmp_path: Path) -> None:
    registry = PluginRegistry()
    registry.register(art_tracker_example, name="example")
    model = SimpleNamespace(project="shop", name="agent", base_path=str(tmp_path))
    logged: Any = {"model": model, "step": 3, "split": "val"}
    groups = [TrajectoryGroup([Trajectory(reward=0.5), Trajectory(reward=1)])]
    key = ModelKey("shop", "agent")
    receipt = PublicationReceipt(model=key, step=3, inference_name="agent@3")

    async def log() -> None:
        await announce(registry, "art_log_trajectories", trajectory_groups=groups, **logged)
        await announce(registry, "art_log_metrics", metrics={"val/reward": 0.75, "loss/train": -2.0}, **logged)
        checkpoint = CheckpointRef(key, 3, tmp_path)
        await announce(registry, "art_checkpoint_published", model=model, checkpoint=checkpoint, receipt=receipt)

    asyncio.run(log())
    (file,) = tmp_path.rglob("example.log")
    assert file.read_text(encoding="utf-8").splitlines() == [
        "val 3 trajectory 0.5",
        "val 3 trajectory 1",
        "val 3 loss/train -2",
        "val 3 val/reward 0.75",
        "published 3 as agent@3",
    ]
