"""What every test finds set, and how a run of several workers is divided among them: by files with `--dist loadfile`,
as `make test` runs slow tests.

What the tests of a file share, a live server above all, is then made once; so is the environment of wheels that the
tests of packaging share. What may take longest, by its declared time limit, begins first. Knows nothing of what is
tested.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something of the machine and nothing of what is tested.
settings.register_profile("art", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("art")
# Folders whose tests share what a session of pytest makes once.
TOGETHER = ("tests/packaging/",)


def pytest_configure() -> None:
    # Trackers of whoever runs the tests are not to hear of it; what tests a tracker turns it on again.
    os.environ |= {"WANDB_MODE": "disabled", "ART_TRACKIO_MODE": "disabled", "ART_MLFLOW_MODE": "disabled"}
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        # Threads beyond the cores wait for each other, many times as long as the work takes; servers inherit this.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.fixture
def sigint_is_heard() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and so would what a test starts there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    # Longest first, as `pytest_collection_modifyitems` has put them.
    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return
    longest: dict[str, float] = {}
    for item in items:
        scope = _scope(item.nodeid)
        longest[scope] = max(longest.get(scope, 0.0), _limit_s(item))
    items.sort(key=lambda item: longest[_scope(item.nodeid)], reverse=True)


def _scope(nodeid: str) -> str:
    """What is run by one worker: a file, or a folder whose files belong together."""
    return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid.partition("::")[0])


def _limit_s(item: pytest.Item) -> float:
    slow, limit = item.get_closest_marker("slow"), item.get_closest_marker("timeout")
    return float(limit.args[0]) if slow and limit else float(slow is not None)
