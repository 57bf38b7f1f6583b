"""A model's own arguments for its chat template, put into every chat request that doesn't bring its own.

Servers that speak vLLM's or SGLang's surface take them as `chat_template_kwargs` in the request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from art_core import InferenceEngine
from art_core.engines import Endpoint

JSON = dict[str, Any]


class _WithTemplateArguments:
    def __init__(self, engine: InferenceEngine, arguments: Mapping[str, Any]) -> None:
        self._engine = engine
        self._arguments = dict(arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def prepare_request(self, endpoint: Endpoint, body: JSON, adapter: str | None) -> JSON:
        if endpoint == "chat/completions":
            body = {**body, "chat_template_kwargs": {**self._arguments, **(body.get("chat_template_kwargs") or {})}}
        return self._engine.prepare_request(endpoint, body, adapter)


def with_template_arguments(engine: InferenceEngine, arguments: Mapping[str, Any]) -> InferenceEngine:
    """The engine's dialect, whose chat requests carry `arguments` for the chat template."""
    return cast("InferenceEngine", _WithTemplateArguments(engine, arguments)) if arguments else engine
