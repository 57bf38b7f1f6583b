"""A base model without torch, and a backend on the fake engines."""

import json
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from safetensors.numpy import save_file

from art_core import Trajectory, TrajectoryGroup, installed_plugins

FAKE_PLUGIN = Path(__file__).parent / "fake_plugin"
HIDDEN, WIDE = 8, 12


class Policy:
    """The least that a backend may know of a model."""

    def __init__(self, name="m", *, base_model, project="p", config=None):
        self.name, self.project, self.entity, self.base_model = name, project, None, str(base_model)
        self.internal_config = config or {}


def write_base(folder, *, layers=2, shards=1):
    """A base model folder: the config and two-dimensional weights of a Llama shape."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = {"model.embed_tokens.weight": np.zeros((16, HIDDEN), np.float32)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}.self_attn.{module}.weight"] = np.zeros((HIDDEN, HIDDEN), np.float32)
        for module in ("gate_proj", "up_proj"):
            tensors[f"{at}.mlp.{module}.weight"] = np.zeros((WIDE, HIDDEN), np.float32)
        tensors[f"{at}.mlp.down_proj.weight"] = np.zeros((HIDDEN, WIDE), np.float32)
        tensors[f"{at}.input_layernorm.weight"] = np.ones(HIDDEN, np.float32)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for index, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors"
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n, f in weight_map.items() if f == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("weights") / "base")


@pytest.fixture
def make_base():
    return write_base


@pytest.fixture
def groups():
    return [TrajectoryGroup([Trajectory(reward=0.0), Trajectory(reward=1.0)])]


@pytest.fixture(scope="module")
def fake_plugin(tmp_path_factory):
    """The fake engines' plugin is installed, for this process and for the hosts that it starts; gives their orders."""
    folder = tmp_path_factory.mktemp("fakes")
    with pytest.MonkeyPatch.context() as patch:
        python_path = os.pathsep.join(filter(None, (str(FAKE_PLUGIN), os.environ.get("PYTHONPATH"))))
        patch.setenv("PYTHONPATH", python_path)
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("ART_FAKE_ORDERS", str(folder / "orders.json"))
        patch.syspath_prepend(str(FAKE_PLUGIN))
        installed_plugins.cache_clear()
        yield folder / "orders.json"
        installed_plugins.cache_clear()
        for name in [name for name in sys.modules if name.startswith("art_fake_engine")]:
            del sys.modules[name]


@pytest.fixture
def fake_engines(fake_plugin):
    """Set orders for the fake engines: `fake_engines(refuse_load=True)` replaces all earlier ones."""

    def give(**wanted):
        temporary = fake_plugin.with_suffix(".new")
        temporary.write_text(json.dumps(wanted))
        temporary.replace(fake_plugin)

    give()
    yield give
    give()


def make_backend(path, **options):
    """A backend on the fake engines."""
    from art_backend_local import LocalBackend

    return LocalBackend(
        **{
            "path": path,
            "in_process": True,
            "inference_engine": "fake",
            "training_engine": "fake",
            "show_progress": False,
            **options,
        }
    )


@pytest.fixture(scope="module")
def module_backend(fake_plugin, tmp_path_factory):
    with make_backend(tmp_path_factory.mktemp("backend") / "art", max_adapters=300) as backend:
        yield backend


@pytest.fixture
async def backend(module_backend, fake_engines):
    """One backend for all tests of a module; each test has a project of its own."""
    yield module_backend
    await module_backend._client.hang_up()


@pytest.fixture
def new_backend(fake_engines):
    """Make a backend of the test's own: `new_backend(path, **options)`."""
    return make_backend


@pytest.fixture
def project():
    return f"p-{uuid4().hex[:8]}"


@pytest.fixture
def config():
    """The `_internal_config` of a module's models."""
    return {}


@pytest.fixture
def make_policy(base, project, config):
    def make(name="m", **fields):
        return Policy(name, **{"base_model": base, "project": project, "config": config, **fields})

    return make


@pytest.fixture
def policy(make_policy):
    return make_policy()


@pytest.fixture
def checkpoints(project):
    """The checkpoints' folder of a model under a backend's path."""
    return lambda backend, name="m": backend.path / project / "models" / name / "checkpoints"


@pytest.fixture
async def client():
    """An OpenAI client for a registration."""
    from openai import AsyncOpenAI

    async with AsyncExitStack() as stack:

        def make(registration):
            made = AsyncOpenAI(
                base_url=registration.inference_base_url, api_key=registration.inference_api_key, max_retries=0
            )
            stack.push_async_callback(made.close)
            return made

        yield make
