"""Text pieces, stop strings and tool calls, against what the whole text says."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_engine_kit.hermes_calls import ToolCallStream, parse_tool_calls
from art_engine_torch.server.detokenize import TextStream


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes; ids from 256 on are special and read as nothing."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return bytes(i for i in token_ids if i < 256).decode(errors="replace")


def run(text: str, stops: Sequence[str] = (), *, include: bool = False) -> tuple[list[str], str | None]:
    stream = TextStream(Bytes(), stops, include_stop=include)
    pieces, hit = [], None
    for byte in text.encode():
        piece, hit = stream.push(byte)
        pieces.append(piece)
        if hit is not None:
            break
    pieces.append(stream.flush())
    assert stream.text == "".join(pieces)
    return pieces, hit


@given(st.text(max_size=40))
def test_pieces_make_the_text_and_none_is_half_a_character(text: str) -> None:
    pieces, hit = run(text)
    assert "".join(pieces) == text
    assert hit is None
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(st.text(alphabet="ab", max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_they_first_are_complete(text: str, stops: list[str]) -> None:
    pieces, hit = run(text, stops)
    ends = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert ("".join(pieces), hit) == (text, None)
        return
    first = min(end for end, _, _ in ends)
    starts = [start for end, start, _ in ends if end == first]
    assert hit in {stop for end, _, stop in ends if end == first}
    assert "".join(pieces) == text[: min(starts)]


def test_the_stop_string_can_be_kept() -> None:
    assert run("one END two", ["END"], include=True) == (["o", "n", "e", " ", "", "", "END", ""], "END")


def test_special_tokens_read_as_nothing() -> None:
    stream = TextStream(Bytes())
    assert [stream.push(token)[0] for token in (104, 300, 105)] == ["h", "", "i"]


def test_an_unfinished_character_comes_at_the_end() -> None:
    stream = TextStream(Bytes())
    assert stream.push("é".encode()[0]) == ("", None)
    assert stream.flush() == "\ufffd"


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def stream_calls(text: str, size: int) -> tuple[str, list[tuple[int, str, str]]]:
    stream = ToolCallStream()
    parts = [stream.push(text[i : i + size]) for i in range(0, len(text), size)]
    parts.append(stream.flush())
    calls = [(c["index"], c["function"]["name"], c["function"]["arguments"]) for part in parts for c in part.calls]
    return "".join(part.text for part in parts), calls


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_separated_from_text(size: int) -> None:
    text = f"I will add. {call('add', a=1, b=[2])}\n{call('stop')}"
    said, calls = stream_calls(text, size)
    assert said.strip() == "I will add."
    assert calls == [(0, "add", '{"a": 1, "b": [2]}'), (1, "stop", "{}")]
    whole = parse_tool_calls(text)
    assert whole.text == "I will add."
    assert [c["function"]["name"] for c in whole.calls] == ["add", "stop"]
    assert all("index" not in c for c in whole.calls)
    assert len({c["id"] for c in whole.calls}) == 2


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize(
    "text",
    [
        "no call at all <tool",
        "<tool_call>not json</tool_call> after",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "argum',
        "a < b <tool_callx>",
    ],
)
def test_what_is_no_call_stays_text(text: str, size: int) -> None:
    assert stream_calls(text, size) == (text, [])
    assert parse_tool_calls(text).text == text


def test_a_call_without_its_end_tag_counts_when_whole() -> None:
    assert stream_calls('<tool_call>{"name": "f", "arguments": "{}"}', 4) == ("", [(0, "f", "{}")])


@given(st.text(alphabet='<>/tolca_l{}"n ', max_size=60), st.integers(1, 9))
def test_nothing_is_lost_whatever_the_pieces(text: str, size: int) -> None:
    said, calls = stream_calls(text, size)
    assert calls == []
    assert said == text


def test_a_call_with_a_line_break_in_a_string_is_a_call_and_its_arguments_are_json() -> None:
    [call] = parse_tool_calls('<tool_call>{"name": "write", "arguments": {"text": "a\nb"}}</tool_call>').calls
    assert json.loads(call["function"]["arguments"]) == {"text": "a\nb"}
