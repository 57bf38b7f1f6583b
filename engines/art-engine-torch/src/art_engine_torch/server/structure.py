"""Which tokens an answer may go on with so that it becomes what was asked for: JSON of a schema, or calls of tools.

Knows grammars and llguidance. What is asked for in a request is read elsewhere; how tokens are drawn, too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from art_engine_kit.hermes_calls import END, START

# White space that is allowed between JSON's parts: enough for any layout, too little to go on for ever.
_SPACE = "[ \\t\\n\\r]{0,40}"
JSON = dict[str, Any]


class BadGrammar(ValueError):
    """The schema is malformed, or uses what no grammar can hold; the message is llguidance's own."""


class Guide:
    """Where one sequence is in its grammar. Not to be shared."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, size: int) -> NDArray[np.bool_]:
        """For each of the `size` tokens whether it may come next; at the end those that end an answer."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little")[:size].view(np.bool_)

    def accept(self, token: int) -> None:
        """The token that was drawn. Raises RuntimeError for one that was not allowed."""
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            raise RuntimeError(f"the structure could not be followed: {_first_line(self._matcher.get_error())}")

    @property
    def ended(self) -> bool:
        """Whether nothing but an end may follow."""
        return bool(self._matcher.is_stopped())


class Grammar:
    """A grammar that was found to be sound; `guide()` starts a sequence in it."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def guide(self) -> Guide:
        """At its start."""
        return Guide(self._matcher.deep_copy())


def json_rule(schema: Mapping[str, Any], *, strict: bool) -> str:
    """JSON that fits a schema. Unless `strict`, keywords that no grammar can hold are passed over."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _SPACE, "lenient": not strict}})


def calls_rule(functions: Sequence[tuple[str, Mapping[str, Any], bool]], *, several: bool) -> str:
    """One Hermes-style call of one of the functions (name, schema of the arguments, strict), or `several`."""
    calls = " | ".join(_call_rule(*function) for function in functions)
    return f'({calls}) ("\\n" ({calls}))*' if several else f"({calls})"


def _call_rule(name: str, arguments: Mapping[str, Any], strict: bool) -> str:
    begin, end = f'{START}\n{{"name": {json.dumps(name)}, "arguments": ', f"}}\n{END}"
    return f"({json.dumps(begin)} {json_rule({'type': 'object', **arguments}, strict=strict)} {json.dumps(end)})"


def compile_grammar(guides: LLTokenizer, rules: Sequence[str]) -> Grammar:
    """The grammar of what follows one of the rules. Raises BadGrammar. Takes milliseconds, for a large one a second."""
    return _compiled(guides, "start: " + " | ".join(f"({rule})" for rule in rules))


@functools.lru_cache(maxsize=64)
def _compiled(guides: LLTokenizer, lark: str) -> Grammar:
    matcher = LLMatcher(guides, LLMatcher.grammar_from_lark(lark), log_level=0)
    matcher.compute_bitmask()  # what is too complex shows at the first step
    if matcher.is_error():
        raise BadGrammar(_first_line(matcher.get_error()))
    return Grammar(matcher)


def _first_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return next(
        (line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0] if lines else ""
    )
