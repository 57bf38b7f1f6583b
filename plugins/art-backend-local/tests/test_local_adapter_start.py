"""Models that start from an adapter of the user's, and adapters that are served in another form than they are kept."""

import asyncio
import contextlib
import json
import os
import pickle
import warnings
import zipfile

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from art_backend_local.adapters.copies import copy_adapter
from art_backend_local.wire.host_files import read_host
from art_conformance.tiny_model import HIDDEN
from art_core.errors import AdapterMismatch
from art_engine_kit.adapter_config import AdapterConfig
from art_engine_kit.adapter_files import read_adapter, write_adapter
from art_engine_kit.base_shapes import linear_shapes

MESSAGES = [{"role": "user", "content": "hello"}]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def make_adapter(base, tmp_path):
    """Write an adapter of small whole numbers, whose sum the fake engine can be held to, and give its folder."""

    def make(folder="adapter", **settings):
        given = {"r": 2, "lora_alpha": 2, "target_modules": SEVEN, "base_model_name_or_path": str(base), **settings}
        config, shapes = AdapterConfig(**given), linear_shapes(base)
        pairs = {
            module: (
                np.ones((config.rank(module), shapes[module][1]), np.float32),
                np.full((shapes[module][0], config.rank(module)), 2.0**-9, np.float32),
            )
            for module in config.modules(shapes)
        }
        (tmp_path / folder).mkdir()
        write_adapter(tmp_path / folder, config, pairs)
        return tmp_path / folder

    return make


def edit(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def as_torch_file(folder):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(value) for name, value in load_file(folder / WEIGHTS).items()}
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def handed_over(folder):
    """The logprob by which the fake engine answers as the adapter that PEFT would compute: scales multiplied into B."""
    adapter = read_adapter(folder)
    return -1.0 - sum(
        float(pair.b.float32().sum()) * adapter.config.scaling(module) for module, pair in adapter.pairs.items()
    )


async def served_by(client, name="m"):
    answer = await client.chat.completions.create(model=name, messages=MESSAGES)
    return answer.model, pytest.approx(answer.choices[0].logprobs.content[0].logprob, abs=1e-5)


# what is taken


@pytest.mark.slow
async def test_an_ordinary_adapter_with_dropout_starts_a_model_and_says_so(
    backend, make_policy, make_adapter, groups, client, checkpoints
):
    policy = make_policy(base_model=edit(make_adapter(), lora_dropout=0.05))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        asked = client(await backend.register(policy))
        async with asyncio.timeout(10):
            while not (said := [str(w.message) for w in warned if "lora_dropout" in str(w.message)]):
                await asyncio.sleep(0.02)
    assert "was trained with lora_dropout=0.05, which is taken as 0" in said[0]
    assert "Step 0 says 0.0" in said[0]
    assert json.loads((checkpoints(backend) / "0000" / CONFIG).read_text())["lora_dropout"] == 0.0
    assert (await backend.train(policy, groups, learning_rate=0.5)).step == 1
    assert (await served_by(asked))[0] == "m@1"


async def test_torchs_older_file_starts_the_same_model_as_safetensors(
    backend, make_policy, make_adapter, groups, client, checkpoints
):
    new, old = make_adapter("new"), as_torch_file(make_adapter("old"))
    first, second = make_policy("new", base_model=new), make_policy("old", base_model=old)
    asked = client(await backend.register(first))
    await backend.register(second)
    assert (await served_by(asked, "new"))[1] == (await served_by(asked, "old"))[1]
    start = checkpoints(backend, "old") / "0000"
    assert not (start / "adapter_model.bin").exists()
    made, given = load_file(start / WEIGHTS), load_file(new / WEIGHTS)
    assert made.keys() == given.keys()
    assert all(np.array_equal(made[name], given[name]) for name in given)
    assert (await backend.train(second, groups, learning_rate=0.5)).step == 1


async def test_newer_numbers_than_numpy_knows_become_step_0(backend, make_policy, make_adapter, checkpoints):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder = make_adapter()
    tensors = {name: torch.from_numpy(value).bfloat16() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    await backend.register(make_policy(base_model=folder))
    made = load_file(checkpoints(backend) / "0000" / WEIGHTS)
    assert all(np.array_equal(made[name], tensor.float().numpy()) for name, tensor in tensors.items())


# what is refused, before anything is started or written


class Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


async def test_a_hostile_file_of_weights_is_refused_and_runs_nothing(
    backend, make_policy, make_adapter, checkpoints, tmp_path
):
    folder = make_adapter()
    (folder / WEIGHTS).unlink()
    with zipfile.ZipFile(folder / "adapter_model.bin", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Runs(f"touch {tmp_path / 'it-ran'}")))
    with pytest.raises(AdapterMismatch, match=r"adapter_model\.bin asks for \S+\.system, .* could run code"):
        await backend.register(make_policy(base_model=folder))
    assert not (tmp_path / "it-ran").exists()
    assert not checkpoints(backend).exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "says use_dora=True, which is refused. .*merge_and_unload"),
        ({"modules_to_save": ["lm_head"]}, r"says modules_to_save=\['lm_head'\]"),
        ({"bias": "all"}, "says bias='all'"),
        ({"init_lora_weights": "pissa"}, "says init_lora_weights='pissa'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "says target_parameters"),
        ({"rank_pattern": {"q_proj": 3}}, rf"q_proj\.lora_A has shape \[2, {HIDDEN}\] where \[3, {HIDDEN}\] is needed"),
        ({"target_modules": ["q_proj"]}, "which the target_modules of its config do not name"),
        ({"layers_to_transform": [0]}, "which the target_modules of its config do not name"),
    ],
)
async def test_an_adapter_that_cannot_be_served_and_trained_is_refused_at_register(
    backend, make_policy, make_adapter, checkpoints, changes, says
):
    with pytest.raises(AdapterMismatch, match=says):
        await backend.register(make_policy(base_model=edit(make_adapter(), **changes)))
    assert not checkpoints(backend).exists()


ANOTHER_SHAPE = [{"r": 4}, {"lora_alpha": 4}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}]


@pytest.mark.parametrize("peft_args", ANOTHER_SHAPE, ids=lambda args: next(iter(args)))
async def test_another_shape_than_the_adapter_has_is_refused_at_register(
    backend, make_policy, make_adapter, checkpoints, peft_args
):
    adapter = make_adapter()
    with pytest.raises(AdapterMismatch, match=rf"asks for {next(iter(peft_args))}=.*{adapter} was made with"):
        await backend.register(make_policy(base_model=adapter, config={"peft_args": peft_args}))
    assert not checkpoints(backend).exists()


@pytest.mark.slow
@pytest.mark.parametrize("peft_args", ANOTHER_SHAPE, ids=lambda args: next(iter(args)))
async def test_another_shape_than_the_latest_checkpoint_has_is_refused_at_register(
    fake_engines, new_backend, make_policy, groups, tmp_path, checkpoints, peft_args
):
    policy, other = make_policy(), make_policy(config={"peft_args": peft_args})
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        await backend.train(policy, groups, learning_rate=0.5)
        with pytest.raises(
            AdapterMismatch, match=rf"asks for {next(iter(peft_args))}=.*checkpoints/0001 was made with"
        ):
            await backend.register(other)
    async with new_backend(tmp_path / "art") as backend:
        with pytest.raises(
            AdapterMismatch, match=rf"asks for {next(iter(peft_args))}=.*checkpoints/0001 was made with"
        ):
            await backend.register(other)
        same = {"r": 8, "lora_alpha": 16, "use_rslora": False, "target_modules": "all-linear"}
        await backend.register(make_policy(config={"peft_args": same}))
        assert (await backend.train(policy, groups, learning_rate=0.5)).step == 2


# what servers are handed


@pytest.mark.slow
async def test_an_adapter_with_scales_of_its_own_is_handed_over_as_peft_computes_it(
    backend, make_policy, make_adapter, client, checkpoints
):
    settings = {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 7.0}}
    asked = client(await backend.register(make_policy(base_model=make_adapter(r=3, **settings))))
    start = checkpoints(backend) / "0000"
    kept = json.loads((start / CONFIG).read_text())
    assert {name: kept[name] for name in settings} == settings
    assert await served_by(asked) == ("m@0", handed_over(start))
    plain = -1.0 - sum(float(pair.b.float32().sum()) for pair in read_adapter(start).pairs.values())
    assert abs(plain - handed_over(start)) > 0.1, "the weights alone would answer alike"


def kill_servers(host):
    for child in host.children(recursive=True):
        # Some end on their own between being listed and being looked at.
        with contextlib.suppress(psutil.Error):
            if "art_fake_engine.inference_server" in child.cmdline():
                child.kill()


@pytest.mark.slow
async def test_the_handed_copies_are_there_for_as_long_as_a_server_holds_them(
    fake_engines, new_backend, make_policy, groups, client, checkpoints, tmp_path
):
    policy = make_policy(config={"peft_args": {"use_rslora": True, "r": 16}})
    async with new_backend(tmp_path / "art") as backend:
        asked = client(await backend.register(policy))
        served = checkpoints(backend).parent / "served"
        config = json.loads((served / "0000" / CONFIG).read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, 64.0, False)
        for step in range(1, 6):
            await backend.train(policy, groups, learning_rate=0.5)
            assert (await served_by(asked))[0] == f"m@{step}"
        async with asyncio.timeout(10):
            # The routed step, and the newest idle ones.
            while sorted(folder.name for folder in served.iterdir()) != ["0003", "0004", "0005"]:
                await asyncio.sleep(0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kill_servers(psutil.Process(read_host(backend.path).pid))
            # It is loaded again from its copy.
            assert (await served_by(asked.with_options(max_retries=6)))[0] == "m@5"
    async with new_backend(tmp_path / "art") as backend:
        asked = client(await backend.register(policy))
        assert (await served_by(asked))[0] == "m@5"
        assert [folder.name for folder in served.iterdir()] == ["0005"]


async def test_a_plain_adapter_is_handed_over_itself(backend, policy, groups, checkpoints):
    await backend.register(policy)
    await backend.train(policy, groups, learning_rate=0.5)
    assert not (checkpoints(backend).parent / "served").exists()


@pytest.mark.slow
def test_an_adapter_is_copied_out_with_whichever_file_it_has(make_adapter, tmp_path):
    old = as_torch_file(make_adapter("old"))
    for folder, name in ((make_adapter("new"), WEIGHTS), (old, "adapter_model.bin")):
        copied = copy_adapter(folder, tmp_path / f"copy of {folder.name}")
        assert sorted(file.name for file in copied.iterdir()) == sorted([CONFIG, name])
        assert (copied / name).read_bytes() == (folder / name).read_bytes()
