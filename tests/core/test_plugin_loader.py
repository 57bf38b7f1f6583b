"""The loader with real distributions: what becomes of each, what is warned, and what asking by name says."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from art_core import InferenceCapability, InferenceEngineSpec, PluginRegistry, TrainingEngineSpec, hookimpl
from art_core.errors import PluginError, PluginNotInstalled
from art_core.loading import PluginInfo, PluginStatus
from art_core.registry import instantiate

ENGINE = """
    from art_core import InferenceCapability, InferenceEngineSpec, hookimpl

    art_api = 1

    @hookimpl
    def art_register_inference_engines():
        return [InferenceEngineSpec(
            name="{name}", factory="{factory}", summary="An engine.",
            capabilities=frozenset({{InferenceCapability.PAUSE}}))]
"""


def engine(name: str, factory: str = "builtins:dict") -> str:
    return ENGINE.format(name=name, factory=factory)


def load(site: Any) -> tuple[PluginRegistry, dict[str, PluginInfo], list[str]]:
    """The registry, each plugin by its distribution, and what was warned."""
    registry = PluginRegistry()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry.load(site.entry_points())
    told = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    return registry, {info.distribution: info for info in registry.infos}, told


def test_an_active_plugin_says_all_of_itself(plugin_site: Any) -> None:
    plugin_site.install("art-acme", engine("acme"))
    registry, infos, told = load(plugin_site)
    assert told == []
    info = infos["art-acme"]
    assert info == PluginInfo(
        name="acme",
        distribution="art-acme",
        version="1.2.0",
        status=PluginStatus.ACTIVE,
        api=1,
        provides=("inference engine acme",),
        capabilities={"inference engine acme": ("pause",)},
        hooks=("art_register_inference_engines",),
    )
    spec = registry.inference_engine("acme")
    assert isinstance(spec, InferenceEngineSpec)
    assert spec.capabilities == {InferenceCapability.PAUSE}
    assert registry.provided("inference engine") == ["acme"]
    assert instantiate(spec, a=1) == {"a": 1}


BROKEN = [
    ("import no_such_module_at_all", "it could not be imported: ModuleNotFoundError: No module named 'no_such_mod"),
    ("raise RuntimeError('no GPU driver')", "it could not be imported: RuntimeError: no GPU driver"),
    ("raise SystemExit(3)", "it could not be imported: SystemExit: 3"),
    ("def (", "it could not be imported: SyntaxError"),
    ("x = 1", "it declares no art_api; write `art_api = 1` in it"),
    ("art_api = '1'", "it declares no art_api"),
    (
        """
        from art_core import hookimpl
        art_api = 1
        @hookimpl
        def art_after_trian(result): ...
        """,
        "it implements art_after_trian, which is not a hook. Did you mean 'art_after_train'?",
    ),
    (
        """
        from art_core import hookimpl
        art_api = 1
        @hookimpl
        def after_train(result): ...
        """,
        "it implements after_train, which is not a hook. Did you mean 'art_after_train'?",
    ),
    (
        """
        from art_core import hookimpl
        art_api = 1
        @hookimpl(specname="art_log_metric")
        def keep(metrics): ...
        """,
        "it implements art_log_metric, which is not a hook. Did you mean 'art_log_metrics'?",
    ),
    (
        """
        art_api = 1
        def art_after_train(result): ...
        """,
        "its art_after_train is not decorated with @hookimpl, so it would never be called",
    ),
    (
        """
        art_api = 1
        def art_after_trian(result): ...
        """,
        "it defines art_after_trian, which is not a hook. Did you mean 'art_after_train'?",
    ),
    (
        """
        from art_core import hookimpl
        art_api = 1
        @hookimpl
        def art_after_train(outcome): ...
        """,
        "its art_after_train takes 'outcome', which it isn't given. Take what you need of art_after_train(backend, ",
    ),
    (
        """
        from art_core import hookimpl
        art_api = 1
        @hookimpl(wrapper=True)
        def art_after_train(result):
            yield
        """,
        "its art_after_train is a wrapper; the hooks of ART are called one by one and can't be wrapped",
    ),
    (
        """
        from art_core import hookimpl
        art_api = 1
        @hookimpl
        def art_register_backends():
            raise OSError("no licence file")
        """,
        "OSError: no licence file",
    ),
    (
        """
        from art_core import hookimpl
        art_api = 1
        @hookimpl
        def art_register_backends(): ...
        """,
        "its art_register_backends must give a list, [BackendSpec(...)], not NoneType",
    ),
    (
        """
        from art_core import hookimpl
        art_api = 1
        @hookimpl
        def art_register_backends():
            return ["local"]
        """,
        "its art_register_backends must give BackendSpec objects, not str",
    ),
    (
        """
        from art_core import hookimpl
        art_api = 1
        @hookimpl
        async def art_resolve_base_model(name): ...
        """,
        "its art_resolve_base_model is async, and nobody would await it; write `def art_resolve_base_model`",
    ),
    (
        """
        from art_core import InferenceEngineSpec, hookimpl
        art_api = 1
        @hookimpl
        def art_register_inference_engines():
            return [InferenceEngineSpec(name="acme", factory="a:b", summary="", capabilities={"pause"})]
        """,
        "'acme' declares the capability 'pause', no member of InferenceCapability, which has STREAMING_TOKEN_IDS, ",
    ),
    (engine("acme", "acme.engine"), "the factory of 'acme' is 'acme.engine', not 'module:attribute'"),
    (
        """
        from art_core import TrainingEngineSpec, hookimpl
        art_api = 1
        @hookimpl
        def art_register_training_engines():
            return [TrainingEngineSpec(name="acme", factory="a:b", summary="")] * 2
        """,
        "it provides the training engine 'acme' twice",
    ),
]


@pytest.mark.parametrize(("source", "said"), BROKEN, ids=[said[:40] for _, said in BROKEN])
def test_a_broken_plugin_costs_only_itself_one_warning_and_its_own_error(
    plugin_site: Any, source: str, said: str
) -> None:
    plugin_site.install("art-broken", source, plugin="broken")
    plugin_site.install("art-fine", engine("fine"))
    registry, infos, told = load(plugin_site)
    assert infos["art-fine"].status is PluginStatus.ACTIVE
    info = infos["art-broken"]
    assert info.status is PluginStatus.BROKEN
    assert said in info.error
    assert len(told) == 1
    assert told[0].startswith("plugin 'broken' of art-broken is broken and left out: ")
    assert said in told[0]
    assert not registry.hooks.has_plugin("broken")
    for ask in (registry.backend, registry.inference_engine, registry.training_engine):
        with pytest.raises(PluginError) as caught:
            ask("broken")
        assert said in str(caught.value)
        assert "art-broken 1.2.0" in str(caught.value)


INCOMPATIBLE = [
    ({"requires": ["art-core>=0.2"]}, "art_api = 1", "it needs art-core >=0.2, installed is 0.1.0; upgrade the one or"),
    ({"requires": ["pluggy>=1", "art_core<0.1"]}, "art_api = 1", "it needs art-core <0.1"),
    ({}, "art_api = 2", "it speaks plugin API 2, art-core speaks 1 to 1; upgrade art-core"),
    ({}, "art_api = 0", "it speaks plugin API 0, art-core speaks 1 to 1; upgrade art-old"),
]


@pytest.mark.parametrize(("metadata", "source", "said"), INCOMPATIBLE)
def test_both_version_gates_close(plugin_site: Any, metadata: dict[str, Any], source: str, said: str) -> None:
    plugin_site.install("art-old", source, **metadata)
    registry, infos, told = load(plugin_site)
    assert infos["art-old"].status is PluginStatus.INCOMPATIBLE
    assert said in infos["art-old"].error
    assert len(told) == 1
    with pytest.raises(PluginError, match="is incompatible: "):
        registry.backend("old")


def test_the_range_is_checked_before_anything_is_imported(plugin_site: Any) -> None:
    plugin_site.install("art-old", "raise RuntimeError('imported')", requires=["art-core>=9"])
    _, infos, _ = load(plugin_site)
    assert infos["art-old"].status is PluginStatus.INCOMPATIBLE


def test_a_range_that_only_an_extra_asks_for_closes_nothing(plugin_site: Any) -> None:
    plugin_site.install("art-acme", engine("acme"), requires=["art-core>=0.1", "art-core<0.1 ; extra == 'old'"])
    _, infos, told = load(plugin_site)
    assert (infos["art-acme"].status, told) == (PluginStatus.ACTIVE, [])


@pytest.mark.parametrize(
    ("variable", "value", "left_out"),
    [
        ("ART_DISABLE_PLUGINS", "acme", {"acme"}),
        ("ART_DISABLE_PLUGINS", " acme , other,", {"acme", "other"}),
        ("ART_LOAD_PLUGINS", "other", {"acme"}),
        ("ART_LOAD_PLUGINS", "", set()),
    ],
)
def test_variables_leave_plugins_out_without_importing_or_warning(
    plugin_site: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, left_out: set[str]
) -> None:
    plugin_site.install("art-acme", engine("acme"))
    plugin_site.install("art-other", engine("other"))
    monkeypatch.setenv(variable, value)
    registry, infos, told = load(plugin_site)
    assert told == []
    assert {i.name for i in infos.values() if i.status is PluginStatus.DISABLED} == left_out
    for name in left_out:
        with pytest.raises(PluginError, match=f"is disabled: left out by {variable}"):
            registry.inference_engine(name)


@pytest.mark.parametrize("variable", ["ART_DISABLE_PLUGINS", "ART_LOAD_PLUGINS"])
def test_a_variable_that_names_no_plugin_is_not_ignored_in_silence(
    plugin_site: Any, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    plugin_site.install("art-acme", engine("acme"))
    monkeypatch.setenv(variable, "acne")
    _, _, told = load(plugin_site)
    assert f"{variable} names 'acne', which is no plugin here. Did you mean 'acme'?" in told


def test_one_plugin_name_from_two_distributions_names_both_and_uses_neither(plugin_site: Any) -> None:
    plugin_site.install("art-acme", engine("acme"))
    plugin_site.install("better-acme", engine("acme-better"), plugin="acme")
    registry, infos, told = load(plugin_site)
    assert {info.status for info in infos.values()} == {PluginStatus.DUPLICATE}
    assert set(infos) == {"art-acme", "better-acme"}
    for info in infos.values():
        assert info.error == "the plugin name 'acme' is taken by art-acme and better-acme; uninstall one of them"
    assert len(told) == 2
    with pytest.raises(PluginError, match="taken by art-acme and better-acme"):
        registry.inference_engine("acme")


def test_one_engine_name_from_several_plugins_names_all_and_uses_none(plugin_site: Any) -> None:
    two = """
        from art_core import InferenceEngineSpec, hookimpl
        art_api = 1
        @hookimpl
        def art_register_inference_engines():
            return [InferenceEngineSpec(name=n, factory="a:b", summary="") for n in ("extra", "fast")]
        @hookimpl
        def art_after_train(result): ...
    """
    plugin_site.install("art-one", two)
    plugin_site.install("art-two", engine("fast"))
    plugin_site.install("art-zed", engine("fast"))
    registry, infos, told = load(plugin_site)
    assert {d: i.status for d, i in infos.items()} == dict.fromkeys(
        ("art-one", "art-two", "art-zed"), PluginStatus.DUPLICATE
    )
    assert len(told) == 3
    who = r"art-one \(plugin 'one'\) and art-two \(plugin 'two'\) and art-zed \(plugin 'zed'\); uninstall all but one"
    for name in ("fast", "extra"):
        with pytest.raises(PluginError, match=who):
            registry.inference_engine(name)
    assert registry.hooks.hook.art_after_train.get_hookimpls() == []
    assert registry.provided("inference engine") == []


def test_the_same_engine_name_for_inference_and_training_is_no_duplicate(plugin_site: Any) -> None:
    source = """
        from art_core import InferenceEngineSpec, TrainingEngineSpec, hookimpl
        art_api = 1
        @hookimpl
        def art_register_inference_engines():
            return [InferenceEngineSpec(name="acme", factory="a:b", summary="")]
        @hookimpl
        def art_register_training_engines():
            return [TrainingEngineSpec(name="acme", factory="a:c", summary="")]
    """
    plugin_site.install("art-acme", source)
    registry, _, told = load(plugin_site)
    assert told == []
    assert isinstance(registry.training_engine("acme"), TrainingEngineSpec)


def test_what_is_not_installed_is_named_with_its_pip_line(plugin_site: Any) -> None:
    plugin_site.install("art-acme", engine("acme"))
    plugin_site.install("art-broken", "1/0", plugin="broken")
    registry, _, _ = load(plugin_site)
    with pytest.raises(PluginNotInstalled, match="To install one: pip install art-engine-vllm") as caught:
        registry.inference_engine("vllm")
    assert "Installed: acme." in str(caught.value)
    assert "Left out: broken; `art plugins check` says why." in str(caught.value)
    assert isinstance(caught.value, ImportError)
    with pytest.raises(PluginNotInstalled, match="Did you mean 'acme'"):
        registry.inference_engine("acmee")
    with pytest.raises(PluginNotInstalled, match=r"Installed: none\. To install one: pip install art-engine-unsloth"):
        registry.training_engine("mine")


def test_a_factory_that_cannot_be_imported_is_named(plugin_site: Any) -> None:
    plugin_site.install("art-acme", engine("acme", "acme_engine:Engine"), modules={"acme_engine": "1/0"})
    registry, _, told = load(plugin_site)
    assert told == []
    with pytest.raises(PluginError, match=r"'acme' is registered as acme_engine:Engine, .*: ZeroDivisionError"):
        instantiate(registry.inference_engine("acme"))


def by_hand(name: str) -> Any:
    @hookimpl
    def art_register_inference_engines() -> list[InferenceEngineSpec]:
        return [InferenceEngineSpec(name=name, factory="builtins:dict", summary="")]

    return SimpleNamespace(art_api=1, art_register_inference_engines=art_register_inference_engines)


def test_a_plugin_registered_by_hand_works_and_can_be_taken_back() -> None:
    registry = PluginRegistry()
    registry.register(by_hand("acme"), "mine")
    assert registry.inference_engine("acme").name == "acme"
    registry.unregister("mine")
    assert registry.infos == []
    with pytest.raises(PluginNotInstalled):
        registry.inference_engine("acme")
    registry.register(by_hand("acme"), "mine")
    with pytest.raises(PluginError, match=r"no plugin 'mien' is in use here\. Did you mean 'mine'"):
        registry.unregister("mien")


def test_a_plugin_registered_by_hand_never_displaces_another() -> None:
    registry = PluginRegistry()
    registry.register(by_hand("acme"), "mine")
    with pytest.raises(PluginError, match="there is a plugin 'mine' already"):
        registry.register(by_hand("other"), "mine")
    with pytest.raises(PluginError, match="the inference engine 'acme' of 'yours' is there already"):
        registry.register(by_hand("acme"), "yours")
    with pytest.raises(PluginError, match="is broken: it declares no art_api"):
        registry.register(SimpleNamespace(), "nothing")
    assert [info.name for info in registry.infos] == ["mine"]
    assert registry.inference_engine("acme").name == "acme"
