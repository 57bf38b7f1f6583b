"""LocalBackend on machines as people have them: working folders with names that shadow, proxies, no home, odd users and
locales, clocks that jump, folders deleted underneath. On the fake engines, with everything really so.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings

import psutil
import pytest

from art_backend_local import PathUnusable
from art_backend_local.wire.host_files import HostRecord, known_hosts, read_host, write_host
from art_core.errors import BackendUnreachable
from art_runtime.process_identity import identity_of, process_lives

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

USER_CODE = """
    import asyncio, json, sys, warnings
    from types import SimpleNamespace
    from art_backend_local import LocalBackend
    from art_core import Trajectory, TrajectoryGroup

    path, base, in_process = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
    model = SimpleNamespace(name="m", project="p", entity=None, base_model=base, internal_config={})
    groups = [TrajectoryGroup([Trajectory(reward=0.0), Trajectory(reward=1.0)])]

    async def main():
        backend = LocalBackend(path=path, in_process=in_process, inference_engine="fake", training_engine="fake",
                               show_progress=False)
        async with backend:
            await backend.register(model)
            print(json.dumps({"step": (await backend.train(model, groups)).step}))

    asyncio.run(main())
"""
AS_A_USER = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
AS_NOBODY_KNOWN = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]


def works(command):
    return not command or (
        shutil.which(command[0]) is not None and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    )


@pytest.fixture
def train_once(base, fake_engines, tmp_path, end_host):
    """Run a script that trains one step: `train_once(env={...}, who=[...])`. Gives the finished process."""
    script = tmp_path / "scripts" / "train.py"
    script.parent.mkdir()
    script.write_text(textwrap.dedent(USER_CODE))
    folder = tmp_path / "working"
    folder.mkdir()
    path = tmp_path / "art"

    def run(*, env=None, who=(), in_process=True, path=path):
        if not works(list(who)):
            pytest.skip(f"{who[0]} can't be used here")
        variables = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
        command = [*who, sys.executable, str(script), str(path), str(base), str(in_process)]
        return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder, timeout=200)

    run.folder = folder
    yield run
    end_host(path)


def assert_trained(done):
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert json.loads(done.stdout.splitlines()[-1]) == {"step": 1}


STANDARD = ["secrets", "logging", "queue", "signal", "socket", "struct", "random", "typing"]
PACKAGES = ["art_core", "art_backend_local", "art_fake_engine", "numpy", "safetensors", "uvicorn", "orjson"]


def lay_traps(folder, modules, packages):
    """Modules and packages that end whatever imports them."""
    for name in (*(f"{module}.py" for module in modules), *(f"{package}/__init__.py" for package in packages)):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("raise SystemExit('imported from the working folder')\n")


def test_what_lies_in_the_working_folder_is_not_imported(train_once):
    lay_traps(train_once.folder, [*STANDARD, "sitecustomize", "usercustomize"], PACKAGES)
    assert_trained(train_once())


def test_nor_when_a_colon_too_many_names_the_working_folder(train_once):
    """As in PYTHONPATH=$UNSET:more; the script itself then imports from there, so these are what it doesn't import."""
    lay_traps(train_once.folder, [], ["uvicorn", "starlette", "art_gateway"])
    assert_trained(train_once(env={"PYTHONPATH": f":{os.environ['PYTHONPATH']}"}))


ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NO_FILE = dict.fromkeys(("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), "/no/such/file")


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": None, "no_proxy": None}, id="HTTP_PROXY"),
        pytest.param({"all_proxy": "socks5://127.0.0.1:9", "NO_PROXY": None, "no_proxy": None}, id="all_proxy"),
        pytest.param(NO_FILE, id="certificates"),
        pytest.param({"TMPDIR": "/no/such/folder"}, id="TMPDIR"),
        pytest.param({"TMPDIR": "/dev/null", "TEMP": "", "TMP": ""}, id="TMPDIR is a file"),
        pytest.param({"PYTHONWARNINGS": "error"}, id="warnings are errors"),
        pytest.param({"PYTHONOPTIMIZE": "2", "PYTHONIOENCODING": "ascii:strict"}, id="no asserts, ASCII output"),
        pytest.param(ASCII, id="plain ASCII"),
        pytest.param({"TERM": "dumb", "COLUMNS": "1", "PATH": "/no/such/folder"}, id="no PATH"),
    ],
)
def test_variables_that_break_other_programs(train_once, env):
    assert_trained(train_once(env=env))


NO_HOMES = [
    pytest.param(AS_A_USER, {"HOME": "/dev/null", "XDG_STATE_HOME": None}, id="no folder"),
    pytest.param(AS_NOBODY_KNOWN, {"HOME": None, "XDG_STATE_HOME": None, "USER": None}, id="unknown user without"),
    pytest.param(AS_NOBODY_KNOWN, {"HOME": "kept", "XDG_STATE_HOME": "/dev/null", "LOGNAME": None}, id="not its own"),
]


@pytest.mark.parametrize(("who", "env"), NO_HOMES)
@pytest.mark.parametrize("in_process", [True, False])
def test_a_home_is_not_needed(train_once, tmp_path, who, env, in_process):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "kept").mkdir(mode=0o500)
    env = {**env, "TMPDIR": str(tmp_path / "tmp")}
    if env["HOME"] == "kept":
        env["HOME"] = str(tmp_path / "kept")
    done = train_once(env=env, who=who, in_process=in_process)
    assert_trained(done)
    if not in_process:
        # The host is found all the same, from anywhere.
        listed = [*who, sys.executable, "-m", "art_core", "ps", "--json"]
        variables = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
        told = subprocess.run(listed, capture_output=True, text=True, env=variables, check=True, cwd=tmp_path)
        assert str(tmp_path / "art") in told.stdout


def test_without_a_place_for_the_list_the_host_is_left_out_of_it_with_a_word(train_once, tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / f"art-{os.geteuid()}").write_text("in the way")
    env = {"HOME": "/dev/null", "XDG_STATE_HOME": None, "XDG_CACHE_HOME": None, "TMPDIR": str(tmp_path / "tmp")}
    assert_trained(train_once(env=env))
    assert "art down --path" in (tmp_path / "art/logs/host.log").read_text()


async def test_a_path_that_cannot_be_used_is_said_before_anything_starts(tmp_path, new_backend, policy):
    file = tmp_path / "file"
    file.write_text("mine")
    for path, words in (
        (file, f"{file} is a file, and path="),
        (file / "below", f"{file} is a file, and path="),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / os.fsdecode(b"caf\xe9"), "is no text in UTF-8"),
    ):
        with pytest.raises(PathUnusable, match=words.replace("(", r"\(")) as raised:
            await new_backend(path).register(policy)
        assert "path" in str(raised.value)
        assert len(str(raised.value)) < 1000
    assert file.read_text() == "mine"


@pytest.mark.skipif(not works(AS_A_USER), reason="root may write everywhere")
def test_a_path_that_is_somebody_elses_is_said(train_once, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o500)
    done = train_once(who=AS_A_USER, path=kept)
    assert "PathUnusable" in done.stderr
    assert "can't be written by this user" in done.stderr
    done = train_once(who=AS_A_USER, path=kept / "below")
    assert "Permission denied" in done.stderr.splitlines()[-1]


def test_a_working_folder_that_was_deleted_is_said(tmp_path):
    code = """
        import os, sys
        os.chdir(sys.argv[1]); os.rmdir(sys.argv[1])
        from art_backend_local import LocalBackend
        for path in (None, "relative"):
            try:
                LocalBackend(path=path, inference_engine=None)
            except OSError as error:
                print(type(error).__name__, error)
    """
    folder = tmp_path / "gone"
    folder.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("PathUnusable") == 2, done.stderr
    assert "Give an absolute one" in done.stdout


async def test_a_path_of_other_characters_than_letters(tmp_path, new_backend, policy, groups):
    for name in ("with space", "ünï-码", "a'b\"c;$(d)", "%41{x}", "line\nbreak", "-dash"):
        async with new_backend(tmp_path / name / "art") as backend:
            await backend.register(policy)
            assert (await backend.train(policy, groups)).step == 1


def test_a_path_that_the_locale_cannot_write_is_said(train_once, tmp_path):
    (tmp_path / "ünï").mkdir()
    done = train_once(env=ASCII, path=tmp_path / "ünï" / "art")
    assert "PYTHONUTF8=1" in done.stderr.splitlines()[-1], done.stderr


CLOCK = """
import os, sys, time
# Whatever asks for the time is told another: Python's own clock, and the kernel's table from which psutil takes it.
ahead = float(os.environ.get("ART_TEST_CLOCK_AHEAD", "0"))
real = time.time
time.time = lambda: real() + ahead
import psutil
boot = psutil.boot_time()
psutil._pslinux.boot_time = lambda: boot + ahead
"""


async def test_a_clock_that_jumps_moves_no_process(tmp_path, new_backend, policy, end_host):
    """The clock is set forward by 30 s after the host has begun; seen from there, every process began later."""
    async with new_backend(tmp_path / "art", in_process=False) as backend:
        await backend.register(policy)
        record = read_host(tmp_path / "art")
    code = CLOCK + textwrap.dedent("""
        from pathlib import Path
        from art_backend_local.wire.host_files import read_host
        record = read_host(Path(sys.argv[1]))
        print(record.alive, abs(psutil.Process(record.pid).create_time() - float(sys.argv[2])) > 20)
    """)
    import psutil

    began = psutil.Process(record.pid).create_time()
    command = [sys.executable, "-c", code, str(tmp_path / "art"), str(began)]
    env = {**os.environ, "ART_TEST_CLOCK_AHEAD": "30"}
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    # Alive to us, while by the clock it would be another process.
    assert done.stdout.split() == ["True", "True"]
    async with new_backend(tmp_path / "art", in_process=False) as backend:
        await backend.register(policy)
        assert read_host(tmp_path / "art") == record
    end_host(tmp_path / "art")


def test_a_number_that_was_given_again_is_another_process():
    me = identity_of(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert identity_of(child.pid) != me
        assert process_lives(child.pid, identity_of(child.pid))
        assert not process_lives(child.pid, me)
    finally:
        child.kill()
        child.communicate()
    assert not process_lives(child.pid, None)
    with pytest.raises(ProcessLookupError):
        identity_of(2**22 + 1)


@pytest.mark.parametrize("how", ["deleted", "moved away", "deleted and made again"])
async def test_a_host_whose_path_is_gone_is_seen_and_ends(tmp_path, new_backend, policy, groups, until, end_host, how):
    path = tmp_path / "art"
    async with new_backend(path, in_process=False) as backend:
        await backend.register(policy)
    first = read_host(path)
    os.kill(first.pid, signal.SIGSTOP)
    shutil.move(path, tmp_path / "elsewhere")
    if how == "deleted":
        shutil.rmtree(tmp_path / "elsewhere")
    elif how == "deleted and made again":
        path.mkdir()
    # While it still runs, it is listed, and another path has no part in it.
    assert (path, first) in known_hosts()
    assert read_host(tmp_path / "elsewhere") is None
    os.kill(first.pid, signal.SIGCONT)
    async with new_backend(path, in_process=False) as backend:
        await backend.register(policy)
        assert (await backend.train(policy, groups)).step == 1
        assert read_host(path).pid != first.pid
        await until(lambda: not first.alive)
        assert [record for where, record in known_hosts() if where == path] == [read_host(path)]
    end_host(path)


async def test_a_host_whose_path_is_gone_can_be_ended_by_that_path(tmp_path, new_backend, policy, until):
    path = tmp_path / "art"
    async with new_backend(path, in_process=False) as backend:
        await backend.register(policy)
    record = read_host(path)
    # It would see by itself that its path is gone, and end before it is told to.
    os.kill(record.pid, signal.SIGSTOP)
    shutil.rmtree(path)
    command = [sys.executable, "-m", "art_core", "down", "--path", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as down:
        asks = psutil.Process(down.pid)
        await until(lambda: record.port in {c.raddr.port for c in asks.net_connections("tcp") if c.raddr})
        os.kill(record.pid, signal.SIGCONT)
        said, _ = await asyncio.to_thread(down.communicate, timeout=120)
    assert "has ended" in said
    assert not record.alive


async def test_a_client_whose_path_is_deleted_is_told_and_may_register_again(tmp_path, new_backend, policy, groups):
    path = tmp_path / "art"
    async with new_backend(path) as backend:
        await backend.register(policy)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            shutil.rmtree(path)
            with pytest.raises(BackendUnreachable):
                for _ in range(600):
                    await backend.get_step(policy)
                    await asyncio.sleep(0.05)
        assert any("deleted or moved away" in str(warning.message) for warning in said)
        await backend.register(policy)
        assert (await backend.train(policy, groups)).step == 1


async def test_a_record_that_is_deleted_is_written_again(tmp_path, new_backend, policy, until):
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        record = read_host(tmp_path / "art")
        (tmp_path / "art/host.json").unlink()
        await until(lambda: read_host(tmp_path / "art") == record)


async def test_a_copied_folder_has_no_part_in_the_host_of_the_first(tmp_path, new_backend, policy, groups, end_host):
    """Else its models would be trained and served from the folder that it was copied from."""
    first, second = tmp_path / "first", tmp_path / "second"
    async with new_backend(first, in_process=False) as backend:
        await backend.register(policy)
        shutil.copytree(first, second)
        async with new_backend(second, in_process=False) as other:
            await other.register(policy)
            assert read_host(second).pid != read_host(first).pid
            assert (await other.train(policy, groups)).step == 1
            assert await backend.get_step(policy) == 0
    end_host(first)
    end_host(second)


async def test_a_path_held_by_a_process_that_cannot_be_seen_is_said(tmp_path, new_backend, policy, monkeypatch):
    """As by a host in another container: the lock is held, and its record means nobody here."""
    from art_backend_local.wire.host_files import lock_path

    monkeypatch.setattr("art_backend_local.client.host_start.LEAVING_LIMIT_S", 0.5)
    path = tmp_path / "art"
    path.mkdir()
    gone = HostRecord(path=str(path), pid=2**22 - 7, identity="another-boot/1", port=1, version="0", token="t")
    write_host(path, gone)
    lock = lock_path(path)
    try:
        code = "import asyncio, sys; from art_backend_local.client import host_start; from pathlib import Path\n"
        code += "host_start.LEAVING_LIMIT_S = 0.5\n"
        code += "asyncio.run(host_start.start_host(Path(sys.argv[1]), in_process=True, idle_timeout_s=1))"
        command = [sys.executable, "-c", code, str(path)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    finally:
        lock.release()
    assert "held by a process that can't be seen from here" in done.stderr
