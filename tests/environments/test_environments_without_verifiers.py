"""Without verifiers, or with one that is too old, it is said what to install; and nothing of it is imported before."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from art.environments.verifiers import VerifiersEnvironment
from art_core.errors import PluginNotInstalled


def version_is(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def found(name: str) -> str:
        assert name == "verifiers"
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    version_is(monkeypatch, None)
    with pytest.raises(PluginNotInstalled, match=r"pip install 'art-core\[verifiers\]'"):
        VerifiersEnvironment("gsm8k-v1")


def test_one_that_is_too_old_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    version_is(monkeypatch, "0.1.14")
    with pytest.raises(ImportError, match=r"verifiers 0\.1\.14 is installed; .*--upgrade"):
        VerifiersEnvironment("gsm8k-v1")


def test_the_module_alone_imports_nothing_heavy() -> None:
    heavy = {"verifiers", "openai", "aiohttp", "torch"}
    code = f"import sys, art.environments.verifiers; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]", done.stdout
