"""A parser of tool calls for vLLM's server: a call ends where its JSON ends, whatever tags its strings hold.

vLLM's own takes the first end tag. Runs in vLLM's environment; ART_HERMES_CALLS is the file that finds the calls, which
imports nothing of ART.
"""

import importlib.util
import os
import sys
from typing import Any

from vllm.entrypoints.generate.base.protocol import ExtractedToolCallInformation, FunctionCall, ToolCall
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("art_hermes_calls", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_calls = _load(os.environ["ART_HERMES_CALLS"])


@ToolParserManager.register_module("art_hermes")
class ArtHermesToolParser(Hermes2ProToolParser):  # type: ignore[misc,unused-ignore]
    """As vLLM's for Hermes, but for where a call ends; and text after a call is kept."""

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:  # noqa: ARG002
        """All of a finished answer."""
        found = _calls.parse_tool_calls(model_output)
        calls = [ToolCall(id=c["id"], type="function", function=FunctionCall(**c["function"])) for c in found.calls]
        return ExtractedToolCallInformation(
            tools_called=bool(calls), tool_calls=calls, content=found.text or (None if calls else "")
        )

    def _extract_tool_call_jsons(self, text: str) -> list[tuple[str, bool]]:
        found: list[tuple[str, bool]] = []
        start = text.find(_calls.START)
        while start >= 0:
            begin = start + len(_calls.START)
            end = _calls.json_end(text, begin)
            found.append((text[begin:end].strip(), end is not None))
            start = -1 if end is None else text.find(_calls.START, end)
        return found
