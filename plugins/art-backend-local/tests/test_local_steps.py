"""Training steps of LocalBackend through its public names: trained, saved, verified, served; refused, cancelled.

On fake engines that are real processes.
"""

import asyncio
import inspect
import json

import pytest
from openai.types.chat.chat_completion import Choice

from art_backend_local import LocalBackend
from art_core import Backend, Trajectory, TrajectoryGroup, hookimpl, installed_plugins
from art_core.errors import (
    InvalidTrajectory,
    ModelBusy,
    NotRegistered,
    PublicationFailed,
    UnknownArgument,
    UnsupportedCapability,
)
from art_engine_kit import showing
from art_engine_kit.train_options import TrainOptions

MESSAGES = [{"role": "user", "content": "hello"}]


def test_train_shows_every_option_with_its_default():
    parameters = inspect.signature(LocalBackend.train).parameters
    options = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert options == {name: field.default for name, field in TrainOptions.model_fields.items()}


@pytest.mark.slow
async def test_a_step_is_trained_saved_verified_and_served(backend, policy, groups, client, recorder, checkpoints):
    assert isinstance(backend, Backend)
    registration = await backend.register(policy)
    asked = client(registration)
    assert await asked.served_by() == ("m@0", -1.0)
    assert (await backend.get_step(policy), backend.inference_name(policy)) == (0, "m@0")
    result = await backend.train(policy, groups, learning_rate=0.5)
    assert (result.step, result.metrics["loss/train"]) == (1, 0.5)
    assert result.checkpoint_path == str(checkpoints(backend) / "0001")
    assert await asked.served_by() == ("m@1", -1.5)
    assert await asked.served_by("m@0") == ("m@0", -1.0)
    assert (await backend.get_step(policy), backend.inference_name(policy)) == (1, "m@1")
    assert await backend.list_steps(policy) == [0, 1]
    hooks = ["before_train", "saved", "before_publish", "published", "after_train"]
    assert recorder.calls == [(hook, 1) for hook in hooks]
    assert recorder.gradient_steps == [(1, 1, 1, {"loss/train": 0.5}, ["before_train"])]
    assert not list((checkpoints(backend).parent / "jobs").iterdir())
    assert json.loads((checkpoints(backend).parent / "model.json").read_text())["base_model"] == policy.base_model


def sampled(*lengths):
    """A group whose trajectories have as many tokens, one of each sampled."""

    def choice(length):
        message = {"role": "assistant", "content": "a"}
        ids = {"prompt_token_ids": [1] * (length - 1), "token_ids": [7]}
        return Choice.model_validate({"finish_reason": "stop", "index": 0, "message": message, **ids})

    return TrajectoryGroup(
        [Trajectory(messages_and_choices=[choice(length)], reward=i) for i, length in enumerate(lengths)]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "config", "words"),
    [
        ({"packed_sequence_length": 3}, {}, "packed_sequence_length=3 leaves out every trajectory of the step"),
        ({}, {"trainer_args": {"max_seq_length": 5}}, "max_seq_length=5 leaves out every trajectory of the step"),
        ({"packed_sequence_length": 9}, {"init_args": {"max_seq_length": 8}}, "9 and max_seq_length 8: a packed row"),
    ],
)
async def test_a_limit_that_leaves_out_everything_is_refused_before_the_step(
    backend, make_policy, told, config, words, recorder
):
    policy = make_policy(config=config)
    await backend.register(policy)
    with pytest.raises(ValueError, match=words):
        await backend.train(policy, [sampled(40, 50), sampled(6)], **told)
    assert await backend.list_steps(policy) == [0]
    assert recorder.calls == []


@pytest.mark.slow
async def test_a_limit_that_leaves_out_some_is_warned_of_and_the_step_goes_on(backend, policy):
    await backend.register(policy)
    with pytest.warns(RuntimeWarning, match="2 of 3 trajectories are longer than packed_sequence_length=6 and"):
        result = await backend.train(policy, [sampled(40, 6, 50)], packed_sequence_length=6, learning_rate=0.5)
    assert result.step == 1


async def test_a_choice_carries_what_training_needs(backend, policy, client):
    asked = client(await backend.register(policy))
    choice = (await asked.chat.completions.create(model="m", messages=MESSAGES)).choices[0]
    assert (choice.token_ids, choice.prompt_token_ids, choice.policy_version) == ([7], [1, 2, 3], 0)


async def test_a_request_in_flight_stays_on_its_step(backend, policy, groups, client, fake_engines, said_by_engine):
    asked = client(await backend.register(policy))
    fake_engines(hold_answer=True)
    slow = asyncio.create_task(asked.chat.completions.create(model="m", messages=[{"role": "user", "content": "hold"}]))
    await said_by_engine(backend.path, "inference", f"holding {policy.project}/m@0")
    for _ in range(4):
        await backend.train(policy, groups, learning_rate=0.5)
    assert (await asked.served_by())[0] == "m@4"
    assert not slow.done()
    fake_engines()
    answer = await slow
    assert (answer.model, answer.choices[0].logprobs.content[0].logprob) == ("m@0", -1.0)


@pytest.mark.slow
async def test_whatever_waits_says_for_what(fake_engines, new_backend, tmp_path, policy, groups, capsys, monkeypatch):
    monkeypatch.setattr(showing, "PLAIN_EVERY_S", 0.02)
    said = ""

    async def hear(sentence):
        nonlocal said
        async with asyncio.timeout(60):
            while sentence not in said:
                await asyncio.sleep(0.02)
                said += capsys.readouterr().err

    backend = new_backend(tmp_path / "art", in_process=True, show_progress=True)
    await backend.register(policy)
    fake_engines(hold_train=True)
    step = asyncio.create_task(backend.train(policy, groups, learning_rate=0.5))
    await hear("train m: ")
    fake_engines(hold_load=True)
    await hear(f"Publishing {policy.project}/m step 1: ")
    fake_engines()
    await step
    await backend.close()
    said += capsys.readouterr().err
    assert f"Finding the host of {backend.path}: " in said or f"The host of {backend.path}: " in said
    assert f"Registering {policy.project}/m: " in said
    assert f"Closing: waiting for the host of {backend.path} to end: " in said


@pytest.mark.slow
async def test_an_engine_that_cannot_work_beside_training_waits(
    fake_engines, new_backend, tmp_path, policy, groups, client, said_by_engine
):
    async with new_backend(tmp_path / "shared", inference_engine="fake-shared") as backend:
        asked = client(await backend.register(policy))
        fake_engines(hold_train=True)
        step = asyncio.create_task(backend.train(policy, groups, learning_rate=0.5))
        await said_by_engine(backend.path, "training", f"job begun {policy.project}/m@1")
        answer = asyncio.create_task(asked.served_by())
        fake_engines()
        await step
        assert (await answer)[0] in ("m@0", "m@1")
        # Nothing was answered between the pause and the resumption.
        assert "paused\nresumed" in (backend.path / "logs/inference-fake-shared-base.log").read_text()
        assert await asked.served_by() == ("m@1", -1.5)


async def test_only_one_step_of_a_model_at_a_time(backend, policy, groups, fake_engines, said_by_engine):
    await backend.register(policy)
    fake_engines(hold_train=True)
    first = asyncio.create_task(backend.train(policy, groups))
    await said_by_engine(backend.path, "training", f"job begun {policy.project}/m@1")
    with pytest.raises(ModelBusy, match="this client"):
        await backend.train(policy, groups)
    fake_engines()
    assert (await first).step == 1


async def test_another_client_is_told_that_a_step_is_under_way_and_may_read_and_ask_meanwhile(
    backend, new_backend, policy, groups, client, fake_engines, said_by_engine
):
    await backend.register(policy)
    fake_engines(hold_train=True)
    first = asyncio.create_task(backend.train(policy, groups, learning_rate=0.5))
    await said_by_engine(backend.path, "training", f"job begun {policy.project}/m@1")
    async with new_backend(backend.path, in_process=False, max_adapters=300) as second:
        asked = client(await second.register(policy))
        with pytest.raises(ModelBusy, match="another client"):
            await second.train(policy, groups)
        assert (await second.get_step(policy), await second.list_steps(policy)) == (0, [0])
        assert await asked.served_by() == ("m@0", -1.0)
        fake_engines()
        assert (await first).step == 1
        assert (await second.train(policy, groups)).step == 2


async def test_a_cancelled_step_keeps_nothing(backend, policy, groups, fake_engines, recorder, said_by_engine):
    await backend.register(policy)
    fake_engines(hold_train=True)
    step = asyncio.create_task(backend.train(policy, groups))
    await said_by_engine(backend.path, "training", f"job begun {policy.project}/m@1")
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert recorder.calls[-1][0] == "train_failed"
    fake_engines()
    assert (await backend.train(policy, groups)).step == 1
    assert await backend.list_steps(policy) == [0, 1]


async def test_bad_input_is_refused_before_anything_happens(backend, policy, groups, recorder):
    with pytest.raises(NotRegistered):
        await backend.train(policy, groups)
    await backend.register(policy)
    with pytest.raises(UnknownArgument, match="'learning_rate'"):
        await backend.train(policy, groups, learnig_rate=1)
    with pytest.raises(ValueError, match="advantage_balance"):
        await backend.train(policy, groups, advantage_balance=2)
    with pytest.raises(InvalidTrajectory, match=r"\[0\].trajectories\[0\].reward is nan"):
        await backend.train(policy, [TrajectoryGroup([Trajectory(reward=float("nan"))])])
    assert recorder.calls == []
    with pytest.raises(UnsupportedCapability, match="kl_reference"):
        await backend.train(policy, groups, kl_penalty_coef=0.1)
    with pytest.raises(ValueError, match="kl_ref_adapter_path='/nowhere'"):
        await backend.train(policy, groups, kl_ref_adapter_path="/nowhere")
    with pytest.raises(ValueError, match="not both"):
        await backend.train(policy, groups, kl_ref_adapter_path="/nowhere", kl_penalty_reference_step=0)
    assert [hook for hook, _ in recorder.calls] == ["before_train", "train_failed"] * 2
    assert await backend.get_step(policy) == 0


async def test_a_step_with_nothing_to_train_on_carries_the_checkpoint(
    backend, policy, groups, client, fake_engines, checkpoints
):
    asked = client(await backend.register(policy))
    await backend.train(policy, groups, learning_rate=0.5)
    fake_engines(nothing_to_train=True)
    result = await backend.train(policy, groups)
    assert (result.step, result.metrics["data/step_num_gradient_steps"]) == (2, 0)
    assert await asked.served_by() == ("m@2", -1.5)
    first, second = (checkpoints(backend) / step for step in ("0001", "0002"))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("hook", ["before_train", "before_publish"])
async def test_a_plugin_may_refuse(backend, policy, groups, client, recorder, hook, checkpoints):
    asked = client(await backend.register(policy))
    recorder.refuse = hook
    with pytest.raises(RuntimeError, match="refused at"):
        await backend.train(policy, groups, learning_rate=0.5)
    recorder.refuse = ""
    names = [name for name, _ in recorder.calls]
    assert names[-1] == "train_failed"
    assert "published" not in names
    assert ("publish_failed" in names) == (hook == "before_publish")
    assert await asked.served_by() == ("m@0", -1.0)
    # What was refused is kept aside, and the next step starts from the one that is served.
    aside = list(checkpoints(backend).glob("0001.refused-*"))
    assert len(aside) == (hook == "before_publish")
    result = await backend.train(policy, groups, learning_rate=0.25)
    assert (result.step, await asked.served_by()) == (1, ("m@1", -1.25))


async def test_plugins_have_their_say_in_a_step_that_is_published_later(
    backend, policy, groups, client, fake_engines, recorder, checkpoints
):
    asked = client(await backend.register(policy))
    fake_engines(refuse_load=True)
    with pytest.raises(PublicationFailed):
        await backend.train(policy, groups, learning_rate=0.5)
    fake_engines()
    recorder.refuse = "before_publish"
    with pytest.warns(RuntimeWarning, match="step 1 was saved but not published.*refused at"):
        await backend.register(policy)
    assert await asked.served_by() == ("m@0", -1.0)
    assert len(list(checkpoints(backend).glob("0001.refused-*"))) == 1
    recorder.refuse = ""
    result = await backend.train(policy, groups, learning_rate=0.25)
    # The engine was asked to load m@1, so that name is not used for other weights.
    assert (result.step, await asked.served_by()) == (2, ("m@2", -1.25))


async def test_a_step_cancelled_while_its_plugins_decide_lets_the_next_one_begin(backend, policy, groups, recorder):
    await backend.register(policy)
    deciding = asyncio.Event()

    class Slow:
        art_api = 1

        @hookimpl
        async def art_before_publish_checkpoint(self):
            deciding.set()
            await asyncio.sleep(600)

    installed_plugins().register(Slow(), "slow")
    try:
        step = asyncio.create_task(backend.train(policy, groups))
        await deciding.wait()
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
    finally:
        installed_plugins().unregister("slow")
    assert await backend.get_step(policy) == 0
    assert [hook for hook, _ in recorder.calls[-2:]] == ["publish_failed", "train_failed"]
    result = await backend.train(policy, groups)
    assert (result.step, await backend.list_steps(policy)) == (1, [0, 1])


async def test_a_diverged_step_is_refused_and_the_old_one_stays(
    backend, policy, groups, client, fake_engines, recorder
):
    asked = client(await backend.register(policy))
    await backend.train(policy, groups, learning_rate=0.5)
    fake_engines(poison=True)
    with pytest.raises(PublicationFailed, match=r"lora_B.*not finite.*kept as") as failure:
        await backend.train(policy, groups)
    assert failure.value.stage == "check"
    assert recorder.calls[-2:] == [("publish_failed", 2), ("train_failed", 2)]
    assert await asked.served_by() == ("m@1", -1.5)
    fake_engines()
    result = await backend.train(policy, groups, learning_rate=0.5)
    assert (result.step, await asked.served_by()) == (2, ("m@2", -2.5))


async def test_an_engine_that_serves_the_old_weights_under_the_new_name_is_found_out(
    backend, policy, groups, client, fake_engines, checkpoints
):
    asked = client(await backend.register(policy))
    fake_engines(load_stale=str(checkpoints(backend) / "0000"))
    with pytest.raises(PublicationFailed, match="previous adapter") as failure:
        await backend.train(policy, groups, learning_rate=0.01)
    assert failure.value.stage == "verify"
    assert await asked.served_by() == ("m@0", -1.0)
    fake_engines()
    # The name m@1 stood for those weights in this engine, so the next step has another number.
    result = await backend.train(policy, groups, learning_rate=0.5)
    assert (result.step, await asked.served_by()) == (2, ("m@2", -1.5))


@pytest.mark.slow
async def test_an_engine_that_refuses_to_load_leaves_the_step_for_later(backend, policy, groups, client, fake_engines):
    asked = client(await backend.register(policy))
    fake_engines(refuse_load=True)
    with pytest.raises(PublicationFailed, match="ordered to refuse") as failure:
        await backend.train(policy, groups, learning_rate=0.5)
    assert failure.value.stage == "load"
    assert await asked.served_by() == ("m@0", -1.0)
    fake_engines()
    await backend.register(policy)
    assert await asked.served_by() == ("m@1", -1.5)
