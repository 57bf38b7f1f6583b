"""A backend on the fake engines, and what its tests look at: who answers, what the engines' logs say, which hooks are
called.
"""

import asyncio
import json
import os
import subprocess
import sys
import textwrap
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from openai import AsyncOpenAI

from art.dev import read_internal_config
from art_core import Trajectory, TrajectoryGroup, hookimpl, installed_plugins
from art_engine_kit.checkpoint_folder import read_manifest
from art_runtime.process_identity import identity_of

FAKE_PLUGIN = Path(__file__).parent / "fake_plugin"


class Policy:
    """The least that a backend may know of a model."""

    def __init__(self, name="m", *, base_model, project="p", config=None):
        self.name, self.project, self.entity, self.base_model = name, project, None, str(base_model)
        self.internal_config = read_internal_config(config or {})


@pytest.fixture(scope="session")
def base(own_tiny_model):
    return own_tiny_model


@pytest.fixture
def groups():
    return [TrajectoryGroup([Trajectory(reward=0.0), Trajectory(reward=1.0)])]


@pytest.fixture(scope="module")
def fake_plugin(tmp_path_factory):
    """The fake engines' plugin is installed, for this process and for the hosts that it starts; gives their orders."""
    folder = tmp_path_factory.mktemp("fakes")
    with pytest.MonkeyPatch.context() as patch:
        python_path = os.pathsep.join(filter(None, (str(FAKE_PLUGIN), os.environ.get("PYTHONPATH"))))
        patch.setenv("PYTHONPATH", python_path)
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("ART_FAKE_ORDERS", str(folder / "orders.json"))
        patch.syspath_prepend(str(FAKE_PLUGIN))
        installed_plugins.cache_clear()
        yield folder / "orders.json"
        installed_plugins.cache_clear()
        for name in [name for name in sys.modules if name.startswith("art_fake_engine")]:
            del sys.modules[name]


@pytest.fixture
def fake_engines(fake_plugin):
    """Set orders for the fake engines: `fake_engines(refuse_load=True)` replaces all earlier ones."""

    def give(**wanted):
        temporary = fake_plugin.with_suffix(".new")
        temporary.write_text(json.dumps(wanted))
        temporary.replace(fake_plugin)

    give()
    yield give
    give()


def make_backend(path, **options):
    """A backend on the fake engines."""
    from art_backend_local import LocalBackend

    return LocalBackend(
        **{
            "path": path,
            "in_process": True,
            "inference_engine": "fake",
            "training_engine": "fake",
            "show_progress": False,
            **options,
        }
    )


@pytest.fixture(scope="module")
def shared_path(fake_plugin, tmp_path_factory):
    """The path of one host for all tests of a module; each test has a project of its own."""
    path = tmp_path_factory.mktemp("backend") / "art"
    yield path
    take_down(path)


@pytest.fixture
async def backend(shared_path, fake_engines):
    """A client of the host that the tests of a module share."""
    async with make_backend(shared_path, in_process=False, max_adapters=300) as backend:
        yield backend


def take_down(path):
    """End the host at `path`, with all that it runs."""
    subprocess.run([sys.executable, "-m", "art_core", "down", "--path", str(path)], check=True, capture_output=True)


async def wait_until(condition, limit_s=60):
    """Wait until `condition()` is true; gives what it gave."""
    async with asyncio.timeout(limit_s):
        while not (found := condition()):
            await asyncio.sleep(0.02)
        return found


@pytest.fixture
def said_by_engine():
    """Wait until a fake engine has said something (so many times), and give its log:
    `await said_by_engine(backend.path, "training", "job begun p/m@1")`.
    """

    async def wait(path, kind, words, *, times=1):
        def look():
            logs = [log.read_text() for log in (path / "logs").glob(f"{kind}-fake*.log")]
            return next((log for log in logs if log.count(words) >= times), None)

        return await wait_until(look)

    return wait


@pytest.fixture
def new_backend(fake_engines):
    """Make a backend of the test's own: `new_backend(path, **options)`."""
    return make_backend


@pytest.fixture
def project():
    return f"p-{uuid4().hex[:8]}"


@pytest.fixture
def make_policy(base, project):
    def make(name="m", *, fp32=False, **fields):
        """`fp32`: where answers are held against an oracle's, since in bf16, which some CPUs compute in, they differ
        by as much as one adapter from the next.
        """
        config = {"engine_args": {"dtype": "float32"}, "init_args": {"dtype": "float32"}} if fp32 else None
        return Policy(name, **{"base_model": base, "project": project, "config": config, **fields})

    return make


@pytest.fixture
def policy(make_policy):
    return make_policy()


@pytest.fixture
def checkpoints(project):
    """The checkpoints' folder of a model under a backend's path."""
    return lambda backend, name="m": backend.path / project / "models" / name / "checkpoints"


class Client(AsyncOpenAI):
    """An OpenAI client that can tell whom it hears."""

    async def served_by(self, name="m"):
        """Which step answers, and the logprob by which its weights are known."""
        answer = await self.chat.completions.create(model=name, messages=[{"role": "user", "content": "hello"}])
        return answer.model, round(answer.choices[0].logprobs.content[0].logprob, 6)


@pytest.fixture
async def client():
    """Makes an OpenAI client for a registration."""
    async with AsyncExitStack() as stack:

        def make(registration):
            made = Client(
                base_url=registration.inference_base_url, api_key=registration.inference_api_key, max_retries=0
            )
            stack.push_async_callback(made.close)
            return made

        yield make


class Recorder:
    """A plugin that writes down which hooks were called; `refuse` names one that raises."""

    art_api = 1

    def __init__(self):
        self.calls, self.refuse, self.gradient_steps = [], "", []

    def note(self, hook, what=None):
        self.calls.append((hook, what))
        if hook == self.refuse:
            raise RuntimeError(f"refused at {hook}")

    @hookimpl
    def art_before_train(self, step):
        self.note("before_train", step)

    @hookimpl
    def art_before_publish_checkpoint(self, checkpoint):
        self.note("before_publish", checkpoint.step)

    @hookimpl
    def art_checkpoint_saved(self, checkpoint):
        assert read_manifest(checkpoint.path).step == checkpoint.step
        self.note("saved", checkpoint.step)

    @hookimpl
    async def art_gradient_step(self, step, done, total, metrics):
        await asyncio.sleep(0)
        self.gradient_steps.append((step, done, total, metrics, [hook for hook, _ in self.calls]))

    @hookimpl
    def art_checkpoint_published(self, checkpoint, receipt):
        assert set(receipt.seconds) == {"checked", "loaded", "verified", "routed"}
        self.note("published", checkpoint.step)

    @hookimpl
    def art_checkpoint_publish_failed(self, checkpoint, error):
        assert read_manifest(checkpoint.path).step == checkpoint.step
        self.note("publish_failed", checkpoint.step)

    @hookimpl
    def art_after_train(self, result):
        self.note("after_train", result.step)

    @hookimpl
    def art_train_failed(self, step, error):
        self.note("train_failed", step)

    @hookimpl
    def art_checkpoint_deleted(self, checkpoint):
        assert not checkpoint.path.exists()
        self.note("deleted", checkpoint.step)


@pytest.fixture
def recorder(fake_engines):
    plugin = Recorder()
    installed_plugins().register(plugin, "recorder")
    yield plugin
    installed_plugins().unregister("recorder")


CLIENT = """
    import asyncio, json, signal, sys
    from types import SimpleNamespace
    from art_backend_local import LocalBackend
    from art_core import Trajectory, TrajectoryGroup

    path, base, project, in_process = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "True"
    model = SimpleNamespace(name="m", project=project, entity=None, base_model=base, internal_config={})
    groups = [TrajectoryGroup([Trajectory(reward=0.0), Trajectory(reward=1.0)])]

    def say(**what):
        print(json.dumps(what), flush=True)

    async def main():
        backend = LocalBackend(path=path, in_process=in_process, inference_engine="fake", training_engine="fake",
                               show_progress=False)
        async with backend:
            await backend.register(model)
            say(registered=await backend.get_step(model))
            %s

    # Tests that run in the background of a shell inherit an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        say(interrupted=True)
        raise
"""


class ClientProcess(subprocess.Popen):
    """A client in a process of its own, which says JSON."""

    def said(self, key):
        """Read what it says until it says `key`, and give the value."""
        for line in self.stdout:
            value = json.loads(line)
            if key in value:
                return value[key]
        raise AssertionError(f"the client ended without saying {key}: {self.stderr.read()[-3000:]}")

    def kill_and_wait(self):
        """SIGKILL, and it is dead: until then its path is rightly in use."""
        self.kill()
        self.wait(20)

    def below(self):
        """The processes below it, with what tells them from others of their numbers."""
        return [(p.pid, identity_of(p.pid)) for p in psutil.Process(self.pid).children(recursive=True)]


@pytest.fixture
def run_client(base, project, fake_engines):
    """Run client code in a process of its own; gives the process. Killed in the end."""
    started = []

    def run(path, code="await asyncio.sleep(600)", *, in_process=True):
        body = textwrap.dedent(CLIENT) % textwrap.indent(textwrap.dedent(code), " " * 8).strip()
        command = [sys.executable, "-c", body, str(path), str(base), project, str(in_process)]
        started.append(ClientProcess(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def until():
    """`await until(condition, limit_s=60)`: wait until `condition()` is true."""
    return wait_until


@pytest.fixture
def programs():
    """`programs(pid, word)`: the processes below `pid` whose command lines have `word`."""

    def find(pid, word):
        found = []
        for child in psutil.Process(pid).children(recursive=True):
            # Some end on their own between being listed and being looked at.
            with suppress(psutil.NoSuchProcess):
                line = child.cmdline()
                if any(word in part for part in line) and not any("tether" in part for part in line):
                    found.append(child)
        return found

    return find


@pytest.fixture
def program(programs):
    """`program(pid, word)`: the first of these processes."""

    def find(pid, word):
        found = programs(pid, word)
        assert found, f"no process of {word}"
        return found[0]

    return find


@pytest.fixture
def end_host():
    """`end_host(path)`: end the host at `path`, with all that it runs."""
    return take_down


@pytest.fixture
def ps():
    """`await ps(path)`: what `art ps` says of the host at `path`."""

    async def listed(path):
        command = [sys.executable, "-m", "art_core", "ps", "--json"]
        told = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        (host,) = [host for host in json.loads(told.stdout) if host["path"] == str(path)]
        return host

    return listed
