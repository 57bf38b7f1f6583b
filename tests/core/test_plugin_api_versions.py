"""A plugin made for the interface before the one that is spoken goes on working, as docs/compatibility.md says; older
and newer ones are told which side to upgrade.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from art_core import PluginRegistry, announce, hookspecs, plugin_gates
from art_core.loading import PluginInfo, PluginStatus
from art_core.registry import instantiate

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
# As somebody wrote it when 1 was spoken: it names the arguments that it needs, and the fields that it knows.
OLD = """
    from art_core import InferenceEngineSpec, hookimpl

    art_api = 1
    heard = []

    def engine():
        return "an engine"

    @hookimpl
    def art_register_inference_engines():
        return [InferenceEngineSpec(name="old", factory="art_old:engine", summary="An old engine.")]

    @hookimpl
    async def art_log_metrics(metrics, step):
        heard.append((step, metrics))
"""


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have this kernel speak another number of the interface, and the one before it."""

    def speak(api: int) -> None:
        monkeypatch.setattr(plugin_gates, "API_VERSION", api)
        monkeypatch.setattr(plugin_gates, "OLDEST_API_VERSION", api - 1)

    return speak


def loaded(site: Any) -> tuple[PluginRegistry, PluginInfo]:
    registry = PluginRegistry()
    registry.load(site.entry_points())
    (info,) = registry.infos
    return registry, info


async def test_a_plugin_of_the_interface_before_is_used_as_before(plugin_site: Any, spoken: Any) -> None:
    plugin_site.install("art-old", OLD)
    spoken(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry, info = loaded(plugin_site)
    assert (info.status, info.api, info.error) == (PluginStatus.ACTIVE, 1, "")
    assert instantiate(registry.inference_engine("old")) == "an engine"
    # The kernel of today gives a hook an argument more.
    said = {"model": None, "metrics": {"loss/train": 1.0}, "step": 3, "split": "train", "added": "since"}
    await announce(registry, "art_log_metrics", **said)
    import art_old  # type: ignore[import-not-found,unused-ignore]

    assert art_old.heard == [(3, {"loss/train": 1.0})]


@pytest.mark.parametrize(
    ("api", "spoken_api", "said"),
    [
        (1, 1, ""),
        (1, 2, ""),
        (2, 2, ""),
        (2, 1, "it speaks plugin API 2, art-core speaks 0 to 1; upgrade art-core"),
        (3, 2, "it speaks plugin API 3, art-core speaks 1 to 2; upgrade art-core"),
        (1, 3, "it speaks plugin API 1, art-core speaks 2 to 3; upgrade art-old"),
    ],
)
@pytest.mark.filterwarnings("ignore:plugin 'old' of art-old is incompatible:RuntimeWarning")
def test_two_numbers_are_let_in_and_the_others_are_told_which_side_to_upgrade(
    plugin_site: Any, spoken: Any, api: int, spoken_api: int, said: str
) -> None:
    plugin_site.install("art-old", OLD.replace("art_api = 1", f"art_api = {api}"))
    spoken(spoken_api)
    registry, info = loaded(plugin_site)
    assert (info.status, info.error) == (PluginStatus.INCOMPATIBLE if said else PluginStatus.ACTIVE, said)
    assert registry.provided("inference engine") == ([] if said else ["old"])


def test_what_is_spoken_is_a_number_and_the_one_before_it_and_the_page_says_so() -> None:
    assert max(1, plugin_gates.API_VERSION - 1) == plugin_gates.OLDEST_API_VERSION
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"`art_core.API_VERSION` is the number that is spoken: {plugin_gates.API_VERSION}." in text


def test_an_implementation_may_name_fewer_arguments_of_any_hook() -> None:
    names = [name for name in vars(hookspecs) if name.startswith("art_") and not name.startswith("art_register_")]
    for name in names:
        source = f"@hookimpl\ndef {name}(): ...\nart_api = 1\n"
        plugin: Any = type("Plugin", (), {})()
        namespace: dict[str, Any] = {"hookimpl": hookspecs.hookimpl}
        exec(source, namespace)
        setattr(plugin, name, namespace[name])
        plugin.art_api = 1
        PluginRegistry().register(plugin, "none")
