"""Acme's tracker under ART's suite, and what it writes."""

import asyncio
from types import SimpleNamespace

import art_tracker_acme
import pytest

from art_conformance import PluginConformance
from art_core import PluginRegistry, Trajectory, TrajectoryGroup, announce


class TestAcmeTracker(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "acme-tracker"


def test_every_metric_and_trajectory_of_a_step_is_a_line(tmp_path):
    registry = PluginRegistry()
    registry.register(art_tracker_acme, name="acme-tracker")
    model = SimpleNamespace(project="shop", name="agent", base_path=str(tmp_path))
    step = {"model": model, "step": 3, "split": "val"}
    groups = [TrajectoryGroup([Trajectory(reward=0.5), Trajectory(reward=1)])]

    async def log():
        await announce(registry, "art_log_trajectories", trajectory_groups=groups, **step)
        await announce(registry, "art_log_metrics", metrics={"val/reward": 0.75, "loss/train": -2.0}, **step)

    asyncio.run(log())
    (file,) = tmp_path.rglob("acme.log")
    assert file.read_text().splitlines() == [
        "val 3 trajectory 0.5", "val 3 trajectory 1", "val 3 loss/train -2", "val 3 val/reward 0.75",
    ]  # fmt: skip
