"""Writers that are killed and disks that fill up, in processes of their own: the old checkpoint stays, the new one is
whole or not there.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from art_engine_kit.checkpoint_folder import read_manifest, remove_unfinished, whole_steps

WRITER = """
import sys
from pathlib import Path
from art_engine_kit.checkpoint_folder import saving, step_folder

checkpoints, step = Path(sys.argv[1]), int(sys.argv[2])
while True:
    print("saving", flush=True)
    with saving(step_folder(checkpoints, step), step=step, base_model="tiny", engine="torch") as folder:
        for name in ("adapter_model.safetensors", "optimizer.safetensors", "canary.json"):
            (folder / name).write_bytes(bytes([step % 256]) * 200_000)
    step += 1
"""

# One child for each moment at which a save waits for the disk; it kills itself there.
KILLED_AT_EACH_SYNC = """
import os, signal, sys
from pathlib import Path
from art_engine_kit.checkpoint_folder import saving, step_folder

checkpoints, real = Path(sys.argv[1]), os.fsync
for moment in range(1, 9):
    child = os.fork()
    if child == 0:
        calls = 0

        def fsync(descriptor):
            global calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
        with saving(step_folder(checkpoints / str(moment), 1), step=1, base_model="tiny", engine="torch") as folder:
            for name in ("adapter_model.safetensors", "optimizer.safetensors", "canary.json"):
                (folder / name).write_bytes(bytes([1]) * 200_000)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
from art_engine_kit.checkpoint_folder import saving, step_folder

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with saving(step_folder(Path(sys.argv[1]), 2), step=2, base_model="tiny", engine="torch") as folder:
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 90_000)
    (folder / "optimizer.safetensors").write_bytes(b"o" * 200_000)
"""

FULL_AT_THE_MANIFEST = """
import resource, sys
from pathlib import Path
from art_engine_kit.checkpoint_folder import saving, step_folder

with saving(step_folder(Path(sys.argv[1]), 2), step=2, base_model="tiny", engine="torch") as folder:
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 90_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
"""

ADAPTER_BEYOND_A_LIMIT = """
import resource, sys
from pathlib import Path
import numpy as np
from art_engine_kit.adapter_config import AdapterConfig
from art_engine_kit.adapter_files import write_adapter

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
pair = np.zeros((8, 64), np.float32), np.zeros((64, 8), np.float32)
config = AdapterConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
write_adapter(Path(sys.argv[1]), config, {"model.layers.0.self_attn.q_proj": pair})
"""


def assert_whole_or_none(checkpoints: Path) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = whole_steps(checkpoints)
    for step, folder in steps.items():
        manifest = read_manifest(folder, hashes=True)
        assert len(manifest.files) == 3
        assert (folder / "canary.json").read_bytes() == bytes([step % 256]) * 200_000
    return list(steps)


def test_a_writer_killed_at_any_sync_leaves_the_whole_checkpoint_or_none(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EACH_SYNC, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    # The manifest; three files, manifest and folder; the parent folder after the rename. There is no eighth.
    assert ran.stdout.split() == ["-9"] * 7 + ["0"]
    left = {moment: assert_whole_or_none(tmp_path / str(moment)) for moment in range(1, 9)}
    assert left == {moment: [] if moment < 7 else [1] for moment in range(1, 9)}
    for moment in range(1, 7):
        assert len(remove_unfinished(tmp_path / str(moment))) == 1
        assert list((tmp_path / str(moment)).iterdir()) == []


@pytest.mark.slow
def test_a_writer_killed_at_random_moments_leaves_whole_checkpoints_or_none(tmp_path: Path) -> None:
    chance = random.Random(20)
    next_step = 1
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(next_step)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        try:
            for _ in range(chance.randint(2, 5)):
                assert writer.stdout.readline() == "saving\n"
            time.sleep(chance.uniform(0.0, 0.02))
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait(timeout=20)
            writer.stdout.close()
        steps = assert_whole_or_none(tmp_path)
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= next_step
        next_step = len(steps) + 1
        remove_unfinished(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [f"{step:04d}" for step in steps]


@pytest.mark.parametrize("script", [FULL_DISK, FULL_AT_THE_MANIFEST], ids=["at the weights", "at the manifest"])
def test_a_full_disk_is_an_error_that_leaves_nothing_and_keeps_the_old(tmp_path: Path, script: str) -> None:
    old = tmp_path / "0001"
    first = WRITER.replace("while True:", "if True:")
    subprocess.run([sys.executable, "-c", first, str(tmp_path), "1"], check=True, capture_output=True, timeout=60)
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "OSError: [Errno 27] File too large" in ended.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["0001"]
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert assert_whole_or_none(tmp_path) == [1]


def test_an_adapter_that_the_system_refuses_to_write_is_an_os_error_with_its_file(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", ADAPTER_BEYOND_A_LIMIT, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "OSError: [Errno 27] File too large" in ran.stderr, ran.stderr
    assert str(tmp_path / "adapter_model.safetensors") in ran.stderr
