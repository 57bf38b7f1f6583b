"""What the suites of an installed plugin share: it is found by the name of its entry point, and loaded alone."""

from __future__ import annotations

from importlib import metadata

import pytest

from art_core import PluginRegistry
from art_core.loading import ENTRY_POINT_GROUP, PluginInfo

from .suite import Suite


class PluginFixtures(Suite):
    """The subclass gives `plugin_name`."""

    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls) -> str:
        raise pytest.UsageError("give the fixture `plugin_name` (scope='class'): the plugin's entry-point name")

    @pytest.fixture(scope="class")
    @classmethod
    def entry_point(cls, plugin_name: str) -> metadata.EntryPoint:
        points = [p for p in metadata.entry_points(group=ENTRY_POINT_GROUP) if p.name == plugin_name]
        if not points:
            pytest.fail(f"no entry point of the group {ENTRY_POINT_GROUP!r} is called {plugin_name!r}", pytrace=False)
        return points[0]

    @pytest.fixture(scope="class")
    @classmethod
    def info(cls, plugin_name: str, entry_point: metadata.EntryPoint) -> PluginInfo:
        registry = PluginRegistry()
        registry.load([entry_point])
        return next(info for info in registry.infos if info.name == plugin_name)
