"""A dialect to start from, for engines whose server speaks the OpenAI API with vLLM's additions.

An engine subclasses it, gives `launch`, and overrides what its server does otherwise. Builds calls and reads answers;
does no I/O, as every engine.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from art_core.capabilities import InferenceCapability, require
from art_core.engines import JSON, Endpoint, EngineCall, InferenceLaunch, LaunchPlan
from art_core.errors import EngineRefused

from .environment import Flavour
from .plain_request import plain_request

_ASK_ELSEWHERE = "`art plugins` lists the engines that are installed, `art plugins show NAME` what each can do."


class OpenAIServerEngine(ABC):
    """See `art_core.engines.InferenceEngine`, all of which it is but for `name`, `capabilities` and `launch`.

    The server takes POST /v1/load_lora_adapter and /v1/unload_lora_adapter, lists adapters in /v1/models as models with
    a parent, serves an adapter under its name as a model, and answers `return_token_ids` with `token_ids` in each
    choice and `prompt_token_ids` there or beside them. `by_flavour` is for an engine whose abilities depend on the kind
    of machine; `instead` says, for a capability that is not declared, what to do. `names_fields` is true of a server
    that by itself names the field at fault and passes over what changes nothing; for any other the dialect does.
    """

    name: str
    capabilities: frozenset[InferenceCapability] = frozenset()
    by_flavour: ClassVar[Mapping[Flavour, frozenset[InferenceCapability]]] = {}
    instead: ClassVar[Mapping[InferenceCapability, str]] = {}
    names_fields: ClassVar[bool] = False

    load_path: ClassVar[str] = "/v1/load_lora_adapter"
    unload_path: ClassVar[str] = "/v1/unload_lora_adapter"
    unload_timeout_s: ClassVar[float] = 60.0
    pause_call: ClassVar[EngineCall] = EngineCall(
        method="POST", path="/pause?mode=keep", action="pause", timeout_s=120.0
    )
    resume_call: ClassVar[EngineCall] = EngineCall(method="POST", path="/resume", action="resume", timeout_s=120.0)
    sleep_call: ClassVar[EngineCall] = EngineCall(
        method="POST", path="/sleep?level=1&mode=keep", action="sleep", timeout_s=300.0
    )
    wake_call: ClassVar[EngineCall] = EngineCall(method="POST", path="/wake_up", action="wake", timeout_s=300.0)

    def __init__(self, flavour: Flavour | None = None) -> None:
        """`flavour` None declares what holds on every kind of machine, and so does one that `by_flavour` leaves out."""
        if flavour is not None:
            self.capabilities = self.by_flavour.get(flavour, self.capabilities)

    @abstractmethod
    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        """The command that serves `config`. Raises UnknownArgument for an engine argument that does not exist."""

    def load_adapter(self, adapter: str, folder: Path) -> EngineCall:
        """Done once the answer is there. Shapes and values were checked before: a server may take them unseen."""
        body = {"lora_name": adapter, "lora_path": str(folder)}
        return EngineCall(method="POST", path=self.load_path, json=body, action=f"load adapter {adapter}")

    def unload_adapter(self, adapter: str) -> EngineCall:
        """Requests under way end on the adapter."""
        return EngineCall(
            method="POST",
            path=self.unload_path,
            json={"lora_name": adapter},
            action=f"unload adapter {adapter}",
            timeout_s=self.unload_timeout_s,
        )

    def list_adapters(self) -> EngineCall:
        """The base model is in the answer too, and has no parent."""
        return EngineCall(method="GET", path="/v1/models", action="list adapters", timeout_s=30.0)

    def read_adapters(self, body: bytes) -> frozenset[str]:
        """The models that have a parent."""
        return frozenset(entry["id"] for entry in json.loads(body)["data"] if entry.get("parent"))

    def pause(self) -> EngineCall:
        """Requests under way freeze where they are, new ones wait."""
        self._require(InferenceCapability.PAUSE)
        return self.pause_call

    def resume(self) -> EngineCall:
        """Everything goes on where it was."""
        self._require(InferenceCapability.PAUSE)
        return self.resume_call

    def sleep(self) -> EngineCall:
        """Gives device memory back and pauses as well; adapters and requests under way are kept."""
        self._require(InferenceCapability.SLEEP)
        return self.sleep_call

    def wake(self) -> EngineCall:
        """Takes the memory again and goes on."""
        self._require(InferenceCapability.SLEEP)
        return self.wake_call

    def check_answer(self, call: EngineCall, status: int, body: bytes) -> None:
        """Raises EngineRefused with the server's own sentence; `success: false` is a refusal whatever the status."""
        answer = _json(body)
        refused = isinstance(answer, dict) and answer.get("success") is False
        if refused or not 200 <= status < 300:
            raise EngineRefused(self.name, call.action, f"HTTP {status}: {_reason(answer, body)}")

    def prepare_request(self, endpoint: Endpoint, body: JSON, adapter: str | None) -> JSON:
        """An adapter is named as the model; without one, the model in `body` stays: the base model's served name."""
        if body.get("tools"):
            self._require(InferenceCapability.TOOL_CALLS)
        plain = body if self.names_fields else plain_request(endpoint, body)
        request = {**plain, "return_token_ids": True}
        if adapter is not None:
            request["model"] = adapter
        if endpoint == "chat/completions":
            request["logprobs"] = True
        elif request.get("logprobs") is None:
            request["logprobs"] = 0  # of the sampled tokens alone
        return request

    def read_response(self, endpoint: Endpoint, body: JSON) -> JSON:  # noqa: ARG002  (for engines that need it)
        """The prompt's ids move into each choice where they stand beside the choices.

        What lacks ids is refused: tokens that the engine didn't sample must not be trained on.
        """
        prompt, rest = body.get("prompt_token_ids"), _without_prompt(body)
        choices = []
        for choice in body["choices"]:
            whole = dict(choice)
            if whole.get("prompt_token_ids") is None:
                whole["prompt_token_ids"] = prompt
            missing = [key for key in ("token_ids", "prompt_token_ids", "logprobs") if whole.get(key) is None]
            if missing:
                raise EngineRefused(self.name, "answer", f"choice {choice.get('index')} has no {', '.join(missing)}")
            choices.append(whole)
        return {**rest, "choices": choices}

    def read_chunk(self, endpoint: Endpoint, chunk: JSON) -> JSON:  # noqa: ARG002
        """Every choice gets `token_ids`, empty where a chunk has none; a choice's first has the prompt's ids."""
        self._require(InferenceCapability.STREAMING_TOKEN_IDS)
        prompt, rest = chunk.get("prompt_token_ids"), _without_prompt(chunk)
        beside = {} if prompt is None else {"prompt_token_ids": prompt}
        choices = [
            {**beside, **choice, "token_ids": choice.get("token_ids") or []} for choice in chunk.get("choices", [])
        ]
        return {**rest, "choices": choices}

    def _require(self, capability: InferenceCapability) -> None:
        instead = self.instead.get(capability, _ASK_ELSEWHERE)
        require(capability, self.capabilities, plugin=self.name, instead=instead)


def _without_prompt(body: JSON) -> JSON:
    return {key: value for key, value in body.items() if key != "prompt_token_ids"}


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _reason(answer: Any, body: bytes) -> str:
    """The sentence of an error, in any of the places where servers of this kind put it."""
    if isinstance(answer, dict):
        error = answer.get("error")
        nested = error.get("message") if isinstance(error, dict) else error
        found = answer.get("error_message") or answer.get("message") or nested
        if found:
            return str(found)
    return body[:2000].decode(errors="replace")
