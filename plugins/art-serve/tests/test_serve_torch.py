"""A server on the torch engines and a tiny random model: asked by OpenAI's client, trained on rewards and replies."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("torch")
pytest.importorskip("art_engine_torch")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NAME = "wandb-artifact:///acme/p/m"
MESSAGES: Any = [{"role": "user", "content": "What is it?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


@pytest.fixture(scope="module")
def torch_client(serving: Any, tmp_path_factory: pytest.TempPathFactory, own_tiny_model: Path) -> Iterator[Any]:
    """A client of an entity that has the model `m` already."""
    with serving(tmp_path_factory.mktemp("torch"), own_tiny_model, engine="torch") as server:
        client = server.client(server.key("acme"))
        client.model()
        yield client


@pytest.fixture
def asked(torch_client: Any) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=torch_client.url, api_key=torch_client.key, max_retries=0) as client:
        yield client


def test_openais_client_is_answered_under_the_artifact_name(asked: openai.OpenAI) -> None:
    assert [model.id for model in asked.models.list()] == [NAME]
    assert asked.models.retrieve(NAME).id == NAME
    answer = asked.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=8, logprobs=True, seed=1)
    assert answer.model == f"{NAME}:step0"
    choice: Any = answer.choices[0]
    assert len(choice.token_ids) == len(choice.logprobs.content) > 0
    assert choice.prompt_token_ids
    text = asked.completions.create(model=f"{NAME}:step0", prompt="What", max_tokens=4)
    assert (text.model, len(text.choices)) == (f"{NAME}:step0", 1)


def test_its_figures_are_kept_by_the_addresses_that_were_asked(torch_client: Any, asked: openai.OpenAI) -> None:
    asked.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=1)
    asked.completions.create(model=NAME, prompt="What", max_tokens=1)
    figures = httpx.get(
        torch_client.url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {torch_client.key}"}
    ).text
    for address in ("/v1/chat/completions", "/v1/completions"):
        assert f'art_serve_requests_total{{address="{address}",method="POST",status="200"}}' in figures


def test_a_stream_says_the_same_tokens_as_a_whole_answer(asked: openai.OpenAI) -> None:
    options: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    whole: Any = asked.chat.completions.create(**options).choices[0]
    ids: list[int] = []
    for chunk in asked.chat.completions.create(**options, stream=True):
        assert chunk.model == f"{NAME}:step0"
        for choice in chunk.choices:
            ids += getattr(choice, "token_ids", None) or []
    assert ids == whole.token_ids


def test_tools_reach_the_model_and_its_call_comes_back(asked: openai.OpenAI) -> None:
    answer = asked.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS, temperature=0, max_tokens=60)
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("look_up", {"city": "Paris"})


def test_what_the_backend_refuses_comes_through_with_its_reason(asked: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        asked.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=-1)
    with pytest.raises(openai.NotFoundError, match="is not served"):
        asked.chat.completions.create(model=f"{NAME}:step9", messages=MESSAGES)


def test_rewards_and_replies_each_make_a_step_that_is_asked_next(torch_client: Any, asked: openai.OpenAI) -> None:
    model = torch_client.model()

    def attempt(seed: int) -> dict[str, Any]:
        answer = asked.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=8, seed=seed)
        return {"messages_and_choices": [*MESSAGES, answer.choices[0].model_dump()], "reward": float(seed % 2)}

    groups = [{"trajectories": [attempt(seed) for seed in range(4)]}]
    body = {"model_id": model, "trajectory_groups": groups, "experimental_config": {"learning_rate": 1e-2}}
    packed = gzip.compress(json.dumps(body).encode())
    job = torch_client.json("POST", "/preview/training-jobs", content=packed, headers={"Content-Encoding": "gzip"})[
        "id"
    ]
    events = list(torch_client.events(job))
    assert (events[-1]["type"], events[-1]["data"]["step"]) == ("training_ended", 1)
    assert events[-1]["data"]["metrics"]["data/step_num_gradient_steps"] >= 1
    line = {"messages": [*MESSAGES, {"role": "assistant", "content": "It is so!"}]}
    data = "".join(json.dumps(line) + "\n" for _ in range(4)).encode()
    url = torch_client.json("POST", "/preview/uploads", content=data)["url"]
    wanted = {"model_id": model, "training_data_url": url, "config": {"batch_size": 2, "learning_rate": 1e-3}}
    job = torch_client.json("POST", "/preview/sft-training-jobs", json=wanted)["id"]
    ended = list(torch_client.events(job))
    assert ended[-1]["data"]["step"] == 2, ended
    assert ended[-2]["data"]["data/step_num_gradient_steps"] == 2
    taken = [event for event in ended if event["type"] == "gradient_step"]
    assert [(step["data"]["gradient_step"], step["data"]["num_gradient_steps"]) for step in taken] == [(1, 2), (2, 2)]
    phases = [event["data"].get("phase") for event in ended]
    assert ended.index(taken[0]) < phases.index("saving"), "the first is told while the second goes on"
    mean = sum(step["data"]["loss/train"] for step in taken) / 2
    assert ended[-1]["data"]["metrics"]["loss/train"] == pytest.approx(mean, rel=0.2)
    answers = [
        asked.chat.completions.create(model=name, messages=MESSAGES, max_tokens=1).model
        for name in (NAME, f"{NAME}:step1")
    ]
    assert answers == [f"{NAME}:step2", f"{NAME}:step1"]


def test_a_line_that_is_no_conversation_is_named_before_the_job_is_queued(torch_client: Any) -> None:
    url = torch_client.json("POST", "/preview/uploads", content=b'{"messages": [{"role": "user"}]}\n{"text": 1}\n')[
        "url"
    ]
    wanted = {"model_id": torch_client.model(), "training_data_url": url}
    refused = torch_client.ask("POST", "/preview/sft-training-jobs", json=wanted)
    assert refused.status_code == 422
    assert "Line 2" in refused.json()["error"]["message"]
