"""For each check of a running inference server an engine that breaks it and nothing else, and a sound one that meets
them all.

The mutants are the torch engine with one fault, in its dialect here or in its server (`misbehaving_server`). Each has a
server of its own and is held against every check of the suite, those of its dialect too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from art_conformance import InferenceEngineConformance
from art_conformance.live_engine_suite import IDENTITY, ONE
from art_conformance.requirements import checks_of
from art_core import EngineCall, InferenceLaunch, LaunchPlan
from art_engine_torch.inference_engine import TorchInferenceEngine

CLASS = """
import pytest
from art_conformance import InferenceEngineConformance

# Whatever is imported and made for it once serves every mutant.
@pytest.fixture(scope="session")
def own_tiny_model(model_of_all_mutants):
    return model_of_all_mutants

class TestMutant(InferenceEngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, mutant):
        return mutant
"""
JSON = dict[str, Any]


class FaultyServer(TorchInferenceEngine):
    """The torch engine with a server that has a fault of `misbehaving_server`."""

    def __init__(self, fault: str, **plan: Any) -> None:
        super().__init__()
        self._fault, self._plan = fault, plan

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        sound = super().launch(config)
        python, option, module, *arguments = sound.argv
        assert (option, module) == ("-m", "art_engine_torch.server")
        script = str(Path(__file__).with_name("misbehaving_server.py"))
        return replace(sound, argv=(python, script, self._fault, *arguments), **self._plan)


class FaultyAnswers(TorchInferenceEngine):
    """An engine that changes every choice that it reads from a whole answer."""

    def __init__(self, change: Callable[[JSON], None]) -> None:
        super().__init__()
        self._change = change

    def read_response(self, endpoint: Any, body: JSON) -> JSON:
        answer = copy.deepcopy(super().read_response(endpoint, body))
        for choice in answer["choices"]:
            self._change(choice)
        return answer


class FaultyRequests(TorchInferenceEngine):
    """An engine that changes requests once they are prepared."""

    def __init__(self, change: Callable[[JSON], None]) -> None:
        super().__init__()
        self._change = change

    def prepare_request(self, endpoint: Any, body: JSON, adapter: str | None) -> JSON:
        request = copy.deepcopy(super().prepare_request(endpoint, body, adapter))
        self._change(request)
        return request


class ListsWhatIsGone(TorchInferenceEngine):
    """It goes on listing adapters that it has listed once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: frozenset[str] = frozenset()

    def read_adapters(self, body: bytes) -> frozenset[str]:
        self._seen |= super().read_adapters(body)
        return self._seen


class PauseDoesNothing(TorchInferenceEngine):
    pause_call = resume_call = EngineCall(method="GET", path="/health", action="pause")


def _shift_later_choices(choice: JSON) -> None:
    for entry in (choice["logprobs"] or {}).get("content") or () if choice["index"] >= 2 else ():
        entry["logprob"] -= 1.0


def _lose_text(choice: JSON) -> None:
    text = choice.get("message", {}).get("content")
    if text:
        choice["message"]["content"] = text[len(text) // 2 :]


def _keep_last_message(request: JSON) -> None:
    if "messages" in request:
        request["messages"] = request["messages"][-1:]


def _plain_letters(request: JSON) -> None:
    for message in request.get("messages", ()):
        message["content"] = message["content"].encode("ascii", "replace").decode("ascii")


def _anonymous_tools(request: JSON) -> None:
    for tool in request.get("tools", ()):
        tool["function"]["name"] = "tool"


def _one_for_identity(request: JSON) -> None:
    if request["model"] == IDENTITY:
        request["model"] = ONE


# The check that must notice → what is broken.
MUTANTS: dict[str, Callable[[], TorchInferenceEngine]] = {
    "INF-101": lambda: FaultyServer("unwell_with_adapters"),
    "INF-102": lambda: FaultyServer("asks_for_no_key"),
    "INF-103": ListsWhatIsGone,
    "INF-104": lambda: FaultyServer("mixes_adapters_up"),
    "INF-105": lambda: FaultyAnswers(_shift_later_choices),
    "INF-106": lambda: FaultyServer("scales_logprobs"),
    "INF-107": lambda: FaultyRequests(_keep_last_message),
    "INF-108": lambda: FaultyAnswers(_lose_text),
    "INF-109": lambda: FaultyAnswers(lambda choice: choice.update(index=0)),
    "INF-110": lambda: FaultyServer("ignores_seeds"),
    "INF-111": lambda: FaultyServer("ignores_stops"),
    "INF-112": lambda: FaultyServer("says_one_token_more"),
    "INF-113": lambda: FaultyServer("samples_at_temperature_zero"),
    "INF-114": lambda: FaultyServer("begins_prompts_by_itself"),
    "INF-115": lambda: FaultyRequests(_one_for_identity),
    "INF-116": lambda: FaultyServer("streams_one_choice_without_ids"),
    "INF-117": lambda: FaultyRequests(_anonymous_tools),
    "INF-118": lambda: FaultyAnswers(lambda choice: choice.get("message", {}).pop("tool_calls", None)),
    "INF-120": lambda: FaultyServer("base_answers_for_never_loaded"),
    "INF-121": lambda: FaultyServer("base_answers_for_unloaded"),
    "INF-122": lambda: FaultyServer("takes_missing_adapters"),
    "INF-123": lambda: FaultyServer("replaces_weights"),
    "INF-124": lambda: FaultyServer("unloading_ends_streams"),
    "INF-125": lambda: FaultyServer("loses_places_under_load"),
    "INF-126": lambda: FaultyServer("cuts_prompts"),
    "INF-127": lambda: FaultyServer("mends_requests"),
    "INF-128": lambda: FaultyServer("leaving_ends_everything"),
    "INF-130": PauseDoesNothing,
    "INF-131": lambda: FaultyServer("forgets_adapters_in_sleep"),
    "INF-132": lambda: FaultyServer("base_goes_with_an_adapter"),
    "INF-133": lambda: FaultyServer("says_when_in_words"),
    "INF-134": lambda: FaultyServer("forgets_what_is_loaded_again"),
    "INF-135": lambda: FaultyServer("cuts_long_names"),
    "INF-136": lambda: FaultyServer("mixes_loads_up"),
    "INF-137": lambda: FaultyRequests(_plain_letters),
    "INF-138": lambda: FaultyServer("gives_each_chunk_an_id"),
    "INF-140": lambda: FaultyServer("logs_its_key"),
    "INF-141": lambda: FaultyServer("ignores_sigterm", stop_timeout_s=3.0),
}


class Given:
    """What the file of the mutant's checks is given by this one, as a plugin of that run."""

    def __init__(self, engine: TorchInferenceEngine, model: Path) -> None:
        self._engine, self._model = engine, model

    @pytest.fixture(scope="session")
    def mutant(self) -> TorchInferenceEngine:
        return self._engine

    @pytest.fixture(scope="session")
    def model_of_all_mutants(self) -> Path:
        return self._model


def outcomes(engine: TorchInferenceEngine, model: Path, folder: Path, *only: str) -> dict[str, JSON]:
    """What the report says of each check, by its id.

    pytester would have each of these runs import torch anew, which can't be imported twice.
    """
    checks, report = folder / "test_mutant.py", folder / "report.json"
    checks.write_text(CLASS, encoding="utf-8")
    options = ["--import-mode=importlib", "--tb=short", "-o", "asyncio_default_fixture_loop_scope=function"]
    without = [word for plugin in ("cacheprovider", "faulthandler") for word in ("-p", f"no:{plugin}")]
    pytest.main([str(checks), *options, *without, f"--conformance-report={report}", *only], [Given(engine, model)])
    [content] = json.loads(report.read_text(encoding="utf-8"))
    return {entry["id"]: entry for entry in content["checks"]}


def failing(engine: TorchInferenceEngine, model: Path, folder: Path) -> set[str]:
    """The ids that an engine does not meet; all others are met."""
    found = {id: entry["outcome"] for id, entry in outcomes(engine, model, folder).items()}
    assert set(found.values()) <= {"met", "NOT MET"}
    return {id for id, outcome in found.items() if outcome == "NOT MET"}


def test_every_live_check_has_a_mutant() -> None:
    live = {requirement.id for _, _, requirement in checks_of(InferenceEngineConformance) if requirement.live}
    assert live == MUTANTS.keys()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_the_sound_engine_meets_every_check(own_tiny_model: Path, tmp_path: Path) -> None:
    assert failing(TorchInferenceEngine(), own_tiny_model, tmp_path) == set()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("id", MUTANTS)
def test_exactly_the_check_notices(own_tiny_model: Path, tmp_path: Path, id: str) -> None:
    assert failing(MUTANTS[id](), own_tiny_model, tmp_path) == {id}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_check_of_what_is_under_way_is_not_met_when_nothing_is(own_tiny_model: Path, tmp_path: Path) -> None:
    ids = ("INF-124", "INF-128", "INF-130")
    names = [name for name, _, requirement in checks_of(InferenceEngineConformance) if requirement.id in ids]
    found = outcomes(FaultyServer("says_one_token"), own_tiny_model, tmp_path, "-k", " or ".join(names))
    assert [id for id in ids if "it shows nothing" in found[id]["detail"]] == [*ids]
