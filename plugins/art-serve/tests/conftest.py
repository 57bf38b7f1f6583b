"""`art serve` as a real process on the fake engines or on torch, and what its tests ask it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from art_serve import database, keys
from art_serve.commands import serve_cli

# Beside this file, and no package's.
sys.path.insert(0, str(Path(__file__).parent))
# The fake engines are the local backend's own; they compute no model, and everything around them is real.
FAKE_PLUGIN = Path(__file__).parents[2] / "art-backend-local" / "tests" / "fake_plugin"
real_postgresql = import_module("real_postgresql")
ART = [sys.executable, "-m", "art_core"]
JSON = dict[str, Any]
GROUPS = [{"trajectories": [{"messages_and_choices": [], "reward": 0.0}, {"messages_and_choices": [], "reward": 1.0}]}]


class ArtServe:
    """A server of one data folder, and its keys. It can be killed and started again; the port changes then."""

    def __init__(self, folder: Path, options: list[str], environment: dict[str, str]) -> None:
        self.data = folder / "data"
        self.log = folder / "server.log"
        self.orders = folder / "orders.json"
        self.url = ""
        self.verify: Any = True
        self._options = options
        self._environment = {**os.environ, **environment, "ART_FAKE_ORDERS": str(self.orders)}
        self._process: subprocess.Popen[str] | None = None
        self._clients = ExitStack()
        self.order()

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        command = [*ART, "serve", "--data", str(self.data), "--port", "0", *self._options]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment
            )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said, self.log.read_text()[-3000:]
        self.url = said.split()[-1]

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, and it is dead."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; gives the exit status."""
        return self._end(signal.SIGTERM)

    def _end(self, how: int) -> int:
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.send_signal(how)
        status = process.wait(60)
        assert process.stdout is not None
        process.stdout.close()
        return status

    def close(self) -> None:
        """End it, with everything below it."""
        self._clients.close()
        self.stop()
        path = self.data / "backend"
        subprocess.run([*ART, "down", "--path", str(path)], check=False, capture_output=True, timeout=120)

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """`art serve` on its data, for a server that isn't to start."""
        command = [*ART, "serve", "--data", str(self.data), "--port", "0", *self._options, *options]
        return subprocess.run(command, capture_output=True, text=True, env=self._environment, timeout=60)

    def keys(self, *arguments: str) -> Result:
        """`art serve keys …` on its data."""
        return CliRunner().invoke(serve_cli, ["keys", *arguments, "--data", str(self.data)])

    def key(self, entity: str) -> str:
        """A new key, as `art serve keys create` makes it."""
        self.data.mkdir(exist_ok=True)
        engine = database.open_database(self._environment.get("ART_SERVE_DATABASE") or self.data / "state.sqlite")
        try:
            return keys.create_key(engine, entity)
        finally:
            engine.dispose()

    def client(self, key: str) -> Client:
        """A client with this key."""
        client = Client(self, key)
        self._clients.callback(client.close)
        return client

    def order(self, **orders: Any) -> None:
        """Orders for the fake engines, in place of all earlier ones."""
        temporary = self.orders.with_suffix(".new")
        temporary.write_text(json.dumps(orders))
        temporary.replace(self.orders)

    def trained(self, name: str) -> list[int]:
        """The steps of a model that the fake training worker began, over all its lives."""
        logs = sorted((self.data / "backend" / "logs").glob("training-fake*.log*"))
        words = rf"job begun .*/{re.escape(name)}@([0-9]+)"
        return [int(step) for log in logs for step in re.findall(words, log.read_text())]


class Client:
    """What tests ask a server, wherever it listens now."""

    def __init__(self, server: ArtServe, key: str) -> None:
        self._server = server
        self.key = key
        # With fewer idle connections than threads, httpcore's pool may close one that a thread has just taken, and that
        # thread's answer never comes.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"},
            timeout=120,
            limits=limits,
            verify=server.verify,
            follow_redirects=False,
        )

    @property
    def url(self) -> str:
        """The base URL."""
        return self._server.url

    def close(self) -> None:
        self._http.close()

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Any request under the base URL."""
        return self._http.request(method, self._server.url + path, **options)

    def model(self, name: str = "m", *, project: str = "p", **fields: Any) -> str:
        """Make a model or find it; gives its id."""
        body = {"project": project, "name": name, "base_model": "tiny", "return_existing": True, **fields}
        return str(self.json("POST", "/preview/models", json=body)["id"])

    def json(self, method: str, path: str, **options: Any) -> Any:
        """The answer to a request that works."""
        answer = self.ask(method, path, **options)
        assert answer.is_success, f"{answer.status_code} {answer.text[:2000]}"
        return answer.json()

    def submit(self, model_id: str, *, key: str | None = None, groups: Any = None, **config: Any) -> str:
        """Queue a step; gives the job's id."""
        body = {"model_id": model_id, "trajectory_groups": groups or GROUPS, "experimental_config": config or None}
        headers = {} if key is None else {"Idempotency-Key": key}
        return str(self.json("POST", "/preview/training-jobs", json=body, headers=headers)["id"])

    def events(self, job_id: str) -> Iterator[JSON]:
        """The events of a job until its last."""
        after: dict[str, str] = {}
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for event in self.json("GET", f"/preview/training-jobs/{job_id}/events", params=after)["data"]:
                yield event
                after = {"after": event["id"]}
                if event["type"] in ("training_ended", "training_failed"):
                    return
        raise AssertionError(f"the job {job_id} did not end")

    def ended(self, job_id: str) -> JSON:
        """The last event of a job."""
        return list(self.events(job_id))[-1]

    def steps(self, model_id: str) -> list[int]:
        """The steps that are kept."""
        page = self.json("GET", f"/preview/models/{model_id}/checkpoints")
        return [kept["step"] for kept in page["data"]]

    def until(self, found: Callable[[], Any], *, limit_s: float = 60) -> Any:
        """Wait until something is so."""
        deadline = time.monotonic() + limit_s
        while not (value := found()):
            assert time.monotonic() < deadline, "it never was so"
            time.sleep(0.02)
        return value


@contextmanager
def serve_in(
    folder: Path, base: Path, *options: str, engine: str = "fake", start: bool = True, database: str = ""
) -> Iterator[ArtServe]:
    """A server whose only base model is `tiny`."""
    folder.mkdir(exist_ok=True)
    environment = {"ART_SERVE_DATABASE": database} if database else {}
    if engine == "fake":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FAKE_PLUGIN), os.environ.get("PYTHONPATH"))))
    engines = ["--inference-engine", engine, "--training-engine", engine]
    server = ArtServe(folder, [*engines, "--base-model", f"tiny={base}", *options], environment)
    try:
        if start:
            server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def serving() -> Any:
    """Serve in a folder: `with serving(folder, base, engine="torch") as server`."""
    return serve_in


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, own_tiny_model: Path) -> Iterator[ArtServe]:
    """One server on the fake engines for the tests of a module; each takes an entity of its own."""
    with serve_in(tmp_path_factory.mktemp("serve"), own_tiny_model) as server:
        yield server


@pytest.fixture
def client(server: ArtServe, entity: str) -> Client:
    """A client of an entity that no other test has."""
    return server.client(server.key(entity))


@pytest.fixture
def entity(request: pytest.FixtureRequest) -> str:
    """A name made of the test's own."""
    return re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[-60:].strip("-")


@pytest.fixture
def own_server(tmp_path: Path, own_tiny_model: Path) -> Iterator[Callable[..., ArtServe]]:
    """Makes a server of the test's own: `own_server("--waiting-jobs", "1")`."""
    with ExitStack() as stack:

        def make(*options: str, **how: Any) -> ArtServe:
            return stack.enter_context(serve_in(tmp_path / "own", own_tiny_model, *options, **how))

        yield make


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Any]:
    """A PostgreSQL that the tests start; they are skipped where none is installed."""
    if why := real_postgresql.missing():
        pytest.skip(why)
    with real_postgresql.postgresql() as running:
        yield running


@pytest.fixture
def own_postgresql() -> Iterator[Any]:
    """A PostgreSQL of the test's own, which it may stop and start."""
    if why := real_postgresql.missing():
        pytest.skip(why)
    with real_postgresql.postgresql() as running:
        yield running


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an empty database is: a file, and a real PostgreSQL."""
    if request.param == "sqlite":
        return str(tmp_path / "state.sqlite")
    return str(request.getfixturevalue("postgresql").new_database())


@pytest.fixture
def postgresql_url(postgresql: Any) -> str:
    """The URL of an empty database."""
    return str(postgresql.new_database())
