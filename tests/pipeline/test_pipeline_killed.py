"""A pipeline whose process is ended in the middle goes on as if nothing had happened."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROCESS = Path(__file__).with_name("pipeline_process.py")
KILLS, COUNT, WORKERS = 6, 60, 4


def start(folder, train_s):
    return subprocess.Popen(
        [sys.executable, str(PROCESS), str(folder), str(COUNT), str(train_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_more(path, than):
    until = time.monotonic() + 60
    while len(lines(path)) <= than:
        assert time.monotonic() < until, "the pipeline did not go on"
        time.sleep(0.002)


@pytest.mark.slow
def test_after_sigkill_nothing_finished_is_lost_and_nothing_is_trained_twice(tmp_path):
    chance = random.Random(11)
    for _ in range(KILLS):
        process = start(tmp_path, 0.05)
        try:
            wait_for_more(tmp_path / "batches", len(lines(tmp_path / "batches")))
            time.sleep(chance.uniform(0, 0.06))
        finally:
            process.kill()
            process.communicate(timeout=60)
    last = start(tmp_path, 0)
    out, err = last.communicate(timeout=120)
    assert last.returncode == 0, err[-3000:]
    assert out.startswith("done")
    trained = [scenario for batch in lines(tmp_path / "batches") for scenario, _ in batch]
    assert sorted(trained) == list(range(COUNT))
    assert len(lines(tmp_path / "rollouts")) <= COUNT + KILLS * WORKERS, "only what ran was begun again"


@pytest.mark.slow
def test_the_second_sigint_stops_now(tmp_path):
    process = start(tmp_path, 300)
    try:
        wait_for_more(tmp_path / "rollouts", 3)
        time.sleep(0.5)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "stopping after this step" in err
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err
    assert not lines(tmp_path / "batches")
