"""For each check of a training engine's launch plan an engine that breaks it and nothing else, and a sound one.

What needs a running worker is `test_live_worker_mutants`'.
"""

from __future__ import annotations

import json

import pytest

from art_conformance.catalogue import requirements_of

pytest_plugins = ["pytester"]

SOUND = """
import itertools
from dataclasses import replace
import pytest
from art_conformance import TrainingEngineConformance
from art_core import LaunchPlan, TrainingCapability as C
from art_core.errors import UnknownArgument
from art_engine_kit import cuda_env

class Sound:
    name = "toy"
    capabilities = frozenset({C.EXACT_RESUME})

    def argv(self, c):
        return (c.python, "-m", "toy.worker", "--host", c.host, "--port", str(c.port), "--model", str(c.base_model))

    def launch(self, c):
        for name in c.init_args:
            raise UnknownArgument(name, where="init_args of toy", known=())
        return LaunchPlan(argv=self.argv(c), env=cuda_env(c.devices), secret_env={"TOY_TOKEN": c.token})

"""
CLASS = """
class TestMine(TrainingEngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        return Mine()
"""

# The check that must notice → what is broken.
MUTANTS = {
    "TRN-001": "    capabilities = Sound.capabilities | {'fast'}\n",
    "TRN-002": "    def argv(self, c):\n        return (*super().argv(c), '--token', c.token)\n",
    "TRN-003": "    def argv(self, c):\n        return super().argv(replace(c, port=8000))\n",
    "TRN-004": "    def launch(self, c):\n        return super().launch(replace(c, init_args={}))\n",
    "TRN-005": "    count = itertools.count()\n"
    "    def argv(self, c):\n        return (*super().argv(c), '--run', str(next(self.count)))\n",
    "TRN-006": "    def argv(self, c):\n        return ('/usr/bin/python3', *super().argv(c)[1:])\n",
    "TRN-007": "    def launch(self, c):\n        return replace(super().launch(c), env=cuda_env((0,)))\n",
}


def failing(pytester: pytest.Pytester, body: str) -> set[str]:
    """The ids that an engine does not meet, of those that start nothing."""
    pytester.makepyfile(SOUND + "class Mine(Sound):\n" + body + CLASS)
    report = pytester.path / "report.json"
    options = ["-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function", "-m", "not slow"]
    pytester.runpytest(*options, "--tb=no", f"--conformance-report={report}")
    [content] = json.loads(report.read_text(encoding="utf-8"))
    assert {entry["id"] for entry in content["checks"] if entry["outcome"] in ("met", "NOT MET")} == MUTANTS.keys()
    return {entry["id"] for entry in content["checks"] if entry["outcome"] == "NOT MET"}


def test_every_check_that_starts_nothing_has_a_mutant() -> None:
    still = {requirement.id for requirement in requirements_of("TrainingEngineConformance") if not requirement.live}
    assert still == MUTANTS.keys()


def test_the_sound_engine_meets_every_check(pytester: pytest.Pytester) -> None:
    assert failing(pytester, "    pass\n") == set()


@pytest.mark.slow
@pytest.mark.parametrize("id", MUTANTS)
def test_exactly_the_check_notices(pytester: pytest.Pytester, id: str) -> None:
    assert failing(pytester, MUTANTS[id]) == {id}
