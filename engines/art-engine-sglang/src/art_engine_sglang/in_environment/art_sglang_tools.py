"""A parser of tool calls for SGLang's server: a call ends where its JSON ends, whatever tags its strings hold.

SGLang's own takes the first end tag, and drops the text after it. Runs in SGLang's environment; ART_HERMES_CALLS is the
file that finds the calls, which imports nothing of ART.
"""

import importlib.util
import os
import sys
from typing import Any

from sglang.srt.function_call.core_types import StreamingParseResult, ToolCallItem
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.function_call.hermes_detector import HermesDetector


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("art_hermes_calls", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_calls = _load(os.environ["ART_HERMES_CALLS"])


class ArtHermesDetector(HermesDetector):  # type: ignore[misc,unused-ignore]
    """As SGLang's for Hermes, but for where a call ends; and a call is streamed whole."""

    def __init__(self) -> None:
        super().__init__()
        self._stream = _calls.ToolCallStream()

    def get_structural_tag_name(self) -> str:
        """What xgrammar calls this form of calls. SGLang's own grammar for it heeds neither which function was named
        nor whether there may be several calls.
        """
        return "qwen_3"

    def detect_and_parse(self, text: str, tools: Any) -> StreamingParseResult:  # noqa: ARG002
        """All of a finished answer."""
        found = _calls.parse_tool_calls(text)
        items = [_item(index, call) for index, call in enumerate(found.calls)]
        return StreamingParseResult(normal_text=found.text, calls=items)

    def parse_streaming_increment(self, new_text: str, tools: Any) -> StreamingParseResult:  # noqa: ARG002
        """What one more piece makes certain."""
        return self._told(self._stream.push(new_text))

    def finish(self, tools: Any) -> StreamingParseResult:  # noqa: ARG002
        """What was held back, at the end."""
        return self._told(self._stream.flush())

    def _told(self, parsed: Any) -> StreamingParseResult:
        for call in parsed.calls:
            # The server looks here for arguments that it still has to send: there are none.
            self.prev_tool_call_arr.append(dict(call["function"]))
            self.streamed_args_for_tool.append(call["function"]["arguments"])
        items = [_item(call["index"], call) for call in parsed.calls]
        return StreamingParseResult(normal_text=parsed.text, calls=items)


def _item(index: int, call: dict[str, Any]) -> ToolCallItem:
    return ToolCallItem(tool_index=index, name=call["function"]["name"], parameters=call["function"]["arguments"])


def install() -> None:
    """From now on the parser "hermes" is this one."""
    FunctionCallParser.ToolCallParserEnum["hermes"] = ArtHermesDetector
