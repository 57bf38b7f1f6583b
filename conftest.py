"""How a run of several workers (`pytest -n 2 --dist loadgroup`, as `make test-fast` does) is divided among them.

Tests that share a fixture of their module or class run in one worker, so that a live server is started once; any other
slow test runs wherever there is room. What may take longest, by its declared time limit, begins first. Knows nothing of
what is tested.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something of the machine and nothing of what is tested.
settings.register_profile("art", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("art")


def pytest_configure() -> None:
    # Trackers of whoever runs the tests are not to hear of it; what tests a tracker turns it on again.
    os.environ |= {"WANDB_MODE": "disabled", "ART_TRACKIO_MODE": "disabled", "ART_MLFLOW_MODE": "disabled"}
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        # Threads beyond the cores wait for each other, many times as long as the work takes; servers inherit this.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_limit_s, reverse=True)


def _group(item: pytest.Item) -> str:
    """The name of the tests that must run in one worker with this one; empty when it may run anywhere."""
    module, _, test = item.nodeid.partition("::")
    if item.get_closest_marker("slow") is None:
        return module
    known = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    scopes = {definition.scope for name in item.fixturenames for definition in known.get(name, ())[-1:]}  # type: ignore[attr-defined]
    if "module" in scopes or "package" in scopes:
        return module
    return f"{module}::{test.partition('::')[0]}" if "class" in scopes else ""


def _limit_s(item: pytest.Item) -> float:
    slow, limit = item.get_closest_marker("slow"), item.get_closest_marker("timeout")
    return float(limit.args[0]) if slow and limit else float(slow is not None)
