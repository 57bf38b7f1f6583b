"""Environments of verifiers as they are: what an episode samples, earns and fails by becomes a trajectory."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import verifiers.v1 as vf

import art
from art.environments.verifiers import EpisodeFailed, VerifiersEnvironment
from art.pinned_step import pinned

HERE = {"runtime": {"type": "subprocess"}}


def replies(agent: Any = None, **env: Any) -> dict[str, Any]:
    return {"taskset": {"id": "made_replies"}, "agent": {**HERE, **(agent or {})}, **env}


async def test_an_episode_is_a_trajectory_of_what_was_sampled_and_what_it_was_worth(
    endpoint: Any, model: art.Model
) -> None:
    async with VerifiersEnvironment(replies(), sampling={"max_tokens": 9, "top_k": 5}) as environment:
        scenarios = list(environment.scenarios())
        trajectory = await environment.rollout(model, scenarios[1])
    assert len(scenarios) == 4
    (request,) = endpoint.requests
    assert (request["model"], request["max_tokens"], request["top_k"]) == ("agent", 9, 5)
    assert trajectory.messages() == [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "reply to 1"},
    ]
    (choice,) = trajectory.choices()
    assert choice.token_ids == [1000 + ord(c) for c in "reply to 1"]
    assert len(choice.logprobs.content) == 10
    assert trajectory.final_policy_version == trajectory.initial_policy_version == 3
    assert trajectory.reward == pytest.approx(2 / 11 + 1)
    assert {name: trajectory.metrics[name] for name in ("letters", "reward_is_short", "reward_has_a_letter_e")} == {
        "letters": 10, "reward_is_short": pytest.approx(1 / 11), "reward_has_a_letter_e": 1,
    }  # fmt: skip
    assert trajectory.metrics["turns"] == 1
    assert not trajectory.metrics["truncated"]
    assert trajectory.metrics["duration"] > 0
    key = scenarios[1]["metadata"]["scenario_id"]
    assert trajectory.metadata == {"agent": "agent", "task": key, "stop_condition": "agent_completed"}


async def test_a_program_that_streams_is_recorded_like_any_other(endpoint: Any, model: art.Model) -> None:
    async with VerifiersEnvironment(replies({"harness": {"id": "made_replies", "stream": True}})) as environment:
        trajectory = await environment.rollout(model, next(environment.scenarios()))
    assert trajectory.choices()[0].token_ids == [1000 + ord(c) for c in "reply to 1"]
    assert trajectory.metrics["letters"] == 10


@pytest.mark.parametrize("way", ["id", "config", "made"])
async def test_an_environment_is_taken_as_id_configuration_or_object(way: str, model: art.Model) -> None:
    config = vf.resolve_env_config(replies())
    given = {"id": "made_replies", "config": config, "made": vf.load_environment(config)}[way]
    environment = VerifiersEnvironment(given)
    assert [s["task"].data.name for s in environment.scenarios(2)] == ["colour", "fruit"]
    if way != "id":  # verifiers' own default is a sandbox elsewhere
        async with environment:
            assert (await environment.rollout(model, next(environment.scenarios()))).choices()


async def test_of_an_endless_one_scenarios_go_on_until_the_limit() -> None:
    environment = VerifiersEnvironment("made_endless")
    assert [s["task"].data.name for s in environment.scenarios(3)] == ["number 0", "number 1", "number 2"]
    endless = environment.scenarios()
    assert [next(endless)["task"].data.idx for _ in range(5)] == [0, 1, 2, 3, 4]


async def test_a_conversation_with_an_untrained_user_is_one_history_of_several_turns(
    endpoint: Any, model: art.Model, make_said: Any
) -> None:
    def say(body: Any) -> Any:
        if "role-playing a USER" in str(body["messages"][0]):
            return make_said("###DONE###" if len(body["messages"]) > 5 else f"please {len(body['messages'])}")
        return make_said(f"yes {len(body['messages'])}")

    endpoint.say = say
    seats = {seat: {**HERE, "harness": {"id": "made_replies"}} for seat in ("assistant", "user")}
    config = {"id": "user-sim", "taskset": {"id": "made_replies"}, **seats}
    async with VerifiersEnvironment(config) as environment:
        trajectory = await environment.rollout(model, next(environment.scenarios()))
    assert [message["content"] for message in trajectory.messages()] == ["please 2", "yes 1", "please 4", "yes 3"]
    assert [choice.token_ids for choice in trajectory.choices()] == [
        [1000 + ord(c) for c in said] for said in ("yes 1", "yes 3")
    ]
    assert not trajectory.additional_histories
    assert trajectory.metadata["agent"] == "assistant"
    assert trajectory.metrics["user_turns"] == 3


async def test_an_episode_of_several_agents_gives_a_trajectory_for_each(model: art.Model) -> None:
    async with VerifiersEnvironment(replies(id="best-of-n", n=3, max_concurrent_agents=None)) as environment:
        scenario = next(environment.scenarios())
        group = art.TrajectoryGroup(await environment.trajectories(model, scenario))
        assert len(group) == 3
        assert all(trajectory.metrics["best"] == 1 and trajectory.choices() for trajectory in group)
        with pytest.raises(EpisodeFailed, match=r"gave 3 trajectories \(agent, agent, agent\).*trajectories\("):
            await environment.rollout(model, scenario)


@pytest.mark.parametrize(
    ("number", "said"), [(0, "ZeroDivisionError: nothing to divide by"), (1, "OSError: the data set is gone")]
)
async def test_what_fails_in_an_environment_is_raised_with_its_words(number: int, said: str, model: art.Model) -> None:
    config = {"taskset": {"id": "made_faults"}, "agent": {**HERE, "harness": {"id": "made_replies"}}}
    async with VerifiersEnvironment(config) as environment:
        scenario = list(environment.scenarios())[number]
        with pytest.raises(EpisodeFailed, match=said):
            await environment.rollout(model, scenario)
        group = await art.TrajectoryGroup(environment.rollout(model, scenario) for _ in range(2))
    assert [error.type for error in group.exceptions] == ["EpisodeFailed"] * 2


async def test_a_refused_request_and_another_interface_are_named(endpoint: Any, model: art.Model) -> None:
    config = {"taskset": {"id": "made_faults"}, "agent": HERE}
    async with VerifiersEnvironment(config) as environment:
        with pytest.raises(EpisodeFailed, match="ART's models answer chat completions"):
            await environment.rollout(model, list(environment.scenarios())[1] | {"task": asks_another_way()})
    endpoint.refuses = 400
    async with VerifiersEnvironment(replies()) as environment:
        with pytest.raises(EpisodeFailed, match="the prompt is too long"):
            await environment.rollout(model, next(environment.scenarios()))


def asks_another_way() -> vf.Task[Any, Any, Any]:
    return vf.Task(vf.TaskData(prompt="?"))


async def test_an_agent_with_a_model_of_its_own_is_not_trained(endpoint: Any, model: art.Model) -> None:
    own = {"client": {"type": "eval", "base_url": endpoint.url, "api_key_var": "NONE"}, "model": "judge"}
    async with VerifiersEnvironment(replies(own)) as environment:
        with pytest.raises(EpisodeFailed, match="asked the model nothing"):
            await environment.rollout(model, next(environment.scenarios()))


async def test_a_rollout_asks_for_the_step_that_is_held_for_it(endpoint: Any, model: art.Model) -> None:
    async with VerifiersEnvironment(replies()) as environment:
        with pinned(endpoint.url, "agent", "agent@7"):
            await environment.rollout(model, next(environment.scenarios()))
        await environment.rollout(model, next(environment.scenarios()))
    assert [request["model"] for request in endpoint.requests] == ["agent@7", "agent"]


async def test_many_at_once_are_kept_apart_and_leave_nothing_behind(
    endpoint: Any, model: art.Model, make_said: Any
) -> None:
    endpoint.say = lambda body: make_said(body["messages"][0]["content"])
    other = art.Model(name="other", project="p", inference_base_url=endpoint.url, inference_api_key="k")
    async with VerifiersEnvironment(replies()) as environment:
        jobs = [(each, scenario) for each in (model, other) for scenario in environment.scenarios()] * 4
        made = await asyncio.gather(*(environment.rollout(*job) for job in jobs))
        assert environment._recorder is not None
        assert not environment._recorder._sessions
        assert len(environment._recorder._clients) == 2
    for (_, scenario), trajectory in zip(jobs, made, strict=True):
        asked = scenario["task"].data.prompt
        assert [message["content"] for message in trajectory.messages()] == [asked, asked]
    assert {request["model"] for request in endpoint.requests} == {"agent", "other"}


async def test_a_cancelled_rollout_takes_its_request_along(endpoint: Any, model: art.Model) -> None:
    begun = asyncio.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.sleep(60)

    endpoint.before = wait
    async with VerifiersEnvironment(replies()) as environment, asyncio.timeout(30):
        rollout = asyncio.create_task(environment.rollout(model, next(environment.scenarios())))
        await begun.wait()
        rollout.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rollout
        while not endpoint.gone:
            await asyncio.sleep(0.01)
        assert environment._recorder is not None
        assert not environment._recorder._sessions


async def test_one_that_is_not_open_says_so(model: art.Model) -> None:
    environment = VerifiersEnvironment(replies())
    with pytest.raises(RuntimeError, match="async with environment"):
        await environment.rollout(model, next(environment.scenarios()))
    async with environment:
        pass
    with pytest.raises(RuntimeError, match="async with environment"):
        await environment.rollout(model, next(environment.scenarios()))
