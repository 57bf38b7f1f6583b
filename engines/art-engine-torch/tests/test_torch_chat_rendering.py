"""What the server is asked with and what the trainer learns from is the same text, whatever the template's style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_core.errors import InvalidTrajectory
from art_core.trajectories import History
from art_engine_torch.server.prompt_process import PromptWriter
from art_training_kit.chat_template import ChatTemplate

TEMPLATES = sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}]
USER = {"role": "user", "content": "Add."}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


def result(content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call00001", "content": content}


BRIEF = {"role": "developer", "content": "Be brief."}
SAID = {"role": "assistant", "content": "Two.", "tool_calls": None, "refusal": None}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "developer": [{"role": "developer", "content": "Be brief."}, USER],
    "developer after system": [
        {"role": "system", "content": "One."},
        USER,
        {"role": "developer", "content": "Two."},
        USER,
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    "arguments as text": [USER, call('{"a": 1, "b": "x\\"y"}'), result("2")],
    "arguments as an object": [USER, call({"a": 1, "b": "é"}), result("2")],
    "no arguments": [USER, call(""), result(None)],
    "arguments that are no JSON": [USER, call('{"a": '), result([{"type": "text", "text": "what?"}])],
    "null where nothing is": [
        USER,
        {"role": "assistant", "content": "Two.", "tool_calls": None, "refusal": None},
        USER,
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model("llama-tied"), local_files_only=True)


def served(tokenizer: Any, messages: list[Any], tools: Any) -> str:
    """The text of the prompt that the server writes, or its refusal."""
    job = {"messages": messages, "tools": tools, "template": None, "arguments": {}, "generate": True}
    done = PromptWriter(tokenizer).do({**job, "continue_final": False, "special": False, "most": 10**6})
    return done["error"] if "error" in done else str(tokenizer.decode(done["tokens"][0], skip_special_tokens=False))


def trained(tokenizer: Any, messages: list[Any], tools: Any) -> str:
    """The text before an answer without token ids, as the trainer writes it, or its refusal."""
    history = History(messages_and_choices=[*messages, {"role": "assistant", "content": "done"}], tools=tools)
    try:
        prompt, _ = ChatTemplate(tokenizer).sampled(history, len(messages), where="h")
    except InvalidTrajectory as error:
        return str(error)
    return str(tokenizer.decode(prompt, skip_special_tokens=False))


def words_of(refusal: str) -> str:
    return refusal.partition(": ")[2]


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_server_and_trainer_write_the_same_bytes(tokenizer: Any, template: Path, tools: Any) -> None:
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    same = 0
    for name, messages in CONVERSATIONS.items():
        asked, learnt = served(tokenizer, messages, tools), trained(tokenizer, messages, tools)
        if asked.startswith("messages"):
            assert words_of(asked) == words_of(learnt), name
        else:
            assert asked == learnt, name
            same += 1
    assert same >= (3 if "gemma" in template.stem else 9)


def test_there_are_ten_styles() -> None:
    assert len(TEMPLATES) == 10


@pytest.mark.parametrize(
    ("style", "written"),
    {
        "chatml_hermes": '{"name": "add", "arguments": {"a": 1, "b": "x\\"y"}}',
        "chatml_text_or_object": '{"name": "add", "arguments": {"a": 1, "b": "x\\"y"}}',
        "coder_parameters": '<parameter=a>\n1\n</parameter>\n<parameter=b>\nx"y\n</parameter>',
        "llama3": '{"name": "add", "parameters": {"a": 1, "b": "x\\"y"}}',
        "mistral": '{"name": "add", "arguments": {"a": 1, "b": "x\\"y"}, "id": "call00001"}',
        "phi4": '[{"name": "add", "arguments": {"a": 1, "b": "x\\"y"}}]',
        "deepseek_v3": 'add\n```json\n{"a": 1, "b": "x\\"y"}\n```',
        "plain_text_arguments": 'CALL add {"a": 1, "b": "x\\"y"}',
        "harmony_developer": 'to=functions.add<|message|>{"a": 1, "b": "x\\"y"}<|call|>',
    }.items(),
)
def test_arguments_are_written_once_and_as_json(tokenizer: Any, style: str, written: str) -> None:
    [template] = [path for path in TEMPLATES if path.stem == style]
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    for name in ("arguments as text", "arguments as an object"):
        text = served(tokenizer, CONVERSATIONS[name], TOOLS)
        assert (written if name == "arguments as text" else "é") in text
        assert "'a'" not in text
        assert '\\"a\\"' not in text


def test_developer_takes_the_place_of_system_where_the_template_does_not_know_it(tokenizer: Any) -> None:
    for template in TEMPLATES:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
        said = served(tokenizer, CONVERSATIONS["developer"], None)
        if template.stem == "harmony_developer":
            assert said.startswith("<|start|>developer<|message|># Instructions\nBe brief.")
        else:
            assert said == served(tokenizer, CONVERSATIONS["system"], None), template.stem
            assert "developer" not in said
    assert "helpful assistant" not in said


def called(tool_calls: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "tool_calls": tool_calls}]


@pytest.mark.parametrize(
    ("messages", "tools", "param"),
    [
        (["text"], None, "messages.0"),
        ([{"content": "x"}], None, "messages.0.role"),
        ([{"role": "usr", "content": "x"}], None, "messages.0.role"),
        ([{"role": 5, "content": "x"}], None, "messages.0.role"),
        ([USER, {"role": "user", "content": 5}], None, "messages.1.content"),
        ([{"role": "user", "content": {"a": 1}}], None, "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], None, "messages.0.content.0.text"),
        ([{"role": "user", "content": [{"type": "text"}]}], None, "messages.0.content.0.text"),
        ([{"role": "user", "content": ["a"]}], None, "messages.0.content.0"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], None, "messages.0.content.0"),
        ([USER, {"role": "assistant", "tool_calls": "text"}], None, "messages.1.tool_calls"),
        ([USER, {"role": "assistant", "tool_calls": {"id": 1}}], None, "messages.1.tool_calls"),
        ([USER, {"role": "assistant", "tool_calls": ["text"]}], None, "messages.1.tool_calls.0"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": "f"}]}], None, "messages.1.tool_calls.0.function"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": []}]}], None, "messages.1.tool_calls.0.function"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}],
            None,
            "messages.1.tool_calls.0.function.name",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}],
            None,
            "messages.1.tool_calls.0.function.arguments",
        ),
        ([USER, {"role": "assistant", "tool_calls": [{"type": "custom"}]}], None, "messages.1.tool_calls.0.type"),
        ([USER, {"role": "assistant", "function_call": {"name": "f"}}], None, "messages.1.function_call"),
        ([USER], "add", "tools"),
        ([USER], ["add"], "tools.0"),
        ([USER], [{"type": "web_search"}], "tools.0.type"),
        ([USER], [{"type": "function"}], "tools.0.function"),
        ([USER], [{"type": "function", "function": {"name": ""}}], "tools.0.function.name"),
        ([USER], [{"type": "function", "function": {"name": "f", "parameters": []}}], "tools.0.function.parameters"),
    ],
)
def test_what_is_malformed_is_named_by_both(tokenizer: Any, messages: list[Any], tools: Any, param: str) -> None:
    tokenizer.chat_template = TEMPLATES[0].read_text(encoding="utf-8")
    job = {"messages": messages, "tools": tools, "template": None, "arguments": {}, "generate": True}
    done = PromptWriter(tokenizer).do({**job, "continue_final": False, "special": False, "most": 10**6})
    assert done["param"] == param
    assert done["error"].startswith(f"{param}: ")
    if not all(isinstance(message, dict) and "role" in message for message in messages) or isinstance(tools, str):
        return  # no trajectory can hold it
    history = History.model_construct(messages_and_choices=[*messages, SAID], tools=tools)
    with pytest.raises(InvalidTrajectory) as raised:
        ChatTemplate(tokenizer).sampled(history, len(messages), where="group")
    place = "group" + (f".{param}" if tools else f".messages_and_choices[{param.split('.')[1]}]")
    assert str(raised.value).startswith(place)


def test_an_image_is_answered_with_what_could_serve_it(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[0].read_text(encoding="utf-8")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    assert "vLLM" in served(tokenizer, [{"role": "user", "content": [image]}], None)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no such thing') }}", "does not take them: no such thing"),
        ("{{ messages[5].content }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{# nothing #}", "writes nothing"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_is_told_in_its_own_words(tokenizer: Any, template: str, says: str) -> None:
    tokenizer.chat_template = template
    assert says in served(tokenizer, [USER], None)
    assert says in trained(tokenizer, [USER], None)


@pytest.mark.parametrize(
    "name", ["tokenize", "chat_template", "tools", "messages", "add_generation_prompt", "return_dict"]
)
def test_what_is_not_the_templates_to_decide_is_no_argument_of_it(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = TEMPLATES[0].read_text(encoding="utf-8")
    job = {"messages": [USER], "tools": None, "template": None, "arguments": {name: True}, "generate": True}
    done = PromptWriter(tokenizer).do({**job, "continue_final": False, "special": False, "most": 10**6})
    assert done["param"] == f"chat_template_kwargs.{name}"


def test_half_a_character_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[0].read_text(encoding="utf-8")
    told = trained(tokenizer, [USER, result(b"caf\xe9".decode("utf-8", "surrogateescape"))], None)
    assert told.startswith(r"h.messages_and_choices[1].content: holds \udce9 at position 3")


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["text", "function", "user", "f"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "tool_calls", "function", "name", "arguments", "type", "text", "id", "x"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(st.lists(ANYTHING, min_size=1, max_size=3), ANYTHING)
def test_whatever_is_sent_is_written_or_refused_by_name(tokenizer: Any, messages: list[Any], tools: Any) -> None:
    tokenizer.chat_template = TEMPLATES[0].read_text(encoding="utf-8")
    job = {"messages": messages, "tools": tools, "template": None, "arguments": {}, "generate": True}
    done = PromptWriter(tokenizer).do({**job, "continue_final": False, "special": False, "most": 10**6})
    assert "tokens" in done or done["param"].startswith(("messages", "tools"))
