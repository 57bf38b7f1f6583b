"""Which trackers a model reports to: all that are installed, or those that its `report_metrics` names.

A tracker is a plugin with a hook that is told what is logged. Knows the registry and no tracker.
"""

from __future__ import annotations

from collections.abc import Sequence

from art_core import PluginRegistry
from art_core.errors import PluginNotInstalled, did_you_mean
from art_core.loading import PluginStatus

_HOOKS = ("art_log_metrics", "art_log_trajectories")


def trackers(registry: PluginRegistry, report_metrics: Sequence[str] | None) -> list[str]:
    """The names of the plugins to tell, sorted.

    Raises PluginNotInstalled for a name that is no tracker here, with those that are.
    """
    there = {each.plugin_name for hook in _HOOKS for each in getattr(registry.hooks.hook, hook).get_hookimpls()}
    for name in report_metrics or ():
        if name not in there:
            raise PluginNotInstalled(
                f"report_metrics names {name!r}, which is no tracker here.{_why(registry, name)}"
                f"{did_you_mean(name, there)} Installed trackers: {', '.join(sorted(there)) or 'none'}."
            )
    return sorted(there if report_metrics is None else report_metrics)


def _why(registry: PluginRegistry, name: str) -> str:
    for info in registry.infos:
        if info.name == name:
            reports = "it is told nothing that is logged"
            return (
                f" The plugin is {info.status.value}: {reports if info.status is PluginStatus.ACTIVE else info.error}."
            )
    return ""
