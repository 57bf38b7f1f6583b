"""Several processes at one model: what each logs and keeps is there in the end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

import art

files = pytest.importorskip("art_tracker_files")

PROCESSES, TIMES = 3, 12
CODE = textwrap.dedent("""
    import asyncio, sys, time
    from pathlib import Path
    import art
    import art_tracker_files.trajectory_files

    folder, me, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

    async def main():
        model = art.Model(name="m", project="p", base_path=str(folder), report_metrics=["tracker-files"])
        (folder / f"ready-{me}").touch()
        while not (folder / "go").exists():
            time.sleep(0.001)
        for i in range(times):
            model.merge_state({f"{me}-{i}": i, "last": me})
            group = art.TrajectoryGroup([art.Trajectory(metadata={"by": me, "n": i})], logs=[f"{me}-{i}"])
            await model.log([group], metrics={f"loss/{me}": i}, step=1, split="train")

    asyncio.run(main())
""")


@pytest.mark.slow
def test_nothing_of_what_processes_log_and_merge_at_once_is_dropped(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", CODE, str(tmp_path), str(n), str(TIMES)])
        for n in range(PROCESSES)
    ]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < PROCESSES and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [process.wait(timeout=120) for process in running] == [0] * PROCESSES
    model = art.Model(name="m", project="p", base_path=str(tmp_path))
    every = {(str(process), n) for process in range(PROCESSES) for n in range(TIMES)}
    folder = model._folder()
    groups = files.read_trajectories(folder / "trajectories" / "train" / "0001.parquet")
    assert sorted((group[0].metadata["by"], group[0].metadata["n"]) for group in groups) == sorted(every)
    assert sorted(group.logs[0] for group in groups) == sorted(f"{process}-{n}" for process, n in every)
    records = files.read_history(folder / "history.jsonl")
    assert sorted((k[5:], int(v)) for r in records for k, v in r.items() if k.startswith("loss/")) == sorted(every)
    state = model.read_state()
    assert state is not None
    assert {name: n for name, n in state.items() if name != "last"} == {f"{process}-{n}": n for process, n in every}
    left = {path.name for path in folder.parent.iterdir()} | {path.name for path in folder.rglob("*")}
    assert not [name for name in left if name.startswith(".") and not name.endswith(".lock")]


def test_who_dies_while_writing_keeps_nobody_waiting(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import os, sys
        import art, art.model

        def dies(*_):
            os._exit(7)

        art.model.write_json_atomically = dies
        art.Model(name="m", project="p", base_path=sys.argv[1]).merge_state({"a": 1})
    """)
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False).returncode == 7
    model = art.Model(name="m", project="p", base_path=str(tmp_path))
    assert model.merge_state({"b": 2}) == {"b": 2}


def test_who_waits_too_long_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("art.model.STATE_LIMIT_S", 0.05)
    model = art.Model(name="m", project="p", base_path=str(tmp_path))
    model.merge_state({"a": 1})
    with ThreadPoolExecutor() as other, FileLock(tmp_path / "p" / "models" / ".m.state.lock"):
        merging = other.submit(model.merge_state, {"b": 2})
        with pytest.raises(TimeoutError, match=r"another process has been merging into .*state\.json for 0.05 s.*lock"):
            merging.result(timeout=60)
    assert model.merge_state({"c": 3}) == {"a": 1, "c": 3}


async def test_a_log_that_waits_too_long_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("art_tracker_files.plugin.LOCK_LIMIT_S", 0.05)
    model = art.Model(name="m", project="p", base_path=str(tmp_path))
    await model.log(metrics={"loss/a": 1}, step=1)
    with (
        FileLock(tmp_path / "p" / "models" / ".m.log.lock"),
        pytest.warns(RuntimeWarning, match=r"'tracker-files' failed in art_log_metrics: TimeoutError: another process"),
    ):
        await model.log(metrics={"loss/a": 2}, step=2)
    await model.log(metrics={"loss/a": 3}, step=3)
    assert [record["step"] for record in files.read_history(model._folder() / "history.jsonl")] == [1, 3]
