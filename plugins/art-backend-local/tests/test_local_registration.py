"""Registering with LocalBackend: settings, base models and adapters to start from, the choice of engines, who may ask.

On fake engines that are real processes.
"""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
from openai import APIStatusError, NotFoundError
from safetensors.numpy import load_file, save_file

from art_backend_local.adapters.identity import write_identity_adapter
from art_core import BackendCapability, installed_plugins
from art_core.errors import (
    AdapterMismatch,
    BaseModelNotFound,
    CheckpointInUse,
    NotRegistered,
    PluginNotInstalled,
    PublicationFailed,
    UnknownArgument,
    UnsupportedCapability,
)
from art_engine_kit.lora_shape import LoraShape

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.slow
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
    assert await asked.served_by("one") == ("one@0", -1.0)
    assert await asked.served_by("two") == ("two@1", -1.25)
    assert len(list((backend.path / "logs").glob("inference-*"))) == 1


@pytest.mark.slow
async def test_more_models_than_places_take_turns(new_backend, make_policy, groups, client, tmp_path):
    """Twenty models in four places: whose name nobody asks for gives up its place, and gets one when it is asked."""
    async with new_backend(tmp_path / "art", max_adapters=4) as backend:
        models = [make_policy(f"m{i}") for i in range(20)]
        for model in models:
            asked = client(await backend.register(model))
        for i in (0, 19, 7, 0):
            assert await asked.served_by(f"m{i}") == (f"m{i}@0", -1.0)
        for step in (1, 2):
            assert (await backend.train(models[3], groups, learning_rate=0.25)).step == step
        assert await asked.served_by("m3") == ("m3@2", -1.75)
        at_once = await asyncio.gather(*(asked.served_by(f"m{i}") for i in range(20)))
        assert at_once == [(f"m{i}@2", -1.75) if i == 3 else (f"m{i}@0", -1.0) for i in range(20)]


@pytest.mark.slow
async def test_a_place_that_is_in_use_is_not_taken(new_backend, make_policy, groups, client, tmp_path):
    async with new_backend(tmp_path / "art", max_adapters=2) as backend:
        one, two, three = make_policy("one"), make_policy("two"), make_policy("three")
        await backend.register(one)
        await backend.register(two)
        async with backend.lease(one, 0), backend.lease(two, 0):
            with pytest.raises(PublicationFailed, match="all 2 places are taken") as refusal:
                await backend.register(three)
            assert "served before is still served" not in str(refusal.value)
        asked = client(await backend.register(three))
        assert await asked.served_by("three") == ("three@0", -1.0)
        assert await asked.served_by("one") == ("one@0", -1.0)


async def test_an_unregistered_model_is_served_no_more_and_can_come_back(backend, make_policy, groups, client):
    policy = make_policy("leaver")
    asked = client(await backend.register(policy))
    await backend.train(policy, groups, learning_rate=0.25)
    async with backend.lease(policy, 0):
        with pytest.raises(CheckpointInUse, match="stays registered: a step of it is leased"):
            await backend.unregister(policy)
    await backend.unregister(policy)
    with pytest.raises(NotFoundError):
        await asked.served_by("leaver")
    with pytest.raises(NotRegistered):
        await backend.get_step(policy)
    await backend.register(policy)
    assert await asked.served_by("leaver") == ("leaver@1", -1.25)


async def test_an_unknown_name_or_step_is_a_404_that_lists_what_there_is(backend, policy, client):
    asked = client(await backend.register(policy))
    for name in ("nobody", "m@5"):
        with pytest.raises(NotFoundError, match="m@0"):
            await asked.chat.completions.create(model=name, messages=MESSAGES)


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
    assert await asked.served_by() == ("m@0", -1.75)
    await backend.train(make_policy(base_model=adapter), groups, learning_rate=0.5)
    assert (await asked.served_by())[0] == "m@1"


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


@pytest.mark.slow
async def test_without_a_training_engine_models_are_served_and_training_names_the_pip_line(
    fake_engines, new_backend, policy, groups, client, tmp_path, monkeypatch
):
    registry = installed_plugins()
    provided = registry.provided
    monkeypatch.setattr(registry, "provided", lambda kind: [] if kind == "training engine" else provided(kind))
    async with new_backend(tmp_path / "a", training_engine=None) as backend:
        asked = client(await backend.register(policy))
        assert await asked.served_by() == ("m@0", -1.0)
        with pytest.raises(PluginNotInstalled, match="pip install art-engine-unsloth"):
            await backend.train(policy, groups)


@pytest.mark.slow
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


@pytest.mark.slow
async def test_sampling_before_registration_is_over_or_without_the_key_is_refused(backend, policy, client):
    registration = await backend.register(policy)
    bad = SimpleNamespace(inference_base_url=registration.inference_base_url, inference_api_key="wrong")
    with pytest.raises(APIStatusError, match="key"):
        await client(bad).served_by()
