"""What beginners write wrong, and that each is refused, or failed by its suite, with a message that names the method,
what the kernel has in its place, and the fix.
"""

from __future__ import annotations

import asyncio
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from art_conformance import InferenceEngineConformance, PluginConformance
from art_conformance.tracker_process import Noted
from art_conformance.tracker_suite import Told, TrackerConformance
from art_core import BackendSpec, InferenceEngineSpec, PluginRegistry, announce, announcements
from art_core.registry import instantiate

Say = Callable[[types.ModuleType], Any]
BEGUN = "import asyncio, time\nfrom art_core import *\nart_api = 1\n"
ENGINE = """
from art_core import *
class Engine:
    name = "mine"
    capabilities = frozenset()
    def launch(self, config): return LaunchPlan(argv=(config.python,))
    def load_adapter(self, adapter, folder): return EngineCall(method="POST", path="/load")
    def unload_adapter(self, adapter): return EngineCall(method="POST", path="/unload")
    def list_adapters(self): return EngineCall(method="GET", path="/v1/models")
    def read_adapters(self, body): return frozenset()
    def pause(self): return EngineCall(method="POST", path="/pause")
    def resume(self): return EngineCall(method="POST", path="/resume")
    def sleep(self): return EngineCall(method="POST", path="/sleep")
    def wake(self): return EngineCall(method="POST", path="/wake")
    def check_answer(self, call, status, body): ...
    def prepare_request(self, endpoint, body, adapter): return body
    def read_response(self, endpoint, body): return body
    def read_chunk(self, endpoint, chunk): return chunk
"""


def loading(module: types.ModuleType) -> None:
    """What `art plugins check` says, and whoever asks for the plugin."""
    PluginRegistry().register(module, name="mine")


def plugin_suite(module: types.ModuleType) -> None:
    """What PluginConformance says of its engine, or of its backend."""
    card: Any = InferenceEngineSpec(name="mine", factory=f"{module.__name__}:Engine", summary="My own server.")
    if hasattr(module, "MyBackend"):
        card = BackendSpec(name="mine", factory=f"{module.__name__}:MyBackend", summary="My own machines.")
    PluginConformance().test_protocols([("", card)])


def engine_suite(module: types.ModuleType) -> None:
    """What InferenceEngineConformance says of an engine that does what it doesn't declare."""
    card = InferenceEngineSpec(name="mine", factory=f"{module.__name__}:Engine", summary="My own server.")
    InferenceEngineConformance().test_undeclared_is_refused(instantiate(card))


def training(module: types.ModuleType) -> None:
    """What a step says of a hook, as a warning."""
    registry = PluginRegistry()
    registry.register(module, name="mine")
    asyncio.run(announce(registry, "art_after_train", backend=None, model=None, result=None))


def tracker_suite(_module: types.ModuleType) -> None:
    """What TrackerConformance says of a tracker that writes where all would wait."""
    told = Told(Path(), 0, "", frozenset())
    told.__dict__["noted"] = Noted(on_loop=["open metrics.csv"])
    TrackerConformance().test_the_loop_goes_on(told)


WRONG: dict[str, tuple[str, Say, str]] = {
    "a hook's name is misspelt": (
        BEGUN + "@hookimpl\ndef art_after_trian(result): ...\n",
        loading,
        "it implements art_after_trian, which is not a hook. Did you mean 'art_after_train'?",
    ),
    "the number of the interface is missing": (
        "from art_core import hookimpl\n@hookimpl\ndef art_after_train(result): ...\n",
        loading,
        "it declares no art_api; write `art_api = 1` in it",
    ),
    "a hook is not decorated": (
        BEGUN + "def art_after_train(result): ...\n",
        loading,
        "its art_after_train is not decorated with @hookimpl, so it would never be called",
    ),
    "an argument of a hook is renamed": (
        BEGUN + "@hookimpl\ndef art_train_failed(model, step, exception): ...\n",
        loading,
        "its art_train_failed takes 'exception', which it isn't given. Take what you need of art_train_failed(backend,"
        " model, step, error)",
    ),
    "a hook that registers is async": (
        BEGUN + "@hookimpl\nasync def art_register_backends(): return []\n",
        loading,
        "its art_register_backends is async, and nobody would await it; write `def art_register_backends`",
    ),
    "one card is given in place of a list": (
        BEGUN + "@hookimpl\ndef art_register_inference_engines():\n"
        "    return InferenceEngineSpec(name='mine', factory='mine:Engine', summary='Mine.')\n",
        loading,
        "its art_register_inference_engines must give a list, [InferenceEngineSpec(...)], not InferenceEngineSpec",
    ),
    "a capability is declared as text": (
        BEGUN + "@hookimpl\ndef art_register_inference_engines():\n"
        "    return [InferenceEngineSpec(name='mine', factory='m:E', summary='Mine.', capabilities={'pause'})]\n",
        loading,
        "'mine' declares the capability 'pause', no member of InferenceCapability, which has STREAMING_TOKEN_IDS,"
        " TOOL_CALLS, UNSCALED_LOGPROBS, BASE_BESIDE_ADAPTERS, PAUSE, SLEEP, CONCURRENT_TRAINING",
    ),
    "a method of the protocol is missing": (
        ENGINE.replace("def unload_adapter", "def remove_adapter"),
        plugin_suite,
        "mine lacks unload_adapter. art_core.InferenceEngine has `def unload_adapter(self, adapter: str) ->"
        " EngineCall`; write one like it",
    ),
    "a parameter of a method is renamed": (
        ENGINE.replace("def load_adapter(self, adapter, folder)", "def load_adapter(self, name, path)"),
        plugin_suite,
        "mine.load_adapter takes name, path, and no 'adapter'. art_core.InferenceEngine has `def load_adapter(self,"
        " adapter: str, folder: Path) -> EngineCall`; name its parameters as they are there",
    ),
    "a method is async where the protocol's is not": (
        ENGINE.replace("def launch", "async def launch"),
        plugin_suite,
        "mine.launch is `async def`, and nobody awaits it. art_core.InferenceEngine has `def launch(self, config:"
        " InferenceLaunch) -> LaunchPlan`; write `def`",
    ),
    "a method is not async where the protocol's is": (
        BEGUN + "class MyBackend(Backend):\n    def get_step(self, model: PolicyModel) -> int: return 0\n",
        plugin_suite,
        "mine.get_step is `def`, and is awaited. art_core.Backend has `async def get_step(self, model: PolicyModel) ->"
        " int`; write `async def`",
    ),
    "a capability is used that is not declared": (
        ENGINE,
        engine_suite,
        "pause() of mine was done, and it doesn't declare InferenceCapability.PAUSE. Declare InferenceCapability.PAUSE"
        " if it can do that; if not, raise UnsupportedCapability('mine', 'pause', 'what to use instead')",
    ),
    "a hook blocks the event loop": (
        BEGUN + "@hookimpl\ndef art_after_train(result): time.sleep(0.1)\n",
        training,
        " s in art_after_train, and all else stood still. Write `async def"
        " art_after_train`, and in it `await asyncio.to_thread(...)` for what takes long.",
    ),
    "a tracker writes on the event loop": (
        "",
        tracker_suite,
        "on the event loop's thread it did ['open metrics.csv']; give that to a thread of its own (`await"
        " asyncio.to_thread(...)`, or art_tracker_kit.Reporter)",
    ),
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], types.ModuleType]]:
    """Import a beginner's source as a module."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(announcements, "BLOCKED_LIMIT_S", 0.02)

    def write(source: str) -> types.ModuleType:
        (tmp_path / "mine_of_a_beginner.py").write_text(textwrap.dedent(source), encoding="utf-8")
        return __import__("mine_of_a_beginner")

    yield write
    sys.modules.pop("mine_of_a_beginner", None)


@pytest.mark.parametrize("mistake", WRONG)
def test_what_a_beginner_writes_wrong_is_refused_with_the_fix(
    written: Callable[[str], types.ModuleType], mistake: str
) -> None:
    source, say, said = WRONG[mistake]
    module = written(source)
    if say is training:
        with pytest.warns(RuntimeWarning, match=re.escape(said)):
            say(module)
        return
    with pytest.raises(BaseException, match=re.escape(said)):
        say(module)


def test_there_are_at_least_ten() -> None:
    assert len(WRONG) >= 10
