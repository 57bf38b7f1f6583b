"""Where things of the user's are kept: with a home, without, and for a user that nobody knows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, sys, warnings
from art_engine_kit.user_folders import cache_dir, home_for_processes, state_dir
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    found = [str(cache_dir()), str(state_dir()), str(home_for_processes())]
for folder in found[:2]:
    import os
    os.makedirs(folder, exist_ok=True)
    open(os.path.join(folder, "probe"), "w").close()
print(json.dumps({"found": found, "said": [str(s.message) for s in said]}))
"""
# An ordinary user in place of root, whom nothing is forbidden.
AS_A_USER = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
# Nothing but the folder named next can be written.
READ_ONLY = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && exec "$@"']
# A container's user id that is in no list of users.
AS_NOBODY_KNOWN = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]


def works(command: list[str]) -> bool:
    if not command:
        return True
    tried = [*command, "/tmp", "true"] if command is READ_ONLY else [*command, "true"]
    return shutil.which(command[0]) is not None and subprocess.run(tried, capture_output=True).returncode == 0


def ask(tmp_path: Path, who: list[str], **changes: str | None) -> tuple[list[str], list[str]]:
    """The folders and what was said, with these variables (None: unset)."""
    if not works(who):
        pytest.skip(f"{who[0]} can't be used here")
    env = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path / "home")}
    for variable, value in changes.items():
        if value is None:
            env.pop(variable)
        else:
            env[variable] = value
    (tmp_path / "tmp").mkdir(exist_ok=True)
    who = [*who, str(tmp_path)] if who is READ_ONLY else who
    done = subprocess.run([*who, sys.executable, "-c", CODE], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["found"], answer["said"]


def test_with_a_home_it_is_used(tmp_path: Path) -> None:
    (cache, state, home), said = ask(tmp_path, AS_A_USER)
    assert cache == str(tmp_path / "home/.cache/art")
    assert state == str(tmp_path / "home/.local/state/art")
    assert home == "None"
    assert said == []


@pytest.mark.parametrize(
    ("who", "home"),
    [
        pytest.param(READ_ONLY, "/", id="root folder"),
        pytest.param(READ_ONLY, "/no/such/folder", id="not there"),
        pytest.param(READ_ONLY, "", id="empty"),
        pytest.param(AS_A_USER, "/dev/null", id="no folder"),
        pytest.param(AS_A_USER, "kept", id="not to be written"),
        pytest.param(AS_NOBODY_KNOWN, None, id="unknown user without"),
        pytest.param(AS_NOBODY_KNOWN, "relative", id="relative"),
    ],
)
def test_without_a_home_a_folder_beside_temporary_files_stands_in(
    tmp_path: Path, who: list[str], home: str | None
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o500)
    home = str(kept) if home == "kept" else home
    (cache, state, home_given), said = ask(tmp_path, who, HOME=home)
    user = 12345 if who is AS_NOBODY_KNOWN else os.geteuid()
    folder = tmp_path / "tmp" / f"art-{user}"
    names = ("home/.cache/art", "home/.local/state/art", "home")
    assert [cache, state, home_given] == [str(folder / name) for name in names]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(said) == 2
    assert all("Set HOME" in sentence for sentence in said)
    assert not (tmp_path / "relative").exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
def test_a_temporary_folder_that_is_none_is_passed_over(tmp_path: Path) -> None:
    # In turn, since all make the same folder in the machine's own temporary one, which goes again.
    for tmp in ("/no/such/folder", "/dev/null", ""):
        (cache, _, _), _ = ask(tmp_path, AS_NOBODY_KNOWN, HOME="relative", TMPDIR=tmp)
        assert cache.endswith("/art-12345/home/.cache/art")
        shutil.rmtree(Path(cache).parents[2])


def test_a_folder_of_somebody_elses_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "tmp/art-12345").mkdir(parents=True)
    (tmp_path / "tmp/art-12345").chmod(0o777)
    with pytest.raises(AssertionError, match="no folder of this user's alone"):
        ask(tmp_path, AS_NOBODY_KNOWN, HOME="relative")


def test_the_variable_wins_and_may_be_relative(tmp_path: Path) -> None:
    (cache, _, _), _ = ask(tmp_path, AS_A_USER, ART_CACHE_DIR="here")
    assert cache == str(tmp_path / "here")
