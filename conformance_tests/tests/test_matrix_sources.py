"""What a cell of the matrix is true for: the code that it runs, as it lies on disk, and what that code requires."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from art_conformance.matrix_cells import Cell
from art_conformance.matrix_sources import distributions_of, sources_of, versions_of
from art_core import installed_plugins


def plugin_of(folder: Path, name: str, requires: str) -> Path:
    """Lay out a plugin in `folder` as an editable installation of a project has it; gives its one module."""
    project, metadata = folder / f"{name}-project", folder / f"{name}-0.1.dist-info"
    (package := project / "src" / name).mkdir(parents=True)
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\nRequires-Dist: {requires}\n", encoding="utf-8"
    )
    (metadata / "direct_url.json").write_text(
        json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}}), encoding="utf-8"
    )
    (metadata / "RECORD").write_text(f"{metadata.name}/direct_url.json,,\n", encoding="utf-8")
    (package / "__init__.py").write_text("", encoding="utf-8")
    (module := package / "plugin.py").write_text("art_api = 1", encoding="utf-8")
    return module


@pytest.mark.slow
def test_a_cell_is_told_apart_by_the_sources_of_what_it_runs_editable_ones_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = plugin_of(tmp_path, "near", "respx"), plugin_of(tmp_path, "far", "near")
    monkeypatch.syspath_prepend(tmp_path)
    registry: Any = SimpleNamespace(
        infos=[SimpleNamespace(name=name, distribution=name, provides=()) for name in ("near", "far")]
    )
    cell, other = Cell("tracker-far", plugins=("far",)), Cell("tracker-near", plugins=("near",))
    assert {"art-conformance", "art-core", "far", "near"} <= set(distributions_of(cell, registry))
    assert "far" not in distributions_of(other, registry)
    assert "respx" in versions_of(cell, registry), "what its distributions require is told too"
    before = [sources_of(each, registry) for each in (cell, other)]
    assert [sources_of(each, registry) for each in (cell, other)] == before
    far.write_text("art_api = 2", encoding="utf-8")
    after = [sources_of(each, registry) for each in (cell, other)]
    assert [one != two for one, two in zip(before, after, strict=True)] == [True, False]
    near.write_text("art_api = 2", encoding="utf-8")
    assert [sources_of(each, registry) for each in (cell, other)] != after


def test_the_test_file_of_a_cell_is_a_source_of_it_too(tmp_path: Path) -> None:
    (tests := tmp_path / "test_mine.py").write_text("", encoding="utf-8")
    cell = Cell("tracker-wandb", plugins=("wandb",), tests=str(tests))
    before = sources_of(cell, installed_plugins())
    (tmp_path / "conftest.py").write_text("", encoding="utf-8")
    assert sources_of(cell, installed_plugins()) != before
