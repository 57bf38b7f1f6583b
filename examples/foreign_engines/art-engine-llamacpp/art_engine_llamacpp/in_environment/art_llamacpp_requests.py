"""OpenAI's two completion requests as llama.cpp's own, and its results as OpenAI's answers.

Does no I/O and knows no server. Runs in the engine's own environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

JSON = dict[str, Any]
Ids = list[int]


class JsonSchema(BaseModel):
    """What an answer must be."""

    schema_: JSON = Field(alias="schema")


class ResponseFormat(BaseModel):
    """Text, any JSON object, or one of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Asked(BaseModel):
    """Every field that is heeded, in OpenAI's names; any other is refused by its name."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[JSON] = Field(default=[], min_length=1)
    chat_template_kwargs: JSON = {}
    prompt: str | Ids = Field(default="", min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] = []
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0)
    logit_bias: dict[int, float] = {}
    logprobs: bool | int | None = None
    top_logprobs: int = Field(0, ge=0, le=20)
    ignore_eos: bool = False
    response_format: ResponseFormat = ResponseFormat(type="text")
    stream: Literal[False] = False
    return_token_ids: bool = True

    def native(self, choice: int) -> JSON:
        """What llama.cpp's /completion is asked for one choice, less its prompt and adapter."""
        alternatives = max(self.top_logprobs, int(self.logprobs or 0) if not isinstance(self.logprobs, bool) else 0)
        asked: JSON = {
            "n_predict": self.max_completion_tokens or self.max_tokens or -1,
            "n_probs": max(1, alternatives),
            "return_tokens": True,
            "seed": -1 if self.seed is None else (self.seed + choice) % 2**32,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(0, self.top_k),
            "min_p": self.min_p,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repeat_penalty": self.repetition_penalty,
            "logit_bias": [list(pair) for pair in self.logit_bias.items()],
            "ignore_eos": self.ignore_eos,
        }
        if self.response_format.type == "json_object":
            asked["json_schema"] = {"type": "object"}
        elif self.response_format.json_schema is not None:
            asked["json_schema"] = self.response_format.json_schema.schema_
        return asked


def ends_whole(text: bytes) -> bool:
    """False where a text ends in the middle of a character, as llama.cpp judges that."""
    for back, byte in enumerate(reversed(text[-4:]), start=1):
        long = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 0
        if back < long:
            return False
    return True


def scored(result: JSON, pieces: Sequence[bytes]) -> list[JSON | None]:
    """For each sampled token its entry of logprobs, or None where llama.cpp gives none.

    It gives none for a token after which the text ends in the middle of a character, nor for the last ones before a
    stop string. Raises ValueError where what it gives doesn't fit.
    """
    text, entries, found = b"", iter(result.get("completion_probabilities", [])), list[JSON | None]()
    for token in result["tokens"]:
        text += pieces[token]
        entry = next(entries, None) if ends_whole(text) else None
        if entry is not None and entry["id"] != token:
            raise ValueError(f"the logprob of token {entry['id']} came for token {token}")
        found.append(entry)
    return found


def choice_of(index: int, chat: bool, prompt: Ids, result: JSON, entries: Sequence[JSON]) -> JSON:
    """One choice in OpenAI's form, with the ids of what was sampled and of its prompt."""
    choice: JSON = {
        "index": index,
        "finish_reason": "length" if result["stop_type"] == "limit" else "stop",
        "token_ids": result["tokens"],
        "prompt_token_ids": prompt,
    }
    if chat:
        message = {"role": "assistant", "content": result["content"]}
        return {**choice, "message": message, "logprobs": {"content": list(entries)}}
    logprobs = {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
    }
    return {**choice, "text": result["content"], "logprobs": logprobs}
