"""The engine's description: a command line for its own environment, without secrets, and a client that stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from art_core import TrainingEngine, TrainingLaunch
from art_core.errors import UnknownArgument
from art_engine_torchtune.environment import ENVIRONMENT
from art_engine_torchtune.plugin import art_register_training_engines
from art_engine_torchtune.training_engine import TorchtuneTrainingEngine
from art_training_kit.worker import read_arguments

LAUNCH = TrainingLaunch(
    base_model=Path("/models/base"), host="127.0.0.1", port=4711, token="not-for-argv", python="/env/bin/python"
)


def test_the_card_is_that_of_the_engine() -> None:
    [spec] = art_register_training_engines()
    for flavour in (None, *ENVIRONMENT.flavours):
        engine = TorchtuneTrainingEngine(flavour)
        assert isinstance(engine, TrainingEngine)
        assert engine.name == spec.name == "torchtune"
        assert engine.capabilities == spec.capabilities


def test_the_plan_runs_the_worker_of_the_kit_with_our_packages() -> None:
    plan = TorchtuneTrainingEngine().launch(replace(LAUNCH, init_args={"gradient_checkpointing": True}))
    assert plan.argv[0] == "/env/bin/python"
    read = read_arguments(list(plan.argv[2:]))
    assert read.policy == "art_engine_torchtune.in_environment.loading:load_policy"
    assert read.gradient_checkpointing == "on"
    assert plan.env["HF_HUB_OFFLINE"] == "1"
    folders = json.loads(plan.env["ART_BROUGHT_PACKAGES"])
    assert (Path(folders["art_engine_torchtune"]) / "in_environment" / "loading.py").is_file()
    assert "not-for-argv" not in " ".join(plan.argv) + repr(plan)


def test_each_gpu_has_a_rank() -> None:
    assert TorchtuneTrainingEngine().launch(replace(LAUNCH, devices=(3,))).env["CUDA_VISIBLE_DEVICES"] == "3"
    plan = TorchtuneTrainingEngine().launch(replace(LAUNCH, devices=(0, 1)))
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert read_arguments(list(plan.argv[2:])).ranks == 2


def test_what_it_does_not_know_is_refused_by_name() -> None:
    with pytest.raises(UnknownArgument, match="gradient_checkpointing"):
        TorchtuneTrainingEngine().launch(replace(LAUNCH, init_args={"gradient_checkpoint": True}))


def test_every_flavour_has_its_libraries_in_one_version() -> None:
    for flavour in ENVIRONMENT.flavours.values():
        pinned = {r.name for r in map(Requirement, flavour.requirements) if "==" in str(r.specifier)}
        assert pinned == {"torchtune", "torch", "torchao", "transformers"}


def test_the_client_needs_neither_torch_nor_torchtune() -> None:
    heavy = {"torch", "torchtune", "torchao", "transformers", "peft"}
    seen: set[str] = set()
    waiting = ["art-engine-torchtune"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        required = [Requirement(line) for line in metadata.requires(name) or []]
        names = {r.name for r in required if r.marker is None}
        assert not names & heavy, f"{name} needs {names & heavy}"
        waiting += [other for other in names if other.startswith("art-") and other not in seen]
    said = (
        "import sys, art_engine_torchtune.plugin, art_engine_torchtune.training_engine; print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "False\n"
