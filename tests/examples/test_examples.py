"""The examples run as a user runs them, on real weights: the reward rises, a second run goes on, the picture is
there.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from art_tracker_files import read_history

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run_example(script: str, *arguments: str, path: Path) -> str:
    """Run a script to its end and give what it printed."""
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / script), "--path", str(path), "--name", "test", *arguments],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert finished.returncode == 0, f"{script} failed:\n{finished.stdout[-4000:]}\n{finished.stderr[-6000:]}"
    return finished.stdout


def rewards(folder: Path) -> list[float]:
    """The mean reward of each step, as the tracker kept it."""
    return [row["train/reward"] for row in read_history(folder / "history.jsonl") if "train/reward" in row]


def test_customer_replies_improve_and_a_second_run_goes_on(tmp_path: Path) -> None:
    run_example("customer_replies.py", "--steps", "4", path=tmp_path)
    folder = tmp_path / "customer-replies" / "models" / "test"
    assert len(rewards(folder)) == 4
    printed = run_example("customer_replies.py", "--steps", "6", path=tmp_path)
    curve = rewards(folder)
    assert len(curve) == 6, "the second run must go on from step 4"
    assert sum(curve[-2:]) / 2 > curve[0] + 0.15, f"the reward did not rise: {curve}"
    assert "published test@6" in printed
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    # The last screen says what to do next, in lines that can be run as they are.
    next_line = next(line for line in printed.splitlines() if line.startswith("go on with this model"))
    assert "--name test" in next_line
    assert "--steps 12" in next_line
    command = shlex.split(next_line.removeprefix("go on with this model"))
    subprocess.run([*command, "--help"], check=True, capture_output=True, timeout=60)


def test_a_tool_is_used_over_several_turns(tmp_path: Path) -> None:
    printed = run_example("shop_tool.py", "--steps", "3", "--samples", "4", path=tmp_path)
    folder = tmp_path / "shop-tool" / "models" / "test"
    curve = rewards(folder)
    assert len(curve) == 3
    # With 32 attempts a step's mean strays by about 0.1 by chance; the later steps gain four times that and more.
    assert sum(curve[-2:]) / 2 > curve[0] + 0.15, f"the reward did not rise: {curve}"
    assert "calls price_of(" in printed
