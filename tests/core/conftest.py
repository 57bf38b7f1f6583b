"""Real distributions to test the loader with: a folder of packages and dist-info, as pip would leave them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import pytest

import art_core


class PluginSite:
    """A folder of installed distributions, used in this process by path or in a subprocess without any others."""

    def __init__(self, folder: Path, others: Path) -> None:
        self.folder, self.others = folder, others
        folder.mkdir()

    def install(
        self,
        distribution: str,
        source: str,
        *,
        plugin: str | None = None,
        version: str = "1.2.0",
        requires: Sequence[str] = ("art-core>=0.1,<0.2",),
        modules: Mapping[str, str] | None = None,
    ) -> str:
        """Write a distribution whose plugin module holds `source`; gives the plugin's name."""
        module = distribution.replace("-", "_")
        plugin = plugin or distribution.removeprefix("art-")
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source))
        for name, content in (modules or {}).items():
            (self.folder / f"{name}.py").write_text(textwrap.dedent(content))
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {line}" for line in requires]) + "\n")
        (info / "entry_points.txt").write_text(f"[art]\n{plugin} = {module}\n")
        return plugin

    def entry_points(self) -> list[metadata.EntryPoint]:
        """What `importlib.metadata` finds in this folder alone."""
        return [point for d in metadata.distributions(path=[str(self.folder)]) for point in d.entry_points]

    def python(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run Python with these distributions, art-core and what it needs, and no other plugin."""
        path = os.pathsep.join([str(self.folder), str(self.others), str(Path(art_core.__file__).parent.parent)])
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ART_")}
        return subprocess.run(
            [sys.executable, "-S", *arguments],
            env={**inherited, "PYTHONPATH": path, "COLUMNS": "120", **env},
            cwd=self.folder.parent,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def art(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the `art` command."""
        return self.python("-m", "art_core", *arguments, **env)


@pytest.fixture(scope="session")
def packages_without_plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is installed here, by links, less every distribution that has a plugin."""
    folder = tmp_path_factory.mktemp("packages")
    plugins = {
        Path(str(d.locate_file(""))) / f"{d.name.replace('-', '_')}-{d.version}.dist-info"
        for d in metadata.distributions()
        if any(point.group == "art" for point in d.entry_points)
    }
    for site in dict.fromkeys(p for p in sys.path if p.endswith("-packages")):
        for entry in Path(site).iterdir():
            target = folder / entry.name
            if entry not in plugins and entry.suffix != ".pth" and not target.exists():
                target.symlink_to(entry)
    return folder


@pytest.fixture
def plugin_site(
    tmp_path: Path, packages_without_plugins: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PluginSite]:
    site = PluginSite(tmp_path / "site", packages_without_plugins)
    monkeypatch.syspath_prepend(str(site.folder))
    for variable in ("ART_DISABLE_PLUGINS", "ART_LOAD_PLUGINS", "ART_TRACE_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    before = set(sys.modules)
    yield site
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent == site.folder:
            del sys.modules[name]
