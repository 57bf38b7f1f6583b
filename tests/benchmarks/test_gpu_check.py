"""`make gpu-check` without a GPU, its rows on a machine with one, and its items tried on a CPU's server."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu_check
import pytest
from measuring import gpu_serving
from measuring.checklist import Outcome, try_all
from measuring.gpu_serving import GpuRun, serving_items
from measuring.gpu_steps import step_items
from measuring.gpu_training import training_items
from rich.console import Console

from art_conformance.tiny_model import write_adapter
from art_core import EngineCall
from art_runtime import Accelerator

GPU = Accelerator(index=0, uuid="GPU-0", name="A GPU", memory_mib=8192)


@pytest.fixture
def run(tiny_base_model: Path, tmp_path: Path) -> GpuRun:
    """A run on a machine with one GPU, as far as it is told."""
    adapter = write_adapter(tmp_path / "adapter", tiny_base_model, seed=1)
    return GpuRun(
        gpus=(GPU,), base_model=tiny_base_model, adapter=adapter, folder=tmp_path, console=Console(stderr=True)
    )


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_exits_with_2() -> None:
    finished = subprocess.run(
        [sys.executable, gpu_check.__file__],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 2, finished.stderr
    assert finished.stdout.strip() == gpu_check.NO_GPU


def test_there_is_a_row_for_every_engine_and_every_pair(run: GpuRun) -> None:
    rows = {(item.about, item.what) for item in gpu_check.items_for(run)}
    assert ("GPU 0", "device and driver") in rows
    assert ("inference torch", "art engines doctor") in rows
    assert ("inference vllm", "art engines doctor") in rows
    assert ("inference torch", "FP8") in rows
    assert ("training torch", "a step with the base in 4 bits") in rows
    assert any(about == "torch + torch" and what.startswith("shared mode") for about, what in rows)


async def test_dedicated_mode_needs_a_second_gpu(run: GpuRun) -> None:
    rows = await try_all(training_items(run, "torch", "torch")[1:], run.console)
    assert [row.outcome for row in rows] == [Outcome.NOT_POSSIBLE]
    assert "two GPUs" in rows[0].said


@pytest.mark.slow
async def test_the_items_of_an_engine_work_on_its_server(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    # The server runs on the CPU here; only the driver's figures are made up.
    held = {"asleep": False}

    async def memory_used(gpu: Accelerator) -> int:
        running = bool(run.live)
        return 0 if not running else 500 if held["asleep"] else 2000

    original = gpu_serving.LiveEngine.control

    async def control(self: gpu_serving.LiveEngine, call: EngineCall) -> bytes:
        held["asleep"] = call.path.startswith("/sleep")
        return await original(self, call)

    monkeypatch.setattr(gpu_serving, "memory_used", memory_used)
    monkeypatch.setattr(gpu_serving.LiveEngine, "control", control)
    monkeypatch.setattr(gpu_serving, "capability", lambda gpu: 9.0)
    rows = await try_all(serving_items(run, "torch"), run.console)
    wrong = [(row.item.what, row.said) for row in rows if row.outcome is Outcome.FAILED]
    assert not wrong
    assert [row.item.what for row in rows if row.outcome is Outcome.NOT_POSSIBLE] == ["FP8"], "engine torch has none"


@pytest.mark.slow
async def test_the_steps_of_a_training_engine_give_the_loss_that_they_should(run: GpuRun) -> None:
    # Without a GPU the worker computes on the CPU.
    in_float32, in_4_bits = step_items(replace(run, gpus=()), "torch")[1::2]
    rows = await try_all([in_float32, in_4_bits], run.console)
    assert [row.outcome for row in rows] == [Outcome.OK, Outcome.NOT_POSSIBLE], [row.said for row in rows]
    assert "off by" in rows[0].said
    assert "load_in_4bit" in rows[1].said


@pytest.mark.slow
async def test_steps_are_trained_and_published_under_load(run: GpuRun) -> None:
    [row] = await try_all(training_items(run, "torch", "torch")[:1], run.console)
    assert row.outcome is Outcome.OK, row.said
    assert "none failed or mislabelled" in row.said
