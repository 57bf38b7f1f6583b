"""Which fields of a request have tokens drawn from other probabilities than the policy's own, which are those that an
answer's logprobs tell.

Knows OpenAI's fields and those that the engines' servers have besides; asks no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# With the values at which they change nothing.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    # Structures, and tokens that are kept from being drawn, by the names that vLLM and SGLang have for them.
    "structured_outputs": ({},),
    "regex": ("",),
    "ebnf": ("",),
    "json_schema": ("",),
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
}


def altered_by(request: Mapping[str, Any]) -> list[str]:
    """The names of the request's fields that alter what is drawn, sorted."""
    return sorted(
        name for name, neutral in _NEUTRAL.items() if (value := request.get(name)) is not None and value not in neutral
    )
