"""`art doctor` on machines where something is wrong, really so: each thing is said, with the line that mends it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from art_runtime.doctor import Finding, examination, examine_all

HEALTHY = {"HTTP_PROXY": None, "http_proxy": None, "PYTHONUTF8": "1"}
TOPICS = [
    *("python", "disk", "memory", "GPU", "ports", "limits", "folders", "locale", "proxies", "certificates"),
    *("shadowing files", "plugins", "engines", "caches"),
]
AS_A_USER = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
Doctor = Callable[..., "Answer"]


class Answer:
    """What `art doctor --json` said."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        assert done.stdout.startswith("["), done.stderr
        self.findings: list[dict[str, Any]] = json.loads(done.stdout)
        self.code = done.returncode

    def about(self, topic: str, state: str | None = None) -> list[dict[str, Any]]:
        return [each for each in self.findings if each["about"] == topic and state in (None, each["state"])]


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """Run it in a folder of its own with a cache of its own: `doctor(env={...}, limit=(...))`."""
    folder = tmp_path / "here"
    folder.mkdir()

    def run(
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: Path = folder,
        who: Sequence[str] = (),
        limit: tuple[int, int] | None = None,
    ) -> Answer:
        wanted = {**os.environ, "ART_CACHE_DIR": str(tmp_path / "cache"), **HEALTHY, **(env or {})}
        command = [*who, str(Path(sys.executable).with_name("art")), "doctor", "--json"]
        done = subprocess.run(
            command,
            env={name: value for name, value in wanted.items() if value is not None},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=100,
            preexec_fn=(lambda: resource.setrlimit(limit[0], (limit[1], limit[1]))) if limit else None,
        )
        return Answer(done)

    return run


@pytest.mark.slow
def test_everything_is_looked_at_and_what_is_wrong_decides_the_exit_code(doctor: Doctor) -> None:
    found = doctor()
    assert list(dict.fromkeys(each["about"] for each in found.findings)) == TOPICS
    assert found.code == int(any(each["state"] == "wrong" for each in found.findings))
    assert all(each["mend"] for each in found.findings if each["state"] == "wrong")


@pytest.mark.slow
def test_it_is_printed_with_the_line_that_mends(tmp_path: Path) -> None:
    env = {**os.environ, "SSL_CERT_FILE": "/no/such.pem", "TERM": "dumb"}
    command = [str(Path(sys.executable).with_name("art")), "doctor"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if "SSL_CERT_FILE=/no/such.pem" in line)
    assert lines[at].startswith("wrong")
    assert lines[at + 1].strip() == "→ unset SSL_CERT_FILE"
    assert "wrong, " in lines[-1]


@pytest.mark.slow
def test_files_that_hide_modules_are_named(doctor: Doctor, tmp_path: Path) -> None:
    here = tmp_path / "here"
    for name in ("logging.py", "numpy/__init__.py", "mine.py", "data/readme.txt", "queue/notes.txt", "a-b.py"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("")
    found = doctor()
    (hidden,) = found.about("shadowing files", "wrong")
    assert hidden["says"].startswith(f"logging.py, numpy in {here}: ")
    assert found.code == 1


@pytest.mark.slow
def test_a_checkout_hides_nothing(doctor: Doctor) -> None:
    assert doctor(cwd=Path(__file__).parents[3]).about("shadowing files", "ok")


@pytest.mark.parametrize(
    ("env", "topic", "state", "words"),
    [
        ({"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "x.org"}, "proxies", "note", "NO_PROXY=x.org,127.0.0.1"),
        (
            {"all_proxy": "socks://p:1", "no_proxy": "127.0.0.1, localhost,::1"},
            "proxies",
            "ok",
            "not for this machine",
        ),
        ({"all_proxy": "socks://p:1", "NO_PROXY": "*"}, "proxies", "ok", "not for this machine"),
        ({"CURL_CA_BUNDLE": "/no/such.pem"}, "certificates", "wrong", "unset CURL_CA_BUNDLE"),
        ({"TMPDIR": "/no/such/folder"}, "folders", "note", "TMPDIR=/no/such/folder can't be used"),
        ({"HOME": "/dev/null", "XDG_CACHE_HOME": None}, "folders", "note", "/dev/null, can't be written"),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "locale", "note", "PYTHONUTF8=1"),
    ],
)
def test_what_variables_do(
    doctor: Doctor, tmp_path: Path, env: dict[str, str | None], topic: str, state: str, words: str
) -> None:
    if "TMPDIR" not in env:
        env = {**env, "TMPDIR": str(tmp_path)}
    found = doctor(env=env).about(topic, state)
    assert words in " ".join(f"{each['says']} {each['mend']}" for each in found), found


@pytest.mark.slow
def test_limits(doctor: Doctor) -> None:
    (few,) = doctor(limit=(resource.RLIMIT_NOFILE, 100)).about("limits", "wrong")
    assert few["says"] == "100 open files, at most 100"
    (small,) = doctor(limit=(resource.RLIMIT_FSIZE, 10_000_000)).about("limits", "wrong")
    assert "size of a file is limited to 0.01 GB" in small["says"]
    assert "ulimit -f unlimited" in small["mend"]


@pytest.mark.slow
@pytest.mark.skipif(bool(AS_A_USER) and shutil.which("setpriv") is None, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(doctor: Doctor, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o500)
    assert "can't be written" in doctor(cwd=kept, who=AS_A_USER).about("folders", "note")[-1]["says"]


@pytest.mark.slow
def test_a_working_folder_that_was_deleted(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && exec {Path(sys.executable).with_name('art')} doctor --json"
    found = Answer(subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=100))
    assert [each["mend"] for each in found.findings] == ["cd to a folder that is there"]
    assert found.code == 1


def nvidia_smi(folder: Path, script: str) -> str:
    """A PATH on which the driver's tool answers so."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.slow
def test_a_gpu_that_is_hidden_and_a_driver_that_does_not_answer(doctor: Doctor, tmp_path: Path) -> None:
    listing = 'case "$1" in -L) echo "GPU 0: H100";; *) echo "0, GPU-1, H100, 81559";; esac'
    path = nvidia_smi(tmp_path / "good", listing)
    (there,) = doctor(env={"PATH": path, "CUDA_VISIBLE_DEVICES": None}).about("GPU", "ok")
    assert there["says"] == "H100 (80 GiB)"
    (hidden,) = doctor(env={"PATH": path, "CUDA_VISIBLE_DEVICES": ""}).about("GPU", "note")
    assert hidden["mend"] == "unset CUDA_VISIBLE_DEVICES"
    path = nvidia_smi(tmp_path / "bad", "echo 'Failed to initialize NVML: driver mismatch' >&2; exit 18")
    (mute,) = doctor(env={"PATH": path, "CUDA_VISIBLE_DEVICES": None}).about("GPU", "note")
    assert "driver mismatch" in mute["says"]


def test_a_broken_plugin(doctor: Doctor, tmp_path: Path) -> None:
    info = tmp_path / "site" / "broken_7c3-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-7c3\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[art]\nbroken = broken_7c3\n")
    (tmp_path / "site" / "broken_7c3.py").write_text("raise RuntimeError('no such GPU library')\n")
    found = doctor(env={"PYTHONPATH": str(tmp_path / "site")})
    (wrong,) = found.about("plugins", "wrong")
    assert "no such GPU library" in wrong["says"]
    assert "pip uninstall broken-7c3" in wrong["mend"]
    assert found.code == 1


def test_what_killed_processes_left_in_the_cache(doctor: Doctor, tmp_path: Path) -> None:
    models, engines = tmp_path / "cache" / "models", tmp_path / "cache" / "engines"
    for path in (models / ".making-old", models / ".making-new", engines / "vllm" / "cpu-half"):
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "file").write_bytes(b"x" * 100)
    outdated = engines / "vllm" / "cpu-older"
    outdated.mkdir()
    (outdated / "environment.json").write_text("{}")
    for path in (models / ".making-old", engines / "vllm" / "cpu-half"):
        os.utime(path, (time.time() - 7200,) * 2)
    notes = [each["mend"] for each in doctor().about("caches", "note")]
    assert notes == [f"rm -r {path}" for path in (models / ".making-old", engines / "vllm" / "cpu-half", outdated)]


def test_an_engine_without_its_environment_says_the_line_that_makes_it(doctor: Doctor) -> None:
    notes = {each["says"].partition(":")[0]: each for each in doctor().about("engines", "note")}
    assert notes["vllm"]["mend"].startswith("art engines install vllm")
    assert "isn't made yet" in notes["vllm"]["says"]


@pytest.mark.slow
def test_a_check_that_fails_itself_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> list[Finding]:
        raise OSError("no such device")

    monkeypatch.setitem(examination.CHECKS, "ports", fails)
    found = examine_all()
    (ports,) = [each for each in found if each.about == "ports"]
    assert "no such device" in ports.says
    assert list(dict.fromkeys(each.about for each in found)) == TOPICS
