from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from art_core.engines import TrainingLaunch
from art_engine_kit.training_wire import WORKER_TOKEN
from art_training_kit.launch import worker_plan
from art_training_kit.worker import read_arguments


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
