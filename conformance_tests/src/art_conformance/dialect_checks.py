"""What an inference engine's description and dialect must be, without starting anything.

A dialect builds requests and reads answers. It does no I/O, changes nothing that it is given, and drops nothing that a
user asked for.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from art_core import Capability, EngineCall, InferenceCapability, InferenceEngine, InferenceLaunch
from art_core.errors import EngineRefused, UnknownArgument

from .plans import check_devices, check_interpreter, check_plan_is_pure, check_secret, words_of
from .requirements import MUST, check
from .suite import Suite, undeclared

KEY = "sk-conformance-0123456789abcdef"
NONSENSE = "xq_no_such_argument"
ADAPTER, OTHER = "conformance/one@3", "conformance/one@4"
CHAT: dict[str, Any] = {
    "model": "agent",
    "messages": [{"role": "user", "content": "Say something."}],
    "temperature": 0.7,
    "top_p": 0.9,
    "max_tokens": 7,
    "n": 2,
    "seed": 11,
    "stop": ["END"],
    "metadata": {"nested": {"list": [1, 2]}},
}
COMPLETION: dict[str, Any] = {
    "model": "agent",
    "prompt": [5, 6, 7],
    "temperature": 0.7,
    "max_tokens": 7,
    "n": 2,
    "seed": 11,
}
BODIES: dict[Any, dict[str, Any]] = {"chat/completions": CHAT, "completions": COMPLETION}


class DialectChecks(Suite):
    """The checks of `InferenceEngineConformance` that start nothing."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> InferenceEngine:
        raise pytest.UsageError("give the fixture `engine` (scope='class'): an instance of the inference engine")

    @pytest.fixture(scope="class")
    @classmethod
    def declared(cls, engine: InferenceEngine) -> Collection[Capability]:
        return engine.capabilities

    @pytest.fixture
    def config(self, tmp_path: Path) -> InferenceLaunch:
        """A launch configuration of which no part could be in the plan by chance."""
        folder = tmp_path / "weights-7c1"
        folder.mkdir()
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 512}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return InferenceLaunch(
            base_model=folder,
            served_name="base-7c1",
            host="127.0.0.1",
            port=49157,
            api_key=KEY,
            python="/opt/engine-7c1/bin/python",
        )

    @check("INF-001", MUST, "The engine has a plain name and declares members of InferenceCapability, always the same.")
    def test_identity(self, engine: InferenceEngine) -> None:
        assert engine.name
        assert engine.name == engine.name.strip().lower()
        assert isinstance(engine.capabilities, frozenset)
        assert all(isinstance(c, InferenceCapability) for c in engine.capabilities)
        assert engine.capabilities == engine.capabilities
        assert isinstance(engine, InferenceEngine), "it lacks members of the InferenceEngine protocol"

    @check("INF-002", MUST, "The API key travels in the plan's secret_env only, and no repr shows it.")
    def test_plan_holds_no_secret(self, engine: InferenceEngine, config: InferenceLaunch) -> None:
        check_secret(engine.launch(config), KEY)

    @check(
        "INF-003", MUST, "The plan names the host, the port, the folder of weights and the base model's served name."
    )
    def test_plan_names_its_address(self, engine: InferenceEngine, config: InferenceLaunch) -> None:
        words = words_of(engine.launch(config))
        for wanted in (config.host, str(config.port), str(config.base_model), config.served_name):
            assert any(wanted in word for word in words), f"{wanted!r} is nowhere in the command or the environment"

    @check("INF-004", MUST, "An engine argument that does not exist is refused with UnknownArgument, which names it.")
    def test_unknown_argument(self, engine: InferenceEngine, config: InferenceLaunch) -> None:
        with pytest.raises(UnknownArgument) as refusal:
            engine.launch(replace(config, engine_args={NONSENSE: 1}))
        assert refusal.value.name == NONSENSE
        assert engine.name in str(refusal.value), f"the message does not say whose argument it is: {refusal.value}"

    @check("INF-005", MUST, "The refusal of a misspelt engine argument names the nearest one that exists.")
    def test_misspelt_argument(self, engine: InferenceEngine, config: InferenceLaunch) -> None:
        with pytest.raises(UnknownArgument) as refusal:
            engine.launch(replace(config, engine_args={NONSENSE: 1}))
        if not refusal.value.known:
            return  # it takes none, so none is near
        wanted = max(refusal.value.known, key=len)
        with pytest.raises(UnknownArgument) as misspelt:
            engine.launch(replace(config, engine_args={wanted[:-2] + wanted[-1]: 1}))
        assert "Did you mean" in str(misspelt.value)
        assert wanted in misspelt.value.known

    @check("INF-006", MUST, "The same configuration gives the same plan, and making it changes nothing outside.")
    def test_plan_is_pure(self, engine: InferenceEngine, config: InferenceLaunch) -> None:
        check_plan_is_pure(lambda: engine.launch(config))

    @check("INF-007", MUST, "The plan runs the interpreter it was given, or a script beside it.")
    def test_plan_uses_interpreter(self, engine: InferenceEngine, config: InferenceLaunch) -> None:
        check_interpreter(engine.launch(config), config.python)

    @check("INF-008", MUST, "The plan shows the server the devices it was given and no others.")
    def test_plan_assigns_devices(self, engine: InferenceEngine, config: InferenceLaunch) -> None:
        check_devices(lambda devices: engine.launch(replace(config, devices=devices)))

    @check("INF-009", MUST, "prepare_request does not change the body it is given.")
    def test_request_is_not_mutated(self, engine: InferenceEngine) -> None:
        for endpoint, body in BODIES.items():
            for adapter in (ADAPTER, None):
                given = copy.deepcopy(body)
                engine.prepare_request(endpoint, given, adapter)
                assert given == body, f"prepare_request changed the body of a {endpoint} request"

    @check(
        "INF-010", MUST, "prepare_request keeps what the user asked for: sampling settings, messages, prompt and stops."
    )
    def test_request_keeps_settings(self, engine: InferenceEngine) -> None:
        for endpoint, body in BODIES.items():
            prepared = engine.prepare_request(endpoint, copy.deepcopy(body), ADAPTER)
            for key in body.keys() - {"model", "metadata", "max_tokens"}:
                assert prepared.get(key) == body[key], f"{key} became {prepared.get(key)!r} in a {endpoint} request"
            assert 7 in (prepared.get("max_tokens"), prepared.get("max_completion_tokens")), "max_tokens was dropped"

    @check("INF-011", MUST, "prepare_request names the adapter, and None names none of them.")
    def test_request_names_adapter(self, engine: InferenceEngine) -> None:
        for endpoint, body in BODIES.items():
            with_one = json.dumps(engine.prepare_request(endpoint, copy.deepcopy(body), ADAPTER))
            with_other = json.dumps(engine.prepare_request(endpoint, copy.deepcopy(body), OTHER))
            assert ADAPTER in with_one
            assert OTHER in with_other
            assert OTHER not in with_one
            base = json.dumps(engine.prepare_request(endpoint, copy.deepcopy(body), None))
            assert ADAPTER not in base
            assert base != with_one

    @check("INF-012", MUST, "prepare_request is stateless: requests prepared in between change nothing.")
    def test_request_is_stateless(self, engine: InferenceEngine) -> None:
        first = engine.prepare_request("chat/completions", copy.deepcopy(CHAT), ADAPTER)
        engine.prepare_request("chat/completions", copy.deepcopy({**CHAT, "model": "other"}), OTHER)
        engine.load_adapter(OTHER, Path("/adapters/other"))
        assert engine.prepare_request("chat/completions", copy.deepcopy(CHAT), ADAPTER) == first

    @check(
        "INF-013", MUST, "Control calls are absolute paths with a body that names the adapter, and end in bounded time."
    )
    def test_control_calls(self, engine: InferenceEngine) -> None:
        load, unload = engine.load_adapter(ADAPTER, Path("/adapters/one")), engine.unload_adapter(ADAPTER)
        assert ADAPTER in json.dumps(load.json)
        assert "/adapters/one" in json.dumps(load.json)
        assert ADAPTER in json.dumps(unload.json)
        for call in (load, unload, engine.list_adapters()):
            assert isinstance(call, EngineCall)
            assert call.path.startswith("/")
            assert 0 < call.timeout_s <= 600

    @check(
        "INF-014", MUST, "An answer that means refusal raises EngineRefused with the engine's name and its own reason."
    )
    def test_refusals_are_read(self, engine: InferenceEngine) -> None:
        reason = "rank 64 is more than 16"
        call = engine.load_adapter(ADAPTER, Path("/adapters/one"))
        for status in (400, 404, 500, 503):
            body = json.dumps({"success": False, "error_message": reason, "error": {"message": reason}}).encode()
            with pytest.raises(EngineRefused) as refusal:
                engine.check_answer(call, status, body)
            assert reason in str(refusal.value)
            assert engine.name in str(refusal.value)

    @check("INF-015", MUST, "An answer without the engine's own token ids is refused, never tokenized again.")
    def test_answer_without_ids(self, engine: InferenceEngine) -> None:
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}}
        with pytest.raises(EngineRefused):
            engine.read_response("chat/completions", {"model": "m", "choices": [choice]})
        text_only = {"index": 0, "finish_reason": "stop", "text": "hello", "logprobs": None}
        with pytest.raises(EngineRefused):
            engine.read_response("completions", {"model": "m", "choices": [text_only]})

    @check(
        "INF-016", MUST, "Every method of an undeclared capability raises UnsupportedCapability, saying what instead."
    )
    def test_undeclared_is_refused(self, engine: InferenceEngine) -> None:
        chunk = {"choices": [{"index": 0, "delta": {"content": "x"}, "token_ids": [1]}]}
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        calls: list[tuple[InferenceCapability, str, Callable[[], Any]]] = [
            (InferenceCapability.PAUSE, "pause()", engine.pause),
            (InferenceCapability.PAUSE, "resume()", engine.resume),
            (InferenceCapability.SLEEP, "sleep()", engine.sleep),
            (InferenceCapability.SLEEP, "wake()", engine.wake),
            (
                InferenceCapability.STREAMING_TOKEN_IDS,
                "read_chunk(...)",
                lambda: engine.read_chunk("chat/completions", chunk),
            ),
            (
                InferenceCapability.TOOL_CALLS,
                "prepare_request(...) with tools",
                lambda: engine.prepare_request("chat/completions", {**CHAT, "tools": [tool]}, ADAPTER),
            ),
        ]
        for capability, written, call in calls:
            if capability in engine.capabilities:
                call()
                continue
            with undeclared(engine.name, capability, written):
                call()

    @check("INF-017", MUST, "The dialect does no I/O: no connection, no process, no file written, no variable changed.")
    def test_dialect_does_no_io(
        self, engine: InferenceEngine, config: InferenceLaunch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("the dialect opened a connection or started a process")

        before = dict(os.environ)
        files = sorted(config.base_model.parent.rglob("*"))
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(subprocess, "Popen", refuse)
        monkeypatch.setattr(os, "system", refuse)
        engine.launch(config)
        for endpoint, body in BODIES.items():
            engine.prepare_request(endpoint, copy.deepcopy(body), ADAPTER)
        for call in (engine.load_adapter(ADAPTER, Path("/a")), engine.unload_adapter(ADAPTER), engine.list_adapters()):
            with pytest.raises(EngineRefused):
                engine.check_answer(call, 500, b"no")
        assert dict(os.environ) == before
        assert sorted(config.base_model.parent.rglob("*")) == files
