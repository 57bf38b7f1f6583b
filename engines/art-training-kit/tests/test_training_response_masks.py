"""Each template's replies, held against what a reader of the template would mark by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from art_conformance.tiny_model import write_base_model
from art_core.errors import InvalidTrajectory
from art_engine_kit.chat_rendering import ChatRenderer
from art_training_kit.response_masks import ReplyRows, reply_rows

HERE = Path(__file__).parent
ENGINE = HERE.parents[1] / "art-engine-torch"
WITH_TOOLS = ("user", "call", "tool", "said", "user", "last")
TALK = ("user", "said", "user", "last")
FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
MESSAGES: dict[str, dict[str, Any]] = {
    "user": {"role": "user", "content": "Add one to nought."},
    "call": {"role": "assistant", "content": "", "tool_calls": [CALL]},
    "tool": {"role": "tool", "tool_call_id": "call00001", "content": "1"},
    "said": {"role": "assistant", "content": "It is one."},
    "last": {"role": "assistant", "content": "One again."},
}
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
DEEPSEEK_CALL = (
    '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜><｜end▁of▁sentence｜>'
)
# A template, what is said to it, the end-of-turn token, and the replies by hand: those of the common row, then those
# that have one to themselves.
CASES: dict[str, tuple[Path, tuple[str, ...], str, list[str], list[str]]] = {
    "Llama 3": (
        ENGINE / "tests/chat_templates/llama3.jinja",
        WITH_TOOLS,
        "<|eot_id|>",
        ['{"name": "add", "parameters": {"a": 1}}<|eot_id|>', "It is one.<|eot_id|>", "One again.<|eot_id|>"],
        [],
    ),
    "Qwen2.5": (
        ENGINE / "tests/chat_templates/chatml_hermes.jinja",
        WITH_TOOLS,
        "<|im_end|>",
        [QWEN_CALL, "It is one.<|im_end|>", "One again.<|im_end|>"],
        [],
    ),
    "Qwen3, which drops earlier thoughts": (
        HERE / "chat_templates/qwen3_thinking.jinja",
        WITH_TOOLS,
        "<|im_end|>",
        ["<think>\n\n</think>\n\nOne again.<|im_end|>"],
        ["<think>\n\n</think>\n\n\n" + QWEN_CALL, "<think>\n\n</think>\n\nIt is one.<|im_end|>"],
    ),
    "Mistral, which moves its tools": (
        ENGINE / "tests/chat_templates/mistral.jinja",
        WITH_TOOLS,
        "</s>",
        ["One again.</s>"],
        ['[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "call00001"}]</s>', "It is one.</s>"],
    ),
    "Gemma": (
        ENGINE / "tests/chat_templates/gemma.jinja",
        TALK,
        "<end_of_turn>",
        ["It is one.<end_of_turn>", "One again.<end_of_turn>"],
        [],
    ),
    "Phi": (
        ENGINE / "tests/chat_templates/phi4.jinja",
        WITH_TOOLS,
        "<|end|>",
        [
            '<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|><|end|>',
            "It is one.<|end|>",
            "One again.<|end|>",
        ],
        [],
    ),
    "DeepSeek": (
        ENGINE / "tests/chat_templates/deepseek_v3.jinja",
        WITH_TOOLS,
        "<｜end▁of▁sentence｜>",
        [DEEPSEEK_CALL, "It is one.<｜end▁of▁sentence｜>", "One again.<｜end▁of▁sentence｜>"],
        [],
    ),
    "gpt-oss": (
        ENGINE / "tests/chat_templates/harmony_developer.jinja",
        WITH_TOOLS,
        "<|end|>",
        [
            ' to=functions.add<|message|>{"a": 1}<|call|>',
            "<|message|>It is one.<|end|>",
            "<|message|>One again.<|end|>",
        ],
        [],
    ),
    "SmolLM2": (
        ENGINE / "src/art_engine_torch/smollm2_chat_template.jinja",
        WITH_TOOLS,
        "<|im_end|>",
        [QWEN_CALL, "It is one.<|im_end|>", "One again.<|im_end|>"],
        [],
    ),
    "one that says itself what replies are": (
        HERE / "chat_templates/reply_tags.jinja",
        TALK,
        "|",
        ["It is one.|", "One again.|"],
        [],
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_base_model(tmp_path_factory.mktemp("tiny")))


def read(tokenizer: Any, template: Path, said: tuple[str, ...], end: str, **options: Any) -> ReplyRows:
    if end not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.eos_token = end
    renderer = ChatRenderer(tokenizer, template.read_text(encoding="utf-8"), options)
    tools = TOOLS if "call" in said else None
    return reply_rows(renderer, tokenizer, [MESSAGES[name] for name in said], tools, where="trajectories[7]")


def replies(tokenizer: Any, rows: ReplyRows) -> list[list[str]]:
    """The trained tokens of each row as text, one text for each unbroken run of them."""
    texts = []
    for row in rows.rows:
        runs: list[list[int]] = []
        before = -2
        for position in row.trained.tolist():
            if position != before + 1:
                runs.append([])
            runs[-1].append(int(row.token_ids[position]))
            before = position
        texts.append([tokenizer.decode(run) for run in runs])
    return texts


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_replies_are_trained_each_once(tokenizer: Any, case: str) -> None:
    template, said, end, together, alone = CASES[case]
    rows = read(tokenizer, template, said, end)
    assert replies(tokenizer, rows) == [together, *([reply] for reply in alone)]
    assert len(rows.problems) == len(alone)


@pytest.mark.parametrize("case", [name for name in CASES if "itself" not in name])
def test_the_common_row_is_what_the_template_writes(tokenizer: Any, case: str) -> None:
    template, said, end, _, _ = CASES[case]
    rows = read(tokenizer, template, said, end)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    messages = [MESSAGES[name] for name in said]
    if case == "DeepSeek":  # whose template takes arguments as text
        call = {**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}
        messages = [{**message, "tool_calls": [call]} if "tool_calls" in message else message for message in messages]
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, indent=indent)
    source = environment.from_string(template.read_text(encoding="utf-8"))
    text = source.render(messages=messages, tools=TOOLS if "call" in said else None, add_generation_prompt=False)
    assert tokenizer.decode(rows.rows[0].token_ids) == text


def test_a_reply_that_the_template_changes_later_is_named_with_the_place(tokenizer: Any) -> None:
    template, said, end, _, _ = CASES["Qwen3, which drops earlier thoughts"]
    problems = read(tokenizer, template, said, end).problems
    assert [problem.split(" ")[0] for problem in problems] == [
        "trajectories[7].messages_and_choices[1]",
        "trajectories[7].messages_and_choices[3]",
    ]
    assert "<think>" in problems[0]


def test_a_reply_that_begins_otherwise_than_it_is_asked_for_is_named_and_trained_after_what_both_have(
    tokenizer: Any,
) -> None:
    rows = read(tokenizer, HERE / "chat_templates/asks_for_thoughts.jinja", ("user", "said"), "|")
    assert replies(tokenizer, rows) == [["It is one.|"]]
    assert len(rows.problems) == 1
    assert "trajectories[7].messages_and_choices[1]" in rows.problems[0]
    assert "<think>" in rows.problems[0]


def test_a_template_under_which_no_reply_can_be_told_is_refused_with_the_turn(tokenizer: Any) -> None:
    with pytest.raises(InvalidTrajectory, match=r"trajectories\[7\]\.messages_and_choices\[1\].*'\[?1.*'2"):
        read(tokenizer, HERE / "chat_templates/counts_messages.jinja", TALK, "|")


def test_a_conversation_without_a_reply_has_no_rows(tokenizer: Any) -> None:
    assert read(tokenizer, CASES["Llama 3"][0], ("user",), "<|eot_id|>").rows == []
