"""The engine's description: a command line for its own environment, without secrets, and a client that stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from art_core import TrainingEngine, TrainingLaunch
from art_core.errors import UnknownArgument
from art_engine_unsloth.environment import ENVIRONMENT
from art_engine_unsloth.plugin import art_register_training_engines
from art_engine_unsloth.training_engine import UnslothTrainingEngine
from art_training_kit.worker import read_arguments

LAUNCH = TrainingLaunch(
    base_model=Path("/models/base"), host="127.0.0.1", port=4711, token="not-for-argv", python="/env/bin/python"
)


def test_the_card_is_that_of_the_engine() -> None:
    [spec] = art_register_training_engines()
    for flavour in (None, *ENVIRONMENT.flavours):
        engine = UnslothTrainingEngine(flavour)
        assert isinstance(engine, TrainingEngine)
        assert engine.name == spec.name == "unsloth"
        assert engine.capabilities == spec.capabilities
    assert spec.recommended_on_gpu


def test_the_plan_runs_the_worker_of_the_kit_with_our_packages() -> None:
    plan = UnslothTrainingEngine().launch(replace(LAUNCH, init_args={"gradient_checkpointing": True}))
    assert plan.argv[0] == "/env/bin/python"
    read = read_arguments(list(plan.argv[2:]))
    assert read.policy == "art_engine_unsloth.in_environment.loading:load_policy"
    assert read.gradient_checkpointing == "on"
    assert plan.env["HF_HUB_OFFLINE"] == "1"
    folders = json.loads(plan.env["ART_BROUGHT_PACKAGES"])
    assert (Path(folders["art_engine_unsloth"]) / "in_environment" / "loading.py").is_file()
    assert "not-for-argv" not in " ".join(plan.argv) + repr(plan)


def test_each_gpu_has_a_rank() -> None:
    assert UnslothTrainingEngine().launch(replace(LAUNCH, devices=(3,))).env["CUDA_VISIBLE_DEVICES"] == "3"
    plan = UnslothTrainingEngine().launch(replace(LAUNCH, devices=(0, 1)))
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert read_arguments(list(plan.argv[2:])).ranks == 2


def test_unsloths_own_settings_reach_the_worker() -> None:
    own = {"load_in_4bit": True, "use_gradient_checkpointing": "unsloth"}
    plan = UnslothTrainingEngine().launch(replace(LAUNCH, devices=(0,), init_args=own))
    assert read_arguments(list(plan.argv[2:])).init_args == own


@pytest.mark.parametrize(
    ("init_args", "words"),
    [
        ({"load_in_4bit": True}, "needs a GPU"),
        ({"load_in_4bit": "yes"}, "give True or False"),
        ({"use_gradient_checkpointing": "sometimes"}, "give 'unsloth', True or False"),
        ({"use_gradient_checkpointing": True, "gradient_checkpointing": False}, "not both"),
    ],
)
def test_what_cannot_be_is_refused_in_words_before_anything_starts(init_args: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UnslothTrainingEngine().launch(replace(LAUNCH, init_args=init_args))


def test_what_it_does_not_know_is_refused_by_name() -> None:
    with pytest.raises(UnknownArgument, match="gradient_checkpointing"):
        UnslothTrainingEngine().launch(replace(LAUNCH, init_args={"gradient_checkpoint": True}))


def test_every_flavour_has_its_libraries_in_one_version() -> None:
    for flavour in ENVIRONMENT.flavours.values():
        pinned = {r.name for r in map(Requirement, flavour.requirements) if "==" in str(r.specifier)}
        assert pinned == {"unsloth", "unsloth-zoo", "torch", "torchao", "transformers", "trl", "peft"}
    # It comes built for CUDA, and Unsloth can't be imported with it beside the CPU's torch.
    assert ENVIRONMENT.flavours["cpu"].uninstall == ("torchvision",)
    assert ENVIRONMENT.flavours["cuda"].uninstall == ()


def test_the_client_needs_neither_torch_nor_unsloth() -> None:
    heavy = {"torch", "unsloth", "unsloth-zoo", "torchao", "transformers", "peft", "trl"}
    seen: set[str] = set()
    waiting = ["art-engine-unsloth"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        required = [Requirement(line) for line in metadata.requires(name) or []]
        names = {r.name for r in required if r.marker is None}
        assert not names & heavy, f"{name} needs {names & heavy}"
        waiting += [other for other in names if other.startswith("art-") and other not in seen]
    said = "import sys, art_engine_unsloth.plugin, art_engine_unsloth.training_engine; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "False\n"
