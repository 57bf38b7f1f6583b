"""LocalBackend through its public names, on fake engines that are real processes."""

import asyncio
import inspect
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from openai import APIStatusError, NotFoundError
from safetensors.numpy import load_file, save_file

from art_backend_local import LocalBackend
from art_backend_local.adapters.identity import write_identity_adapter
from art_backend_local.wire.lora_shape import LoraShape
from art_core import Backend, BackendCapability, Trajectory, TrajectoryGroup, hookimpl, installed_plugins
from art_core.errors import (
    AdapterMismatch,
    BaseModelNotFound,
    CheckpointError,
    CheckpointInUse,
    CheckpointNotFound,
    InvalidTrajectory,
    ModelBusy,
    NotRegistered,
    PluginNotInstalled,
    PublicationFailed,
    UnknownArgument,
    UnsupportedCapability,
)
from art_engine_kit.checkpoint_folder import read_manifest
from art_engine_kit.train_options import TrainOptions

MESSAGES = [{"role": "user", "content": "hello"}]


class Recorder:
    """A plugin that writes down which hooks were called; `refuse` names one that raises."""

    art_api = 1

    def __init__(self):
        self.calls, self.refuse = [], ""

    def note(self, hook, what=None):
        self.calls.append((hook, what))
        if hook == self.refuse:
            raise RuntimeError(f"refused at {hook}")

    @hookimpl
    def art_before_train(self, step):
        self.note("before_train", step)

    @hookimpl
    def art_before_publish_checkpoint(self, checkpoint):
        self.note("before_publish", checkpoint.step)

    @hookimpl
    def art_checkpoint_saved(self, checkpoint):
        assert read_manifest(checkpoint.path).step == checkpoint.step
        self.note("saved", checkpoint.step)

    @hookimpl
    def art_checkpoint_published(self, checkpoint, receipt):
        assert set(receipt.seconds) == {"checked", "loaded", "verified", "routed"}
        self.note("published", checkpoint.step)

    @hookimpl
    def art_checkpoint_publish_failed(self, checkpoint, error):
        assert read_manifest(checkpoint.path).step == checkpoint.step
        self.note("publish_failed", checkpoint.step)

    @hookimpl
    def art_after_train(self, result):
        self.note("after_train", result.step)

    @hookimpl
    def art_train_failed(self, step, error):
        self.note("train_failed", step)

    @hookimpl
    def art_checkpoint_deleted(self, checkpoint):
        assert not checkpoint.path.exists()
        self.note("deleted", checkpoint.step)


@pytest.fixture
def recorder(fake_engines):
    plugin = Recorder()
    installed_plugins().register(plugin, "recorder")
    yield plugin
    installed_plugins().unregister("recorder")


async def served_by(client, name="m"):
    """Which step answers, and the logprob by which its weights are known."""
    answer = await client.chat.completions.create(model=name, messages=MESSAGES)
    return answer.model, round(answer.choices[0].logprobs.content[0].logprob, 6)


def test_train_shows_every_option_with_its_default():
    parameters = inspect.signature(LocalBackend.train).parameters
    options = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert options == {name: field.default for name, field in TrainOptions.model_fields.items()}


async def test_a_step_is_trained_saved_verified_and_served(backend, policy, groups, client, recorder, checkpoints):
    assert isinstance(backend, Backend)
    registration = await backend.register(policy)
    asked = client(registration)
    assert await served_by(asked) == ("m@0", -1.0)
    assert (await backend.get_step(policy), backend.inference_name(policy)) == (0, "m@0")
    result = await backend.train(policy, groups, learning_rate=0.5)
    assert (result.step, result.metrics["loss/train"]) == (1, 0.5)
    assert result.checkpoint_path == str(checkpoints(backend) / "0001")
    assert await served_by(asked) == ("m@1", -1.5)
    assert await served_by(asked, "m@0") == ("m@0", -1.0)
    assert (await backend.get_step(policy), backend.inference_name(policy)) == (1, "m@1")
    assert await backend.list_steps(policy) == [0, 1]
    hooks = ["before_train", "saved", "before_publish", "published", "after_train"]
    assert recorder.calls == [(hook, 1) for hook in hooks]
    assert not list((checkpoints(backend).parent / "jobs").iterdir())
    assert json.loads((checkpoints(backend).parent / "model.json").read_text())["base_model"] == policy.base_model


async def test_a_choice_carries_what_training_needs(backend, policy, client):
    asked = client(await backend.register(policy))
    choice = (await asked.chat.completions.create(model="m", messages=MESSAGES)).choices[0]
    assert (choice.token_ids, choice.prompt_token_ids, choice.policy_version) == ([7], [1, 2, 3], 0)


async def test_registering_again_changes_nothing_and_another_client_setting_is_refused(backend, policy, make_policy):
    first = await backend.register(policy)
    assert await backend.register(policy) == first
    with pytest.raises(ValueError, match="another inference settings"):
        await backend.register(make_policy(config={"engine_args": {"max_model_len": 64}}))


async def test_two_models_share_one_engine(backend, make_policy, groups, client):
    one, two = make_policy("one"), make_policy("two")
    await asyncio.gather(backend.register(one), backend.register(two))
    asked = client(await backend.register(one))
    await backend.train(two, groups, learning_rate=0.25)
    assert await served_by(asked, "one") == ("one@0", -1.0)
    assert await served_by(asked, "two") == ("two@1", -1.25)
    assert len(list((backend.path / "logs").glob("inference-*"))) == 1


async def test_an_unknown_name_or_step_is_a_404_that_lists_what_there_is(backend, policy, client):
    asked = client(await backend.register(policy))
    for name in ("nobody", "m@5"):
        with pytest.raises(NotFoundError, match="m@0"):
            await asked.chat.completions.create(model=name, messages=MESSAGES)


async def test_a_step_that_is_only_on_disk_is_loaded_when_asked_for(backend, policy, groups, client):
    asked = client(await backend.register(policy))
    for _ in range(5):
        await backend.train(policy, groups, learning_rate=0.5)
    for _ in range(50):
        if 1 not in (await backend._steps(policy))["loaded"]:
            break
        await asyncio.sleep(0.1)
    else:
        pytest.fail("step 1 stays loaded though nobody uses it")
    assert await served_by(asked, "m@1") == ("m@1", -1.5)
    assert (await served_by(asked))[0] == "m@5"


async def test_a_request_in_flight_stays_on_its_step(backend, policy, groups, client):
    asked = client(await backend.register(policy))
    slow = asyncio.create_task(
        asked.chat.completions.create(model="m", messages=[{"role": "user", "content": "sleep 1.5"}])
    )
    await asyncio.sleep(0.2)
    for _ in range(4):
        await backend.train(policy, groups, learning_rate=0.5)
    assert (await served_by(asked))[0] == "m@4"
    answer = await slow
    assert (answer.model, answer.choices[0].logprobs.content[0].logprob) == ("m@0", -1.0)


async def test_old_steps_are_unloaded_once_nobody_uses_them(backend, policy, groups, client):
    asked = client(await backend.register(policy))
    for _ in range(6):
        await backend.train(policy, groups)
        await served_by(asked)
    for _ in range(50):
        loaded = (await backend._steps(policy))["loaded"]
        if len(loaded) <= 3:
            break
        await asyncio.sleep(0.1)
    assert loaded == [4, 5, 6]


async def test_a_leased_step_stays_and_cannot_be_deleted(backend, policy, groups, client, recorder, checkpoints):
    asked = client(await backend.register(policy))
    async with backend.lease(policy) as name:
        assert name == "m@0"
        for _ in range(5):
            await backend.train(policy, groups, learning_rate=0.5)
            await served_by(asked)
        assert await served_by(asked, name) == ("m@0", -1.0)
        with pytest.raises(CheckpointInUse, match="0"):
            await backend.delete_checkpoints(policy, [0, 1])
        with pytest.raises(CheckpointInUse):
            await backend.delete_checkpoints(policy, [5])
        assert await backend.list_steps(policy) == [0, 1, 2, 3, 4, 5]
    assert await backend.delete_checkpoints(policy, [0, 1, 4, 77]) == [0, 1, 4]
    assert await backend.list_steps(policy) == [2, 3, 5]
    assert [call for call in recorder.calls if call[0] == "deleted"] == [("deleted", s) for s in (0, 1, 4)]
    with pytest.raises(NotFoundError):
        await asked.chat.completions.create(model="m@1", messages=MESSAGES)
    with pytest.raises(CheckpointNotFound, match="2, 3, 5"):
        async with backend.lease(policy, 4):
            pass


async def test_the_engine_being_full_of_leased_steps_is_an_error_that_says_so(
    fake_engines, new_backend, policy, groups, tmp_path
):
    async with new_backend(tmp_path / "full", max_adapters=2) as backend:
        await backend.register(policy)
        async with backend.lease(policy, 0):
            await backend.train(policy, groups)
            with pytest.raises(PublicationFailed, match="all 2 places are taken"):
                await backend.train(policy, groups)
            assert await backend.get_step(policy) == 1
        # The step is on disk; it is published before the next one is trained.
        result = await backend.train(policy, groups)
        assert (result.step, await backend.list_steps(policy)) == (3, [0, 1, 2, 3])


async def test_a_step_with_nothing_to_train_on_carries_the_checkpoint(
    backend, policy, groups, client, fake_engines, checkpoints
):
    asked = client(await backend.register(policy))
    await backend.train(policy, groups, learning_rate=0.5)
    fake_engines(nothing_to_train=True)
    result = await backend.train(policy, groups)
    assert (result.step, result.metrics["data/step_num_gradient_steps"]) == (2, 0)
    assert await served_by(asked) == ("m@2", -1.5)
    first, second = (checkpoints(backend) / step for step in ("0001", "0002"))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


async def test_a_step_that_is_not_to_be_kept_goes_when_the_next_is_served(backend, policy, groups, recorder):
    await backend.register(policy)
    result = await backend.train(policy, groups, save_checkpoint=False)
    assert result.checkpoint_path is None
    assert await backend.list_steps(policy) == [0, 1]
    await backend.train(policy, groups)
    assert await backend.list_steps(policy) == [0, 2]
    assert ("deleted", 1) in recorder.calls


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


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"engine_arg": {}}, "engine_args"),
        ({"peft_args": {"rank": 1}}, "rank"),
        ({"trainer_gpu_ids": [0]}, "inference_gpu_ids is missing"),
        ({"trainer_gpu_ids": [0], "inference_gpu_ids": [0]}, "disjoint"),
        ({"trainer_gpu_ids": [], "inference_gpu_ids": [0]}, "at least one"),
        ({"rollout_weights_mode": "merged"}, "dedicated"),
        ({"trainer_gpu_ids": [0], "inference_gpu_ids": [1], "rollout_weights_mode": "merged"}, "merged"),
        ({"chat_template": "x", "chat_template_path": "y"}, "not both"),
        ({"chat_template_path": "/nowhere/template.jinja"}, "cannot be read"),
        ({"trainer_gpu_ids": [100], "inference_gpu_ids": [101]}, "not on this machine"),
        ({"engine_args": {"no_such": 1}}, "no_such"),
    ],
)
async def test_settings_that_cannot_work_are_refused(backend, make_policy, config, error):
    with pytest.raises((UnknownArgument, ValueError, UnsupportedCapability), match=error):
        await backend.register(make_policy(config=config))


async def test_capabilities_depend_on_the_engine_and_the_models_devices(
    fake_engines, new_backend, tmp_path, make_policy, backend
):
    shared = new_backend(tmp_path / "s", inference_engine="fake-shared")
    concurrent = BackendCapability.CONCURRENT_INFERENCE
    assert concurrent in backend.capabilities
    assert concurrent not in shared.capabilities
    dedicated = make_policy(config={"trainer_gpu_ids": [0], "inference_gpu_ids": [1]})
    assert concurrent in shared.capabilities_for(dedicated)
    assert concurrent not in shared.capabilities_for(make_policy())


async def test_an_engine_that_cannot_work_beside_training_waits(
    fake_engines, new_backend, tmp_path, policy, groups, client
):
    async with new_backend(tmp_path / "shared", inference_engine="fake-shared") as backend:
        asked = client(await backend.register(policy))
        fake_engines(slow_train=1.0)
        step = asyncio.create_task(backend.train(policy, groups, learning_rate=0.5))
        log = tmp_path / "shared/logs/inference-fake-shared-base.log"
        async with asyncio.timeout(30):
            while "paused" not in log.read_text():
                await asyncio.sleep(0.02)
        answer = asyncio.create_task(served_by(asked))
        await step
        assert (await answer)[0] in ("m@0", "m@1")
        # Nothing was answered between the pause and the resumption.
        assert "paused\nresumed" in log.read_text()
        assert await served_by(asked) == ("m@1", -1.5)


async def test_only_one_step_of_a_model_at_a_time(backend, policy, groups, fake_engines):
    await backend.register(policy)
    fake_engines(slow_train=1.0)
    first = asyncio.create_task(backend.train(policy, groups))
    await asyncio.sleep(0.3)
    with pytest.raises(ModelBusy, match="this client"):
        await backend.train(policy, groups)
    assert (await first).step == 1


async def test_a_cancelled_step_keeps_nothing(backend, policy, groups, fake_engines, recorder):
    await backend.register(policy)
    fake_engines(slow_train=30)
    step = asyncio.create_task(backend.train(policy, groups))
    await asyncio.sleep(0.5)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert recorder.calls[-1][0] == "train_failed"
    fake_engines()
    assert (await backend.train(policy, groups)).step == 1
    assert await backend.list_steps(policy) == [0, 1]


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
    assert await served_by(asked) == ("m@0", -1.0)
    # What was refused is kept aside, and the next step starts from the one that is served.
    aside = list(checkpoints(backend).glob("0001.refused-*"))
    assert len(aside) == (hook == "before_publish")
    result = await backend.train(policy, groups, learning_rate=0.25)
    assert (result.step, await served_by(asked)) == (1, ("m@1", -1.25))


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
    assert await served_by(asked) == ("m@0", -1.0)
    assert len(list(checkpoints(backend).glob("0001.refused-*"))) == 1
    recorder.refuse = ""
    result = await backend.train(policy, groups, learning_rate=0.25)
    # The engine was asked to load m@1, so that name is not used for other weights.
    assert (result.step, await served_by(asked)) == (2, ("m@2", -1.25))


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
    assert await served_by(asked) == ("m@1", -1.5)
    fake_engines()
    result = await backend.train(policy, groups, learning_rate=0.5)
    assert (result.step, await served_by(asked)) == (2, ("m@2", -2.5))


async def test_an_engine_that_serves_the_old_weights_under_the_new_name_is_found_out(
    backend, policy, groups, client, fake_engines, checkpoints
):
    asked = client(await backend.register(policy))
    fake_engines(load_stale=str(checkpoints(backend) / "0000"))
    with pytest.raises(PublicationFailed, match="previous adapter") as failure:
        await backend.train(policy, groups, learning_rate=0.01)
    assert failure.value.stage == "verify"
    assert await served_by(asked) == ("m@0", -1.0)
    fake_engines()
    # The name m@1 stood for those weights in this engine, so the next step has another number.
    result = await backend.train(policy, groups, learning_rate=0.5)
    assert (result.step, await served_by(asked)) == (2, ("m@2", -1.5))


async def test_an_engine_that_refuses_to_load_leaves_the_step_for_later(backend, policy, groups, client, fake_engines):
    asked = client(await backend.register(policy))
    fake_engines(refuse_load=True)
    with pytest.raises(PublicationFailed, match="ordered to refuse") as failure:
        await backend.train(policy, groups, learning_rate=0.5)
    assert failure.value.stage == "load"
    assert await served_by(asked) == ("m@0", -1.0)
    fake_engines()
    await backend.register(policy)
    assert await served_by(asked) == ("m@1", -1.5)


async def test_fork_brings_the_optimizer_and_pull_gives_a_peft_folder(backend, make_policy, groups, client, tmp_path):
    old, new = make_policy("old"), make_policy("new")
    await backend.register(old)
    for _ in range(3):
        await backend.train(old, groups, learning_rate=1.0)
    with pytest.raises(CheckpointNotFound, match="nobody"):
        await backend.fork_checkpoint(new, "nobody")
    assert await backend._experimental_fork_checkpoint(new, "old", not_after_step=2) == 2
    asked = client(await backend.register(new))
    # Steps of 1, 2 and, with the optimizer's counter at 2, another 3.
    assert await served_by(asked, "new") == ("new@2", -4.0)
    await backend.train(new, groups, learning_rate=1.0)
    assert await served_by(asked, "new") == ("new@3", -7.0)
    with pytest.raises(CheckpointError, match="already"):
        await backend.fork_checkpoint(new, "old")
    pulled = await backend.pull_checkpoint(new, step="latest", local_path=tmp_path / "out" / "adapter")
    assert sorted(file.name for file in pulled.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (await backend._experimental_pull_model_checkpoint(new)).name == "0003"
    with pytest.raises(FileExistsError):
        await backend.pull_checkpoint(new, local_path=pulled)
    with pytest.raises(CheckpointNotFound, match="2, 3"):
        await backend.pull_checkpoint(new, step=9)


async def test_a_forked_step_is_served_at_once_by_a_registered_model(backend, make_policy, groups, client):
    old, new = make_policy("old"), make_policy("new")
    asked = client(await backend.register(old))
    await backend.register(new)
    await backend.train(old, groups, learning_rate=1.0)
    assert await backend.fork_checkpoint(new, "old") == 1
    assert await served_by(asked, "new") == ("new@1", -2.0)
    assert backend.inference_name(new) == "new@1"


@pytest.fixture
def adapter(base, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_identity_adapter(folder, base, LoraShape(r=32))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = 0.75
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


async def test_warm_start_from_an_adapter_folder(backend, make_policy, groups, client, adapter):
    asked = client(await backend.register(make_policy(base_model=adapter)))
    assert await served_by(asked) == ("m@0", -1.75)
    await backend.train(make_policy(base_model=adapter), groups, learning_rate=0.5)
    assert (await served_by(asked))[0] == "m@1"


async def test_an_adapter_that_does_not_fit_its_base_is_refused(backend, make_policy, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: np.zeros((32, 5), np.float32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch, match=r"lora_A has shape \[32, 5\]"):
        await backend.register(make_policy(base_model=adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere"}))
    with pytest.raises(BaseModelNotFound, match="/nowhere"):
        await backend.register(make_policy(base_model=adapter))


async def test_a_base_model_that_is_not_there(backend, make_policy):
    with pytest.raises(BaseModelNotFound, match="no-such-model"):
        await backend.register(make_policy(base_model="no-such-model"))


async def test_without_a_training_engine_models_are_served_and_training_names_the_pip_line(
    fake_engines, new_backend, policy, groups, client, tmp_path, monkeypatch
):
    registry = installed_plugins()
    provided = registry.provided
    monkeypatch.setattr(registry, "provided", lambda kind: [] if kind == "training engine" else provided(kind))
    async with new_backend(tmp_path / "a", training_engine=None) as backend:
        asked = client(await backend.register(policy))
        assert await served_by(asked) == ("m@0", -1.0)
        with pytest.raises(PluginNotInstalled, match="pip install art-engine-unsloth"):
            await backend.train(policy, groups)


async def test_engines_are_chosen_from_what_is_installed_and_said_once(
    fake_engines, new_backend, policy, make_policy, tmp_path, capsys, monkeypatch
):
    registry = installed_plugins()
    names = {"inference engine": ["fake", "fake-shared"], "training engine": ["fake"]}
    monkeypatch.setattr(registry, "provided", lambda kind: names[kind])
    unchosen = {"inference_engine": None, "training_engine": None, "show_progress": True}
    async with new_backend(tmp_path / "a", **unchosen) as backend:
        await backend.register(policy)
        await backend.register(make_policy("other"))
    said = capsys.readouterr().err
    reason = "there is no GPU, and of fake, fake-shared it runs in this environment"
    assert said.count(f"LocalBackend uses inference engine fake ({reason})") == 1
    assert "training engine fake (the only one installed)" in said
    with pytest.raises(PluginNotInstalled, match="fakes"):
        new_backend(tmp_path / "b", inference_engine="fakes")


async def test_a_corrupt_checkpoint_is_named_and_the_last_good_one_used(
    policy, groups, client, fake_engines, new_backend, tmp_path, checkpoints
):
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        for _ in range(3):
            await backend.train(policy, groups, learning_rate=0.5)
    there = checkpoints(backend)
    with (there / "0003/adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    content = bytearray((there / "0002/adapter_model.safetensors").read_bytes())
    content[-1] ^= 0xFF
    (there / "0002/adapter_model.safetensors").write_bytes(content)
    async with new_backend(backend.path) as again:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            asked = client(await again.register(policy))
            await asyncio.sleep(0.1)
        assert await served_by(asked) == ("m@1", -1.5)
        said = " ".join(str(w.message) for w in warned)
        assert "0003 is not a whole checkpoint" in said
        assert "m@2 was not published" in said
        result = await again.train(policy, groups, learning_rate=0.5)
        assert (result.step, await served_by(asked)) == (2, ("m@2", -2.5))
        assert (there / "0003").exists()


async def test_sampling_before_registration_is_over_or_without_the_key_is_refused(backend, policy, client):
    registration = await backend.register(policy)
    bad = SimpleNamespace(inference_base_url=registration.inference_base_url, inference_api_key="wrong")
    with pytest.raises(APIStatusError, match="key"):
        await served_by(client(bad))
