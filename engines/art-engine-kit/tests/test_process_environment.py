"""What a process of ours finds when it is started from an environment that breaks other programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LOOK = """
import json, locale, os, sys, warnings
def documented():
    "Has a docstring."
try:
    warnings.warn("of a library", FutureWarning)
    warned = "passed over"
except FutureWarning:
    warned = "raised"
print(json.dumps({
    "docstring": documented.__doc__, "asserts": __debug__, "warned": warned, "utf8": sys.flags.utf8_mode,
    "output": sys.stdout.encoding, "path": [entry for entry in sys.path if entry in ("", os.getcwd())],
    "no_proxy": os.environ.get("no_proxy"), "NO_PROXY": os.environ.get("NO_PROXY"), "user": os.environ.get("USER"),
    "warnings": os.environ.get("PYTHONWARNINGS"),
}))
"""
START = """
import subprocess, sys
from art_engine_kit.process_environment import process_environment
subprocess.run([sys.executable, "-c", sys.argv[1]], env=process_environment(), check=True)
"""


def found_by_a_process(folder: Path, env: dict[str, str | None]) -> dict[str, Any]:
    wanted = {**os.environ, **env}
    done = subprocess.run(
        [sys.executable, "-P", "-c", START, LOOK],
        env={name: value for name, value in wanted.items() if value is not None},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({"PYTHONOPTIMIZE": "2"}, {"docstring": "Has a docstring.", "asserts": True}),
        ({"PYTHONWARNINGS": "error"}, {"warned": "passed over", "warnings": ""}),
        ({"PYTHONWARNINGS": "e"}, {"warned": "passed over"}),
        ({"PYTHONWARNINGS": "ignore::UserWarning,error::FutureWarning"}, {"warnings": "ignore::UserWarning"}),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"utf8": 1, "output": "utf-8"}),
        ({"PYTHONIOENCODING": "ascii:strict"}, {"output": "utf-8"}),
        ({"PYTHONPATH": ":"}, {"path": []}),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "x.org"}, {"no_proxy": "x.org,127.0.0.1,localhost,::1"}),
        ({"all_proxy": "socks5://p:1", "NO_PROXY": None, "no_proxy": None}, {"NO_PROXY": "127.0.0.1,localhost,::1"}),
        ({"LOGNAME": None, "USER": "somebody", "LNAME": None}, {"user": "somebody"}),
    ],
)
def test_what_breaks_other_programs_does_not_reach_ours(
    tmp_path: Path, env: dict[str, str | None], found: dict[str, Any]
) -> None:
    everything = found_by_a_process(tmp_path, env)
    assert {name: everything[name] for name in found} == found


def test_what_is_added_wins() -> None:
    from art_engine_kit.process_environment import process_environment

    assert process_environment({"PYTHONOPTIMIZE": "1"})["PYTHONOPTIMIZE"] == "1"
