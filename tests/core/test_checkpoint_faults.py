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

from art_core.checkpoint import read_manifest, remove_unfinished, whole_steps

WRITER = """
import sys
from pathlib import Path
from art_core.checkpoint import saving, step_folder

checkpoints, step = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    with saving(step_folder(checkpoints, step), step=step, base_model="tiny", engine="torch") as folder:
        for name in ("adapter_model.safetensors", "optimizer.safetensors", "canary.json"):
            (folder / name).write_bytes(bytes([step % 256]) * 200_000)
    step += 1
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
from art_core.checkpoint import saving, step_folder

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with saving(step_folder(Path(sys.argv[1]), 2), step=2, base_model="tiny", engine="torch") as folder:
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 90_000)
    (folder / "optimizer.safetensors").write_bytes(b"o" * 200_000)
"""

FULL_AT_THE_MANIFEST = """
import resource, sys
from pathlib import Path
from art_core.checkpoint import saving, step_folder

with saving(step_folder(Path(sys.argv[1]), 2), step=2, base_model="tiny", engine="torch") as folder:
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 90_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
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


def test_a_writer_killed_at_random_moments_leaves_whole_checkpoints_or_none(tmp_path: Path) -> None:
    chance = random.Random(20)
    next_step = 1
    unfinished = 0
    # Eight kills, and more only while none of them fell where this test needs one.
    for kills in range(60):
        if kills >= 8 and unfinished and next_step > 1:
            break
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(next_step)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0.0, 0.12))
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait(timeout=20)
            writer.stdout.close()
        steps = assert_whole_or_none(tmp_path)
        assert steps == list(range(1, len(steps) + 1))
        next_step = len(steps) + 1
        unfinished += len(remove_unfinished(tmp_path))
        assert sorted(p.name for p in tmp_path.iterdir()) == [f"{step:04d}" for step in steps]
    assert next_step > 1, "no writer lived long enough to save anything"
    assert unfinished > 0, "no kill fell into a write; make the written files larger"


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
