"""Runs the training worker in an engine's own environment, with our packages from the client's.

So worker and client are always of one version, and an environment holds the engine's library and nothing of ours: its
pins are made once, and nothing in it has to be installed again when we change. Only the packages that are named are
taken from there; beside them lies everything else that the client has, in versions that the engine must not see.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType


class BroughtPackages:
    """Finds each of these packages in the folder given for it, and nothing else."""

    def __init__(self, folders: Mapping[str, str]) -> None:
        self._folders = folders

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        folder = self._folders.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, f"{folder}/__init__.py", submodule_search_locations=[folder])


if __name__ == "__main__":
    sys.meta_path.insert(0, BroughtPackages(json.loads(os.environ["ART_BROUGHT_PACKAGES"])))
    runpy.run_module("art_training_kit.worker", run_name="__main__", alter_sys=True)
