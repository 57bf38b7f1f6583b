"""Asks a running server with every field of OpenAI's two requests, and says what became of each.

A field that can change the answer is asked with a value whose effect can be seen. Knows requests and answers and holds
no expectation: what an engine is said to do stands in the documentation.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from art_core.engines import Endpoint
from art_core.errors import InvalidRequest

from .serving import LiveEngine, Sample, event_lines, samples

JSON = dict[str, Any]
ASK: Final[list[JSON]] = [{"role": "user", "content": "Say something about the city."}]
PARAMETERS: Final[JSON] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Final[list[JSON]] = [
    {"type": "function", "function": {"name": "look_up", "parameters": PARAMETERS}},
    {
        "type": "function",
        "function": {
            "name": "end",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    },
]
CALL: Final[JSON] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"city": "Bonn"}'}}],
}
# Tokens of the suite's tiny model: the one that ends a message, which it says after a call unless it is made unlikely;
# the one that begins a call; and white space, of which a grammar may let it say so much between JSON's parts that it
# comes to no end.
END: Final = "315"
BEGIN_CALL: Final = "317"
LINE_BREAK: Final = "198"
NO_SPACE: Final = {"197": -100, LINE_BREAK: -100, "201": -100, "220": -100}
# Its tokens for the bytes C0, C1, E0, ED and F0 to FF. A grammar may take what follows one of them for a character that
# UTF-8 has none of, which is read as several.
NO_CHARACTER: Final = dict.fromkeys(map(str, (124, 125, 156, 169, *range(172, 188))), -100)
OBEYED, HARMLESS, IGNORED, REFUSED = "obeyed", "harmless", "ignored", "refused"


class ServerError(AssertionError):
    """The server answered with an error of its own."""


@dataclass(frozen=True)
class Probe:
    """One field, as the table names it, and a request with it. `seen` says whether the answer shows its effect, by the
    answer and by that to the same request without it; None where there is nothing to be seen.
    """

    name: str
    value: Any
    seen: Callable[[list[Sample], list[Sample]], bool] | None = None
    endpoint: Endpoint = "chat/completions"
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def field(self) -> str:
        """The field itself, without which value of it is meant."""
        return self.name.partition(" ")[0]


async def outcome(live: LiveEngine, probe: Probe) -> str:
    """What the engine makes of a field. Raises ServerError for an answer that is neither one nor a refusal by name."""
    without = await _ask(live, probe, {})
    if isinstance(without, str):
        raise ServerError(f"{probe.name}: the request without it was refused: {without}")
    found = await _ask(live, probe, {probe.field: probe.value})
    if isinstance(found, str):
        if probe.field not in found and not (probe.field == "messages" and "content" in found):
            raise ServerError(f"{probe.name} was refused, but not by its name: {found}")
        return REFUSED
    if probe.seen is None:
        return HARMLESS if [s.prompt_ids for s in found] == [s.prompt_ids for s in without] else OBEYED
    return OBEYED if probe.seen(found, without) else IGNORED


async def _ask(live: LiveEngine, probe: Probe, fields: JSON) -> list[Sample] | str:
    body: JSON = {"model": live.launch.served_name, "max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    body |= {"messages": ASK} if probe.endpoint == "chat/completions" else {"prompt": [5, 6, 7, 8]}
    # A later one wins; None takes a field out.
    body = {name: value for name, value in {**body, **probe.beside, **fields}.items() if value is not None}
    try:
        prepared = live.engine.prepare_request(probe.endpoint, body, None)
    except InvalidRequest as error:
        return str(error)
    if body.get("stream"):
        return [sample async for sample in _streamed(live, prepared)]
    answer = await live.post(f"/v1/{probe.endpoint}", prepared)
    if 400 <= answer.status_code < 500:
        return answer.text
    if answer.status_code != 200:
        raise ServerError(f"{probe.name}: HTTP {answer.status_code}: {answer.text[:500]}")
    return samples(live.engine.read_response(probe.endpoint, answer.json()))


async def _streamed(live: LiveEngine, prepared: JSON) -> AsyncIterator[Sample]:
    """One sample, whose choice holds the number of events and whether the usage was among them."""
    events = 0
    usage = False
    async with live.client.stream("POST", "/v1/chat/completions", json=prepared) as answer:
        if answer.status_code != 200:
            raise ServerError(f"a stream: HTTP {answer.status_code}: {(await answer.aread())[:500]!r}")
        async for line in event_lines(answer):
            data = line.removeprefix("data: ")
            if line.startswith("data: ") and data != "[DONE]":
                events += 1
                usage = usage or bool(json.loads(data).get("usage"))
    yield Sample([], [], [], "", None, {"events": events, "usage": usage})


def _ids(found: list[Sample]) -> list[int]:
    return [token for sample in found for token in sample.ids]


def _same(found: list[Sample], without: list[Sample]) -> bool:
    return _ids(found) == _ids(without)


def _all_alike(found: list[Sample], _: list[Sample]) -> bool:
    return len({tuple(sample.ids) for sample in found}) == 1


def _one_call_each(found: list[Sample], without: list[Sample]) -> bool:
    one, several = ([len(_calls([sample])) for sample in samples] for samples in (found, without))
    return max(one) == 1 < max(several)


def _richer(found: list[Sample], without: list[Sample]) -> bool:
    return len(set(_ids(found))) > len(set(_ids(without)))


def _three(found: list[Sample], _: list[Sample]) -> bool:
    return len(_ids(found)) == 3 and found[0].finish_reason == "length"


def _parses(found: list[Sample], _: list[Sample]) -> bool:
    return _fits(_read(found[0].text))


def _read(text: str) -> Any:
    # xgrammar lets control characters into strings as they are.
    return json.loads(text, strict=False)


def _object(found: list[Sample], without: list[Sample]) -> bool:
    """A model that says nothing sensible may not come to the end of an object."""
    [sample], [free] = found, without
    if sample.finish_reason == "stop" and not isinstance(_read(sample.text), dict):
        return False
    return sample.text.lstrip().startswith("{") and not free.text.lstrip().startswith("{")


def _fits(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"city", "days"} and 1 <= value["days"] <= 9 and _short(value)


def _short(value: JSON) -> bool:
    return isinstance(value["city"], str) and len(value["city"]) <= 6


def _calls(found: list[Sample]) -> list[JSON]:
    return [call for sample in found for call in sample.choice["message"].get("tool_calls") or ()]


def _called(name: str | None) -> Callable[[list[Sample], list[Sample]], bool]:
    def seen(found: list[Sample], _: list[Sample]) -> bool:
        calls = _calls(found)
        good = all(_fits(_read(call["function"]["arguments"])) or call["function"]["name"] == "end" for call in calls)
        return bool(calls) and good and all(name in (None, call["function"]["name"]) for call in calls)

    return seen


def _prompt_changed(found: list[Sample], without: list[Sample]) -> bool:
    return [s.prompt_ids for s in found] != [s.prompt_ids for s in without]


def _prompt_kept(found: list[Sample], without: list[Sample]) -> bool:
    return not _prompt_changed(found, without)


def _asked(*messages: JSON) -> JSON:
    return {"messages": list(messages)}


def probes() -> list[Probe]:
    """Every field of OpenAI's two requests, and the further ones of sampling that all engines know."""
    closing = {"ignore_eos": None, "max_tokens": 300, "temperature": 1.0, "logit_bias": {**NO_SPACE, **NO_CHARACTER}}
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    with_tools = {"tools": strict, **closing}
    user = ASK[0]
    answered = (user, {**CALL, "content": ""})
    result = {"role": "tool", "tool_call_id": "c1"}
    many = {"max_tokens": 48}
    text: dict[str, Any] = {"endpoint": "completions"}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    schema = {"type": "json_schema", "json_schema": {"name": "weather", "schema": PARAMETERS, "strict": True}}
    drawn = {"temperature": 1.0, "seed": 7, "max_tokens": 24}
    several = {"temperature": 1.0, "n": 4}
    named = {"type": "function", "function": {"name": "end"}}
    return [
        Probe("messages developer", [{"role": "developer", "content": "x"}, user], _prompt_kept,
              beside=_asked({"role": "system", "content": "x"}, user)),
        Probe("messages parts of text", [{"role": "user", "content": [{"type": "text", "text": user["content"]}]}],
              _prompt_kept),
        Probe("messages null content", [user, CALL], _prompt_kept, beside=_asked(*answered)),
        Probe("messages tool results as parts", [*answered, {**result, "content": [{"type": "text", "text": "2"}]}],
              _prompt_kept, beside=_asked(*answered, {**result, "content": "2"})),
        Probe("messages images", [{"role": "user", "content": [image]}]),
        Probe("max_tokens", 3, _three),
        Probe("max_completion_tokens", 3, _three, beside={"max_tokens": None}),
        Probe("n", 3, lambda found, _: len(found) == 3, beside={"temperature": 1.0}),
        Probe("temperature", 0.0, _same),
        Probe("top_p", 1e-6, _all_alike, beside=several),
        Probe("top_k", 1, _all_alike, beside=several),
        Probe("min_p", 1.0, _all_alike, beside=several),
        Probe("seed", 7, _same, beside=drawn),
        Probe("stop", ["e"], lambda found, _: found[0].finish_reason == "stop" and "e" not in found[0].text,
              beside={"logit_bias": None, "max_tokens": 300, "temperature": 1.0}),
        Probe("frequency_penalty", 2.0, _richer, beside=many),
        Probe("presence_penalty", 2.0, _richer, beside=many),
        Probe("repetition_penalty", 2.0, _richer, beside=many),
        Probe("logit_bias", {"70": 100}, lambda found, _: set(_ids(found)) == {70}),
        Probe("logprobs", True, lambda found, _: all(len(s.logprobs) == len(s.ids) for s in found)),
        Probe("top_logprobs", 2, lambda found, _: all(
            len(entry["top_logprobs"]) == 2 for entry in found[0].choice["logprobs"]["content"]),
            beside={"logprobs": True}),
        Probe("stream", True, lambda found, _: found[0].choice["events"] > 1),
        Probe("stream_options", {"include_usage": True}, lambda found, _: bool(found[0].choice["usage"]),
              beside={"stream": True}),
        Probe("tools", TOOLS, lambda found, _: [c["function"]["name"] for c in _calls(found)] == ["look_up"],
              beside={"ignore_eos": None, "max_tokens": 30}),
        Probe("tool_choice auto", "auto", lambda found, _: bool(_calls(found)),
              beside={"tools": TOOLS, "ignore_eos": None, "max_tokens": 30}),
        Probe("tool_choice none", "none", lambda found, _: not _calls(found),
              beside={"tools": TOOLS, "ignore_eos": None, "max_tokens": 30}),
        Probe("tool_choice required", "required", _called(None), beside=with_tools),
        Probe("tool_choice named", named, _called("end"), beside={**with_tools, "n": 8}),
        Probe("parallel_tool_calls", False, _one_call_each,
              beside={**with_tools, "tool_choice": "required", "n": 8, "max_tokens": 150,
                      "logit_bias": {**NO_SPACE, LINE_BREAK: 0, END: -100, BEGIN_CALL: 6}}),
        Probe("response_format json_object", {"type": "json_object"},
              _object,
              beside=closing),
        Probe("response_format json_schema", schema, _parses, beside=closing),
        Probe("response_format text", {"type": "text"}),
        *(Probe(name, value) for name, value in {
            "reasoning_effort": "low", "verbosity": "low", "metadata": {"a": "b"}, "store": True, "user": "u",
            "service_tier": "auto", "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
            "prompt_cache_options": {"a": 1}, "prediction": {"type": "content", "content": "x"},
        }.items()),
        Probe("modalities text", ["text"]),
        Probe("modalities audio", ["text", "audio"]),
        Probe("audio", {"voice": "alloy", "format": "wav"}),
        Probe("functions", [{"name": "f"}]),
        Probe("function_call", {"name": "f"}),
        Probe("moderation", {"model": "x"}),
        Probe("web_search_options", {}),
        Probe("prompt token ids", [9, 10, 11], _prompt_changed, **text),
        Probe("prompt text", "The city", _prompt_changed, **text),
        Probe("echo", True, None, **text),
        Probe("suffix", "x", None, **text),
        Probe("best_of", 3, None, **text),
    ]  # fmt: skip
