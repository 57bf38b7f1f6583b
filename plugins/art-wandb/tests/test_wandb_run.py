"""What the real wandb library keeps of what hooks tell, read back from its own files; and that no fault of it is felt.

Each is a process of its own, as wandb does part of its work when a process ends.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from art_core.history import read_history

KEY = "0123456789abcdef" * 2 + "01234567"


SCRIPT = """
import asyncio, os, sys
from pathlib import Path
import art
from art_core import CheckpointRef, ModelKey, announce, installed_plugins

steps, folder, report, then = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]

async def main():
    assert "wandb" not in sys.modules
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter_config.json").write_text("{}")
        (checkpoint / "adapter_model.safetensors").write_bytes(os.urandom(100_000))
        (checkpoint / "optimizer.state").write_bytes(os.urandom(1000))
    model = art.TrainableModel(
        name="agent",
        project="shop",
        base_model="tiny",
        base_path=str(folder),
        report_metrics=[report] if report else None
    )
    for step in range(steps):
        trajectory = art.Trajectory(
            messages_and_choices=[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
            reward=step,
        )
        group = art.TrajectoryGroup([trajectory])
        await model.log([group], metrics={"loss/train": 1 / (step + 1)}, step=step, split="train")
        ref = CheckpointRef(ModelKey("shop", "agent"), step, checkpoint)
        await announce(installed_plugins(), "art_checkpoint_published", model=model, checkpoint=ref, receipt=None)
    print("logged", flush=True)
    if then == "killed":
        sys.stdin.read()  # until it is
    if then == "limited":
        from art_wandb.plugin import reporter, uploads
        uploads.closing_limit_s = reporter.closing_limit_s = 1.0

asyncio.run(main())
"""


def begun(folder, *, steps=3, report="tracker-files", then="", **variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "ART_")) and k != "NETRC"}
    own = {"WANDB_DATA_DIR": str(folder / "data"), "HOME": str(folder)}
    own |= {"ART_TRACKIO_MODE": "disabled", "ART_MLFLOW_MODE": "disabled"}
    command = [sys.executable, "-c", SCRIPT, str(steps), str(folder), report, then]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=kept | own | variables, text=True, cwd=folder, **pipes)


def logged(folder, **settings):
    process = begun(folder, **settings)
    try:
        out, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "logged" in out
    assert KEY not in out + said
    return said


@pytest.mark.slow
def test_metrics_tables_and_adapters_are_read_back_as_they_were_logged(tmp_path, run_files):
    logged(tmp_path, report="", WANDB_MODE="offline")
    (run,) = run_files.run_folders(tmp_path)
    found = list(run_files.rows(run))
    losses = [(row["training_step"], row["loss/train"], row["train/reward"]) for row in found if "loss/train" in row]
    assert losses == [(step, 1 / (step + 1), step) for step in range(3)]
    # The same as tracker-files keeps.
    history = read_history(tmp_path / "shop" / "models" / "agent" / "history.jsonl")
    assert [(row["step"], row["loss/train"], row["train/reward"]) for row in history] == losses
    tables = [row["trajectories/train/path"] for row in found if "trajectories/train/path" in row]
    assert len(tables) == 3
    table = json.loads((run / "files" / tables[2]).read_text())
    assert dict(zip(table["columns"], table["data"][0], strict=True))["conversation"] == "user: hello\n\nassistant: hi"

    (begun,) = [record.run for record in run_files.records(run) if record.WhichOneof("record_type") == "run"]
    assert (begun.run_id, begun.project, begun.display_name) == ("agent", "shop", "agent")
    axes = {
        (m.name or m.glob_name): m.step_metric
        for r in run_files.records(run)
        if (m := r.metric) and (m.name or m.glob_name)
    }
    assert axes["*"] == "training_step"

    artifacts = run_files.lora_artifacts(run)
    assert [(a.name, sorted(a.aliases)) for a in artifacts] == [("agent", ["latest", f"step{n}"]) for n in range(3)]
    for step, artifact in enumerate(artifacts):
        assert json.loads(artifact.metadata) == {"wandb.base_model": "tiny", "step": step}
        files = {entry.path: Path(entry.local_path).read_bytes() for entry in artifact.manifest.contents}
        assert files == {
            name: (tmp_path / "checkpoint" / name).read_bytes()
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }


@pytest.mark.slow
def test_what_is_in_the_file_when_a_process_is_killed_is_kept_and_the_next_goes_on_under_the_same_id(
    tmp_path, run_files
):
    process = begun(tmp_path, steps=50, report="wandb", then="killed", WANDB_MODE="offline")
    try:
        deadline = time.monotonic() + 60
        while len(run_files.steps_of(tmp_path)) < 50 and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert run_files.steps_of(tmp_path) == list(range(50))
    logged(tmp_path, report="wandb", WANDB_MODE="offline")
    assert run_files.steps_of(tmp_path) == [*range(50), 0, 1, 2]
    ids = {
        record.run.run_id
        for run in run_files.run_folders(tmp_path)
        for record in run_files.records(run)
        if record.run.run_id
    }
    assert ids == {"agent"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("report", "variables", "folders"),
    [
        ("", {}, 0),  # no key, and nobody asked
        ("tracker-files", {"WANDB_MODE": "offline"}, 0),  # report_metrics leaves it out, checkpoints too
        ("wandb", {"WANDB_MODE": "disabled"}, 0),
        ("wandb", {}, 1),  # asked for, without a key: kept in files
    ],
)
def test_when_it_reports(tmp_path, report, variables, folders, run_files):
    said = logged(tmp_path, steps=1, report=report, **variables)
    assert len(run_files.run_folders(tmp_path)) == folders
    assert ("There is no key of Weights & Biases" in said) is (folders == 1)


@pytest.mark.slow
def test_a_key_without_a_network_neither_delays_nor_loses_anything(tmp_path, run_files):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and not listening: connections are refused
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        said = logged(tmp_path, report="", WANDB_API_KEY=KEY, WANDB_BASE_URL=url, WANDB_INIT_TIMEOUT="3")
    assert "Weights & Biases can't be had" in said
    assert "wandb sync --id agent" in said
    assert run_files.steps_of(tmp_path) == [0, 1, 2]
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


@pytest.mark.slow
def test_a_service_that_never_answers_holds_up_neither_the_steps_nor_the_end(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        held = []
        threading.Thread(target=lambda: held.extend(iter(lambda: _accepted(silent), None)), daemon=True).start()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said = logged(
            tmp_path, report="", then="limited", WANDB_API_KEY=KEY, WANDB_BASE_URL=url, WANDB_INIT_TIMEOUT="5"
        )
        silent.shutdown(socket.SHUT_RDWR)
    history = read_history(tmp_path / "shop" / "models" / "agent" / "history.jsonl")
    assert [row["step"] for row in history] == [0, 1, 2]
    assert re.search(r"wandb: \d reports were lost .* busy with opening the run of shop/agent to the end", said)
    for connection in held:
        connection.close()


class Service(BaseHTTPRequestHandler):
    """A fake of wandb's service, which can't be had here: it lets a run begin, and answers nothing else while it is
    told to hang.
    """

    bucket: ClassVar[dict[str, Any]] = {
        "id": "x",
        "name": "agent",
        "displayName": "agent",
        "historyLineCount": 0,
        "config": "{}",
        "project": {"name": "shop", "entity": {"name": "team"}},
    }
    answers: ClassVar[dict[str, Any]] = {
        "ServerFeaturesQuery": {"serverInfo": {"features": []}},
        "Viewer": {"viewer": {"id": "1", "username": "someone", "entity": "team", "flags": "{}"}},
        "RunResumeStatus": {"model": None},
        "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
    }

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        operation = json.loads(body).get("operationName") if self.path == "/graphql" else None
        if operation not in self.answers:
            self.server.ended.wait()  # a service that hangs
            return
        answer = json.dumps({"data": self.answers[operation]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Say nothing on stderr."""


@pytest.mark.slow
def test_metrics_reach_the_files_of_a_run_whose_service_hangs_when_it_is_asked_about_artifacts(tmp_path, run_files):
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as service:
        service.daemon_threads, service.ended = True, threading.Event()
        threading.Thread(target=service.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{service.server_port}"
            process = begun(tmp_path, report="", then="killed", WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
            try:
                deadline = time.monotonic() + 60
                while len(run_files.steps_of(tmp_path, "run-*")) < 3 and time.monotonic() < deadline:
                    time.sleep(0.1)
            finally:
                process.kill()
                process.communicate()
        finally:
            service.ended.set()
            service.shutdown()
    assert run_files.steps_of(tmp_path, "run-*") == [0, 1, 2]


def _accepted(listening):
    try:
        return listening.accept()[0]
    except OSError:
        return None
