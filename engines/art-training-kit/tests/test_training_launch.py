from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from art_core.engines import TrainingLaunch
from art_engine_kit.training_wire import WORKER_TOKEN
from art_training_kit.launch import BRINGING_WORKER, KIT_REQUIREMENTS, KITS, worker_plan
from art_training_kit.rank_processes import own_devices
from art_training_kit.worker import read_arguments

# Of the distributions that the worker is made of, what a worker never imports.
ONLY_CLIENTS = {"httptools", "rich", "tenacity", "typer"}


def test_the_plan_is_a_command_line_the_worker_reads_and_hides_the_token() -> None:
    config = TrainingLaunch(
        base_model=Path("/weights"), host="127.0.0.1", port=8123, token="hidden", python="python3",
        devices=(2,), max_seq_length=99, init_args={"odd": [1], "gradient_checkpointing": True},
    )  # fmt: skip
    plan = worker_plan(config, "package.policy:load", {"MORE": "1"})
    assert plan.argv[:3] == ("python3", "-m", "art_training_kit.worker")
    read = read_arguments(list(plan.argv[3:]))
    assert (read.policy, read.base_model, read.port, read.max_seq_length) == (
        "package.policy:load",
        Path("/weights"),
        8123,
        99,
    )
    assert read.init_args == {"odd": [1]}
    assert read.gradient_checkpointing == "on"
    assert plan.env == {"CUDA_VISIBLE_DEVICES": "2", "MORE": "1"}
    assert plan.secret_env == {WORKER_TOKEN: "hidden"}
    assert "hidden" not in json.dumps(plan.argv) + repr(plan)


def test_on_a_cpu_the_worker_sees_no_gpu() -> None:
    config = TrainingLaunch(base_model=Path("/weights"), host="127.0.0.1", port=8123, token="hidden", python="python3")
    plan = worker_plan(config, "package.policy:load")
    assert plan.env == {"CUDA_VISIBLE_DEVICES": ""}
    assert read_arguments(list(plan.argv[3:])).gradient_checkpointing == "auto"
    off = worker_plan(replace(config, init_args={"gradient_checkpointing": False}), "package.policy:load")
    assert read_arguments(list(off.argv[3:])).gradient_checkpointing == "off"


def test_an_engine_with_an_environment_of_its_own_brings_only_our_packages() -> None:
    config = TrainingLaunch(base_model=Path("/weights"), host="127.0.0.1", port=8123, token="hidden", python="python3")
    plan = worker_plan(config, "package.policy:load", brings="art_engine_torch")
    assert plan.argv[:3] == ("python3", str(BRINGING_WORKER), "--policy")
    assert read_arguments(list(plan.argv[2:])).policy == "package.policy:load"
    folders = json.loads(plan.env["ART_BROUGHT_PACKAGES"])
    assert folders.keys() == {"art_core", "art_engine_kit", "art_training_kit", "art_engine_torch"}
    assert plan.env["PYTHONPATH"] == ""
    with pytest.raises(ModuleNotFoundError, match="art_engine_nowhere"):
        worker_plan(config, "package.policy:load", brings="art_engine_nowhere")


WORKER = """
import sys
import art_training_kit.beside
try:
    import neighbour
except ModuleNotFoundError as error:
    print(error.name, "is not there;", __name__, sys.argv[1:])
"""


def test_the_worker_sees_the_packages_it_brings_and_nothing_that_lies_beside_them(tmp_path: Path) -> None:
    package = tmp_path / "art_training_kit"
    package.mkdir()
    (tmp_path / "neighbour.py").write_text("")
    for name, text in (("__init__", ""), ("beside", ""), ("worker", WORKER)):
        (package / f"{name}.py").write_text(text)
    ran = subprocess.run(
        [sys.executable, BRINGING_WORKER, "--port", "1"],
        env={**os.environ, "ART_BROUGHT_PACKAGES": json.dumps({"art_training_kit": str(package)})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stdout == "neighbour is not there; __main__ ['--port', '1']\n", ran.stderr


def test_what_the_kits_need_is_asked_of_an_engines_environment() -> None:
    here = [Requirement(line) for name in KITS for line in metadata.requires(name.replace("_", "-")) or []]
    needed = {r.name for r in here if r.marker is None and not r.name.startswith("art-")}
    asked = {Requirement(line).name: Requirement(line) for line in KIT_REQUIREMENTS}
    assert needed - asked.keys() == ONLY_CLIENTS
    for requirement in (r for r in here if r.marker is None and r.name in asked):
        assert requirement.specifier == asked[requirement.name].specifier, requirement


def test_each_gpu_has_a_rank_and_a_cpu_as_many_as_are_asked_for() -> None:
    config = TrainingLaunch(base_model=Path("/weights"), host="127.0.0.1", port=8123, token="hidden", python="python3")

    def asked(devices: tuple[int, ...] = (), **init_args: Any) -> int:
        plan = worker_plan(replace(config, devices=devices, init_args=init_args), "package.policy:load")
        read = read_arguments(list(plan.argv[3:]))
        assert "ranks" not in read.init_args
        assert (read.rank, read.meeting) == (0, None)
        return read.ranks

    assert asked() == 1
    assert asked((3,)) == 1
    assert asked((0, 2, 5)) == 3
    assert asked((0, 2), ranks=2) == 2
    assert asked(ranks=4) == 4
    with pytest.raises(ValueError, match="ranks=3, but 2 GPUs"):
        asked((0, 2), ranks=3)
    for nonsense in (0, -1, True, 1.5, "2"):
        with pytest.raises(ValueError, match="whole number of processes"):
            asked(ranks=nonsense)


def test_a_rank_sees_its_own_gpu_and_its_part_of_the_cores() -> None:
    seen = {"CUDA_VISIBLE_DEVICES": "4,6", "OMP_NUM_THREADS": "3"}
    assert [own_devices(seen, rank, 2)["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)] == ["4", "6"]
    assert "OMP_NUM_THREADS" not in own_devices(seen, 0, 2)
    on_cpu = own_devices({"CUDA_VISIBLE_DEVICES": ""}, 1, 2)
    assert "CUDA_VISIBLE_DEVICES" not in on_cpu
    assert int(on_cpu["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
