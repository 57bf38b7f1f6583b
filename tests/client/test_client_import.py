"""What importing the client does, seen from a process of its own."""

import subprocess
import sys
import textwrap

import pytest

import art
from art_core import PluginRegistry
from art_core.errors import PluginNotInstalled


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["art", "art_core"])
def test_importing_has_no_side_effects(package):
    """No environment variable read or changed by us, nothing heavy imported, no connection, no process."""
    run(f"""
        import os, sys, traceback, pluggy, pydantic, asyncio
        before = dict(os.environ)
        read = []

        class Watched(dict):
            def note(self, key):
                files = [frame.filename for frame in traceback.extract_stack()]
                if any("/art/" in name or "/art_core/" in name for name in files[-3:-1]):
                    read.append(key)
            def __getitem__(self, key):
                self.note(key)
                return super().__getitem__(key)
            def get(self, key, default=None):
                self.note(key)
                return super().get(key, default)
            def __contains__(self, key):
                self.note(key)
                return super().__contains__(key)
            def __setitem__(self, key, value):
                raise AssertionError(f"{{key}} was set")
            def __delitem__(self, key):
                raise AssertionError(f"{{key}} was deleted")

        os.environ = Watched(before)
        os.getenv = lambda key, default=None: os.environ.get(key, default)
        opened = []
        sys.addaudithook(lambda event, args: opened.append((event, args)) if event.startswith(
            ("socket.", "subprocess.", "os.putenv", "os.system", "urllib.")) else None)
        import {package}
        heavy = {{"torch", "transformers", "openai", "httpx", "httpx2", "aiohttp", "pyarrow", "numpy", "rich", "tqdm",
                  "tenacity", "requests", "wandb", "mlflow", "dotenv"}}
        assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
        assert read == [], read
        assert dict(os.environ) == before
        assert opened == [], opened
    """)


def test_the_watch_sees_what_it_should():
    """The check above can fail: the same watch notices a plugin registry reading its variables."""
    out = run("""
        import os
        read = []
        class Watched(dict):
            def get(self, key, default=None):
                read.append(key)
                return super().get(key, default)
        import art
        os.environ = Watched(os.environ)
        from art_core import installed_plugins
        installed_plugins()
        print(read)
    """)
    assert "ART_DISABLE_PLUGINS" in out


def test_star_import_gives_every_public_name():
    namespace = {}
    exec("from art import *", namespace)
    assert set(art.__all__) <= namespace.keys()


def test_star_import_works_without_any_backend(monkeypatch):
    monkeypatch.setattr("art.backends.installed_plugins", PluginRegistry)
    namespace = {}
    exec("from art import *", namespace)
    with pytest.raises(PluginNotInstalled, match="pip install art-backend-local"):
        namespace["LocalBackend"](path="./.art")
    with pytest.raises(PluginNotInstalled, match="pip install art-backend-serverless"):
        art.ServerlessBackend()


def test_the_shims_name_the_pip_line(monkeypatch):
    monkeypatch.setattr("art.backends.installed_plugins", PluginRegistry)
    with pytest.raises(PluginNotInstalled, match="pip install art-backend-local"):
        from art.local import LocalBackend  # noqa: F401
    with pytest.raises(ImportError, match="pip install art-backend-serverless"):
        from art.serverless.backend import ServerlessBackend  # noqa: F401
    import art.local

    with pytest.raises(AttributeError, match="Nonsense"):
        art.local.Nonsense  # noqa: B018


def test_the_shims_give_what_the_plugin_provides(monkeypatch):
    from art_core import BackendSpec, hookimpl

    class Plugin:
        art_api = 1

        @hookimpl
        def art_register_backends(self):
            return [BackendSpec(name="local", factory="collections:OrderedDict", summary="Stands in for a backend.")]

    registry = PluginRegistry()
    registry.register(Plugin(), "stand-in")
    monkeypatch.setattr("art.backends.installed_plugins", lambda: registry)
    from collections import OrderedDict

    from art.local import LocalBackend

    assert LocalBackend is OrderedDict
    assert art.LocalBackend is OrderedDict


def test_names_that_do_not_exist():
    with pytest.raises(AttributeError, match="has no attribute 'PipelineTraner'"):
        art.PipelineTraner  # noqa: B018
