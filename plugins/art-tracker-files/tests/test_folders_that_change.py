"""Trajectories are read while another process makes, moves and deletes folders beside them."""

import subprocess
import sys

import pytest

from art_core import Trajectory, TrajectoryGroup
from art_tracker_files.trajectory_files import add_trajectories, read_files

CHURN = """
import shutil, sys
from pathlib import Path
root = Path(sys.argv[1])
print("churning", flush=True)
for number in range(1_000_000):
    made = root / f"step-{number % 7}" / "inner"
    made.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(made.parent.rename(root / f"moved-{number % 3}"), ignore_errors=True)
"""


@pytest.mark.slow
def test_a_folder_is_read_while_folders_in_it_come_and_go(tmp_path):
    add_trajectories(tmp_path / "kept" / "0001.parquet", [TrajectoryGroup([Trajectory(reward=1.0)])])
    process = subprocess.Popen([sys.executable, "-c", CHURN, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        for _ in range(300):
            assert len(read_files(tmp_path)) == 1
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
