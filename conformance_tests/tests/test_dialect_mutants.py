"""For each check of a dialect an engine that breaks it and nothing else, and one sound engine that meets them all."""

from __future__ import annotations

import json

import pytest

from art_conformance.catalogue import requirements_of

pytest_plugins = ["pytester"]

SOUND = """
import json, os, socket, subprocess
import pytest
from pathlib import Path
from art_conformance import InferenceEngineConformance
from art_core import EngineCall, InferenceCapability as C, LaunchPlan
from art_core.errors import EngineRefused, UnknownArgument, UnsupportedCapability
from art_core.names import adapter_name
from art_engine_kit import cuda_env

class Sound:
    name = "toy"
    capabilities = frozenset({C.TOOL_CALLS})

    def argv(self, c):
        words = [c.python, "-m", "toy.server", "--model", str(c.base_model), "--name", c.served_name]
        return (*words, "--host", c.host, "--port", str(c.port))

    def launch(self, c):
        for name in c.engine_args:
            if name not in ("max_seqs", "threads"):
                raise UnknownArgument(name, where="engine_args of toy", known=("max_seqs", "threads"))
        return LaunchPlan(argv=self.argv(c), env=cuda_env(c.devices), secret_env={"TOY_KEY": c.api_key})

    def load_adapter(self, adapter, folder):
        return EngineCall(method="POST", path="/load", json={"name": adapter, "path": str(folder)}, action="load")

    def unload_adapter(self, adapter):
        return EngineCall(method="POST", path="/unload", json={"name": adapter}, action="unload")

    def list_adapters(self):
        return EngineCall(method="GET", path="/v1/models")

    def read_adapters(self, body):
        return frozenset(json.loads(body))

    def missing(self, capability):
        raise UnsupportedCapability(self.name, capability.value, "Use another engine: pip install art-engine-vllm.")

    def pause(self): self.missing(C.PAUSE)
    def resume(self): self.missing(C.PAUSE)
    def sleep(self): self.missing(C.SLEEP)
    def wake(self): self.missing(C.SLEEP)

    def check_answer(self, call, status, body):
        if status >= 300:
            raise EngineRefused(self.name, call.action, body.decode())

    def prepare_request(self, endpoint, body, adapter):
        return {**body, "model": adapter or body["model"], "logprobs": True, "return_token_ids": True}

    def read_response(self, endpoint, body):
        for choice in body["choices"]:
            if choice.get("token_ids") is None:
                raise EngineRefused(self.name, "answer", "no token ids")
        return body

    def read_chunk(self, endpoint, chunk):
        self.missing(C.STREAMING_TOKEN_IDS)

"""
CLASS = """
class TestMine(InferenceEngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        return Mine()
"""

# The check that must notice → what is broken.
MUTANTS = {
    "INF-001": "    capabilities = Sound.capabilities | {'fast'}\n",
    "INF-002": "    def argv(self, c):\n        return (*super().argv(c), '--key', c.api_key)\n",
    "INF-003": "    def argv(self, c):\n        return (*super().argv(c)[:-1], '8000')\n",
    "INF-004": "    def launch(self, c):\n        try:\n            return super().launch(c)\n"
    "        except UnknownArgument as error:\n            error.name = 'engine_args'\n            raise\n",
    "INF-005": "    def launch(self, c):\n        for name in c.engine_args:\n"
    "            if name not in ('max_seqs', 'threads'):\n"
    "                error = UnknownArgument(name, where='toy', known=('max_seqs', 'threads'))\n"
    "                error.args = ('toy: bad argument',)\n                raise error\n"
    "        return super().launch(c)\n",
    "INF-006": "    def argv(self, c):\n        import uuid\n        return (*super().argv(c), uuid.uuid4().hex)\n",
    "INF-007": "    def argv(self, c):\n        return ('/usr/bin/toy', *super().argv(c)[1:])\n",
    "INF-008": "    def launch(self, c):\n        from dataclasses import replace\n"
    "        return replace(super().launch(c), env={})\n",
    "INF-009": "    def prepare_request(self, endpoint, body, adapter):\n        body['logprobs'] = True\n"
    "        return super().prepare_request(endpoint, body, adapter)\n",
    "INF-010": "    def prepare_request(self, endpoint, body, adapter):\n"
    "        return {k: v for k, v in super().prepare_request(endpoint, body, adapter).items() if k != 'seed'}\n",
    "INF-011": "    def prepare_request(self, endpoint, body, adapter):\n"
    "        return {**super().prepare_request(endpoint, body, adapter), 'model': 'agent'}\n",
    "INF-012": "    def prepare_request(self, endpoint, body, adapter):\n"
    "        self.count = getattr(self, 'count', 0) + 1\n"
    "        return {**super().prepare_request(endpoint, body, adapter), 'user': str(self.count)}\n",
    "INF-013": "    def load_adapter(self, adapter, folder):\n"
    "        return EngineCall(method='POST', path='load', json={})\n",
    "INF-014": "    def check_answer(self, call, status, body):\n"
    "        super().check_answer(call, status if status >= 500 else 200, body)\n",
    "INF-015": "    def read_response(self, endpoint, body):\n"
    "        return {**body, 'choices': [{**c, 'token_ids': [1, 2]} for c in body['choices']]}\n",
    "INF-016": "    def pause(self):\n        return EngineCall(method='POST', path='/pause')\n",
    "INF-017": "    def launch(self, c):\n        subprocess.Popen(['true']).wait()\n"
    "        return super().launch(c)\n",
}


def failing(pytester: pytest.Pytester, body: str, *arguments: str) -> set[str]:
    """The ids that an engine does not meet, of those that start nothing."""
    pytester.makepyfile(SOUND + "class Mine(Sound):\n" + body + CLASS)
    report = pytester.path / "report.json"
    options = ["-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function", "-m", "not slow"]
    pytester.runpytest(*options, "--tb=no", f"--conformance-report={report}", *arguments)
    [content] = json.loads(report.read_text())
    assert {entry["id"] for entry in content["checks"] if entry["outcome"] in ("met", "NOT MET")} == MUTANTS.keys()
    return {entry["id"] for entry in content["checks"] if entry["outcome"] == "NOT MET"}


def test_every_check_that_starts_nothing_has_a_mutant() -> None:
    still = {requirement.id for requirement in requirements_of("InferenceEngineConformance") if not requirement.live}
    assert still == MUTANTS.keys()


@pytest.mark.slow
def test_the_sound_engine_meets_every_check(pytester: pytest.Pytester) -> None:
    assert failing(pytester, "    pass\n") == set()


@pytest.mark.slow
@pytest.mark.parametrize("id", MUTANTS)
def test_exactly_the_check_notices(pytester: pytest.Pytester, id: str) -> None:
    assert failing(pytester, MUTANTS[id]) == {id}


@pytest.mark.slow
def test_outcomes_come_back_from_other_processes(pytester: pytest.Pytester) -> None:
    assert failing(pytester, MUTANTS["INF-014"], "-n", "1", "--dist", "loadgroup") == {"INF-014"}


def test_an_engine_that_has_nothing_meets_next_to_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SOUND + "class Mine:\n    name = 'nothing'\n    capabilities = frozenset()\n" + CLASS)
    report = pytester.path / "report.json"
    options = ["-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function", "-m", "not slow"]
    result = pytester.runpytest(*options, "--tb=no", f"--conformance-report={report}")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    [content] = json.loads(report.read_text())
    assert content["conformant"] is False
    assert content["counts"]["met"] == 0
