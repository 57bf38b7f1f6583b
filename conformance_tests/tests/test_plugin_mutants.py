"""For each check of a plugin an installed one that breaks it and nothing else, and a sound one that meets them all."""

from __future__ import annotations

import json
import os

import pytest

from art_conformance.catalogue import requirements_of

pytest_plugins = ["pytester"]

ENGINE = """
from art_core import InferenceCapability, LaunchPlan, TrainingCapability

class Engine:
    name = "toy"
    capabilities = frozenset({TrainingCapability.EXACT_RESUME})

    def launch(self, config):
        return LaunchPlan(argv=(config.python,))
"""
PLUGIN = """
from art_core import TrainingCapability, TrainingEngineSpec, hookimpl

art_api = 1
CARD = dict(name="toy", factory="toy.engine:Engine", summary="A toy engine for tests.",
            capabilities=frozenset({TrainingCapability.EXACT_RESUME}))

@hookimpl
def art_register_training_engines():
    return [TrainingEngineSpec(**CARD)]
"""
METADATA = "Metadata-Version: 2.1\nName: toy\nVersion: 0.1\nRequires-Dist: art-core>=0.1,<0.2\n"
FILES = {
    "toy/__init__.py": "",
    "toy/py.typed": "",
    "toy/plugin.py": PLUGIN,
    "toy/engine.py": ENGINE,
    "toy-0.1.dist-info/METADATA": METADATA,
    "toy-0.1.dist-info/entry_points.txt": "[art]\ntoy = toy.plugin\n",
}

# The check that must notice → what is broken: a file's new text, or None where the file is missing.
MUTANTS: dict[str, dict[str, str | None]] = {
    "PLG-001": {"toy-0.1.dist-info/METADATA": METADATA.replace(">=0.1,<0.2", ">=0.0.1,<0.0.2")},
    "PLG-002": {"toy/plugin.py": PLUGIN.replace("art_api = 1", "art_api = True")},
    "PLG-003": {"toy/plugin.py": PLUGIN + "\n@hookimpl\ndef art_after_train(result, verbose=False):\n    pass\n"},
    # A library that a factory may import, and a plugin's module may not.
    "PLG-004": {"toy/plugin.py": PLUGIN + "\nimport pandas\n", "pandas.py": ""},
    "PLG-005": {"toy/engine.py": ENGINE + "\nimport matplotlib\n"},
    "PLG-006": {"toy/plugin.py": PLUGIN + "\nimport os\nos.environ['TOY_WAS_HERE'] = '1'\n"},
    "PLG-007": {"toy-0.1.dist-info/METADATA": METADATA.replace(">=0.1,<0.2", ">=0.1")},
    "PLG-008": {
        "toy/plugin.py": PLUGIN.replace(
            "[TrainingEngineSpec(**CARD)]", "[TrainingEngineSpec(**{**CARD, 'summary': f'A toy made at {id([])}.'})]"
        )
        + "\nimport itertools\ncounter = itertools.count()\n"
        "@hookimpl\ndef art_register_training_engines():\n"
        "    return [TrainingEngineSpec(**{**CARD, 'summary': f'Toy engine number {next(counter)}.'})]\n"
    },
    "PLG-009": {"toy/plugin.py": PLUGIN.replace("A toy engine for tests.", "toy")},
    "PLG-010": {
        "toy/plugin.py": PLUGIN.replace("frozenset({TrainingCapability.EXACT_RESUME})", "frozenset({'all'})"),
        "toy/engine.py": ENGINE.replace("frozenset({TrainingCapability.EXACT_RESUME})", "frozenset({'all'})"),
    },
    "PLG-011": {
        "toy/plugin.py": PLUGIN + "\nfrom art_core import BackendSpec\n@hookimpl\ndef art_register_backends():\n"
        "    return [BackendSpec(name='toys', factory='toy.engine:Engine.name', summary='A toy backend for tests.')]\n"
    },
    "PLG-012": {"toy/engine.py": ENGINE.replace("def launch(self, config)", "def start(self, config)")},
    "PLG-013": {"toy/engine.py": ENGINE.replace('name = "toy"', 'name = "tool"')},
    "PLG-014": {"toy/py.typed": None},
}
# The check whose mutant cannot but fail others too → which, since:
# the loader refuses a card that declares what is no member, so such a plugin is not active.
IMPLIED = {"PLG-010": {"PLG-001"}}


def failing(pytester: pytest.Pytester, changes: dict[str, str | None]) -> set[str]:
    """The ids that a plugin does not meet."""
    site = pytester.path / "site"
    for name, text in {**FILES, **changes}.items():
        file = site / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            file.write_text(text)
    pytester.syspathinsert(site)
    pytester.makepyfile(
        "import pytest\nfrom art_conformance import PluginConformance\n"
        "class TestToy(PluginConformance):\n    @pytest.fixture(scope='class')\n    @classmethod\n"
        "    def plugin_name(cls):\n        return 'toy'\n"
    )
    report = pytester.path / "report.json"
    options = ["-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function", "--tb=no"]
    pytester.runpytest(*options, f"--conformance-report={report}", "-W", "ignore::RuntimeWarning")
    [content] = json.loads(report.read_text())
    assert {entry["id"] for entry in content["checks"] if entry["outcome"] in ("met", "NOT MET")} == MUTANTS.keys()
    return {entry["id"] for entry in content["checks"] if entry["outcome"] == "NOT MET"}


def test_every_check_has_a_mutant() -> None:
    assert {requirement.id for requirement in requirements_of("PluginConformance")} == MUTANTS.keys()


def test_the_sound_plugin_meets_every_check(pytester: pytest.Pytester) -> None:
    assert failing(pytester, {}) == set()


@pytest.mark.slow
@pytest.mark.parametrize("id", MUTANTS)
def test_exactly_the_check_notices(pytester: pytest.Pytester, id: str) -> None:
    try:
        assert failing(pytester, MUTANTS[id]) == {id} | IMPLIED.get(id, set())
    finally:
        os.environ.pop("TOY_WAS_HERE", None)
