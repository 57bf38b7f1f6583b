"""Names of metrics, held to MLflow's own rules: what is allowed stays, what is refused becomes something allowed."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_mlflow.names import allowed

# In a process of its own, as importing MLflow sets up loggers of the process.
JUDGE = """
import json, sys
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, path_not_unique, validate_param_and_metric_name

for line in sys.stdin:
    name = json.loads(line)
    takes = validate_param_and_metric_name(name) and not path_not_unique(name) and len(name) <= MAX_ENTITY_KEY_LENGTH
    print(json.dumps(bool(takes)), flush=True)
"""
NAMES = st.one_of(st.text(), st.text("a.b/_- :é"), st.text("./"), st.text("a/", min_size=240, max_size=260))


@pytest.fixture(scope="module")
def mlflow_takes():
    """A function: whether MLflow takes a metric of this name."""
    command = [sys.executable, "-c", JUDGE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, encoding="utf-8", **pipes) as judge:

        def takes(name):
            judge.stdin.write(json.dumps(name) + "\n")
            judge.stdin.flush()
            return json.loads(judge.stdout.readline())

        yield takes
        judge.stdin.close()
        judge.wait(timeout=60)


@pytest.mark.slow
@given(name=NAMES)
def test_mlflow_takes_what_a_name_becomes(mlflow_takes, name):
    assert mlflow_takes(allowed(name))
    assert allowed(name) == name or not mlflow_takes(name) or name.startswith(".") or "..." in name


@given(st.sets(st.one_of(NAMES, st.text("a/.!", max_size=4)), min_size=2))
def test_different_names_stay_different(names):
    assert len({allowed(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "name", ["loss/train", "reward/größe", "val/奖励", "time/step of the loop: s", "a.b-c_d", "x" * 250]
)
def test_a_name_that_is_allowed_stays(name):
    assert allowed(name) == name


@pytest.mark.parametrize(
    ("name", "begins"), [("a//b", "a/b-"), ("../x", "x-"), ("loss!", "loss_-"), ("x" * 251, "x" * 200 + "-"), ("", "-")]
)
def test_what_may_stay_of_a_name_that_is_refused_stays(name, begins):
    assert allowed(name).startswith(begins)
    assert len(allowed(name)) == len(begins) + 8
