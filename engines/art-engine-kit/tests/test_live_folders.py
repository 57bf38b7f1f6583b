"""Folders that somebody else changes while they are walked, measured and removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from art_engine_kit.checkpoint_folder import remove_unfinished, whole_steps
from art_engine_kit.live_folders import bytes_below, entries_in, files_below, largest_file_below, remove_folder

CHURN = """
import os, shutil, sys
root = sys.argv[1]
print("churning", flush=True)
n = 0
while True:
    n += 1
    try:
        new = os.path.join(root, f"d{n % 7}", f"e{n % 3}")
        os.makedirs(new, exist_ok=True)
        with open(os.path.join(new, f"f{n}"), "wb") as file:
            file.write(b"x" * 100)
        if n % 5 == 0:
            os.rename(os.path.join(root, f"d{n % 7}"), os.path.join(root, f"m{n % 4}"))
        if n % 2 == 0:
            shutil.rmtree(os.path.join(root, f"m{n % 3}"), ignore_errors=True)
    except OSError:
        pass
"""


@pytest.fixture
def churning(tmp_path: Path) -> Iterator[Path]:
    """A folder in which another process makes, moves and deletes folders as fast as it can."""
    folder = tmp_path / "churning"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", CHURN, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield folder
    process.kill()
    process.communicate()


def test_a_folder_that_changes_is_walked(churning: Path) -> None:
    seen, rounds = 0, 0
    while seen < 300 or rounds < 300:
        rounds += 1
        seen += sum(size == 100 or size == 0 for _, size in files_below(churning))
        bytes_below(churning)
        largest_file_below(churning)
        entries_in(churning / "d1")


def test_the_churn_is_enough_to_break_a_plain_walk(churning: Path) -> None:
    """What the functions here are for: the same walk with `rglob` raises, sooner or later."""
    with pytest.raises(FileNotFoundError):
        for _ in range(100_000):
            for path in churning.rglob("*"):
                path.stat()


def test_a_folder_that_is_written_to_is_removed(churning: Path) -> None:
    for number in range(40):
        inner = churning / f"d{number % 7}"
        inner.mkdir(exist_ok=True)
        remove_folder(inner)


def test_a_folder_that_is_replaced_as_it_is_opened_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, same, looks = tmp_path / "folder", os.path.samestat, list[int]()
    (folder / "inner").mkdir(parents=True)

    def samestat(one: os.stat_result, other: os.stat_result) -> bool:
        looks.append(1)
        return len(looks) > 1 and same(one, other)

    monkeypatch.setattr(os.path, "samestat", samestat)
    remove_folder(folder)
    assert not folder.exists()
    assert len(looks) > 1


def test_nothing_there_is_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert list(files_below(missing)) == entries_in(missing) == []
    assert bytes_below(missing) == largest_file_below(missing) == 0
    remove_folder(missing)


PRUNE = """
import shutil, sys
from pathlib import Path
from art_engine_kit.checkpoint_folder import saving
root = Path(sys.argv[1])
print("pruning", flush=True)
for step in range(1, 10_000):
    with saving(root / f"{step:04d}", step=step, base_model="b", engine="e") as folder:
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    if step > 3:
        old = root / f"{step - 3:04d}"
        doomed = old.rename(root / f".saving-deleted-{old.name}")
        shutil.rmtree(doomed, ignore_errors=True)
"""


def test_checkpoints_are_listed_while_they_are_saved_and_pruned(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PRUNE, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        last, most = 0, 0
        with warnings.catch_warnings():
            # None may be taken for a corrupt one.
            warnings.simplefilter("error")
            while last < 60:
                steps = whole_steps(tmp_path)
                last, most = max([last, *steps]), max(most, len(steps))
        assert most >= 2
    finally:
        process.kill()
        process.communicate()
    remove_unfinished(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_download_that_is_copied_on_its_way_counts_once(tmp_path: Path) -> None:
    for copy in ("pip-download/model.whl", "wheels/model.whl"):
        (tmp_path / copy).parent.mkdir()
        (tmp_path / copy).write_bytes(b"x" * 1000)
    (tmp_path / "download.log").write_bytes(b"x" * 10)
    assert largest_file_below(tmp_path) == 1000
    assert bytes_below(tmp_path) == 2010


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (outside / "kept").write_bytes(b"x" * 1000)
    (folder / "link").symlink_to(outside)
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    assert bytes_below(folder) < 1000
    remove_folder(folder)
    assert (outside / "kept").exists()


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may remove everything")
def test_what_cannot_be_removed_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").touch()
    (folder / "inner").chmod(0o500)
    code = "import sys; from pathlib import Path; from art_engine_kit.live_folders import remove_folder;"
    command = [sys.executable, "-c", f"{code} remove_folder(Path(sys.argv[1]))", str(folder)]
    like_a_user = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
    done = subprocess.run([*like_a_user, *command], capture_output=True, text=True, timeout=60)
    assert "Permission denied" in done.stderr
    assert (folder / "inner" / "file").exists()
