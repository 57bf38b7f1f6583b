"""Fields of OpenAI's two completion requests that mean the same whatever engine answers: those that change nothing,
and those that nobody here can obey.

Knows names and values. What an engine's server does with every other field is the engine's.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, Final

from art_core.errors import InvalidRequest

# Bookkeeping, and hints to services that a server of one model is not.
HARMLESS: Final = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
_TOOLS: Final = "OpenAI's older form of tools; send tools and tool_choice"
# The values at which a field asks for nothing, and what to do in its place.
REFUSED: Final[Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "audio": ((), "an answer is text here; leave it out"),
    "best_of": ((1,), "ask for n answers, and choose among them"),
    "echo": ((False,), "tokens of the prompt would be taken for sampled ones; each choice carries prompt_token_ids"),
    "function_call": (("none",), _TOOLS),
    "functions": (([],), _TOOLS),
    "modalities": ((["text"],), "an answer is text here; leave it out"),
    "moderation": ((), "nothing is moderated here; leave it out"),
    "suffix": (("",), "nothing is filled in between two texts here"),
    "web_search_options": ((), "nothing is searched here; give the model a tool that does"),
}


def without_harmless(body: Mapping[str, Any]) -> dict[str, Any]:
    """The request without the fields that change nothing. Raises InvalidRequest for one that nobody can obey."""
    kept = {}
    for name, value in body.items():
        if name in HARMLESS:
            continue
        if name in REFUSED and value is not None:
            nothing, instead = REFUSED[name]
            if value not in nothing:
                raise InvalidRequest(f"{name} is not supported: {instead}.", param=name)
            continue
        kept[name] = value
    return kept


def unknown_field(name: str, known: Collection[str]) -> InvalidRequest:
    """For a field that nothing reads, with the nearest one that something does."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InvalidRequest(f"Unknown field {name!r}.{hint}", param=name)
