"""`make names`, asked of a package index of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("index_names.py")


class Index(ThreadingHTTPServer):
    """Serves what is put into it, on loopback; everything is asked of it with one `status` when that is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Pages)
        self.url = f"http://127.0.0.1:{self.server_port}/simple"
        self.pages: dict[str, bytes] = {}
        self.status: int | None = None

    def add(self, project: str, file: Path) -> None:
        self.pages[f"/simple/{project}/"] = f'<a href="/files/{file.name}">{file.name}</a>'.encode()
        self.pages[f"/files/{file.name}"] = file.read_bytes()


class Pages(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        content = self.server.pages.get(self.path)
        self.send_response(self.server.status or (404 if content is None else 200))
        self.send_header("Content-Type", "application/octet-stream" if "/files/" in self.path else "text/html")
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[Index]:
    with Index() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def names(index: Index, tmp_path: Path) -> Callable[[], subprocess.CompletedProcess[str]]:
    """Run the script against the index, and against nothing else that this machine is configured with."""

    def run() -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("PIP_", "UV_"))}
        settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index.url, "UV_HTTP_RETRIES": "0", "NO_PROXY": "*"}
        env = {**kept, **settings}
        return subprocess.run(
            [sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True, timeout=200, check=False
        )

    return run


def write_wheel(folder: Path, name: str, summary: str) -> Path:
    stem = f"{name.replace('-', '_')}-7.1"
    file = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 7.1\nSummary: {summary}\nHome-page: http://them\n"
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return file


@pytest.mark.slow
def test_names_that_nobody_has_or_we_have_are_fine(
    index: Index, names: Callable[[], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    ours = "What every ART backend, inference engine, training engine and plugin must do, as a pytest plugin."
    index.add("art-conformance", write_wheel(tmp_path, "art-conformance", ours))
    said = names()
    assert said.returncode == 0, said.stderr
    lines = dict(line.split(maxsplit=1) for line in said.stdout.splitlines())
    assert lines.pop("art-conformance") == "ours, 7.1"
    assert set(lines.values()) == {"free"}
    # Those that are here, and those that are only promised.
    assert {"art-core", "art-engine-kit", "art-backend-local", "art-backend-serverless"} <= lines.keys()


@pytest.mark.slow
def test_a_strangers_is_named_and_never_run(
    index: Index, names: Callable[[], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    index.add("art-core", write_wheel(tmp_path, "art-core", "Prints pictures."))
    index.add("art-backend-serverless", write_wheel(tmp_path, "art-backend-serverless", "Theirs."))
    ran = tmp_path / "ran"
    source = tmp_path / "setup.py"
    source.write_text(f"open({str(ran)!r}, 'w')", encoding="utf-8")
    with tarfile.open(tmp_path / "art_runtime-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "art_runtime-1.0/setup.py")
    index.add("art-runtime", tmp_path / "art_runtime-1.0.tar.gz")
    said = names()
    assert said.returncode == 1
    lines = dict(line.split(maxsplit=1) for line in said.stdout.splitlines())
    assert lines["art-core"] == "TAKEN by version 7.1 of another: Prints pictures. (http://them)"
    assert lines["art-backend-serverless"].startswith("TAKEN by version 7.1")
    assert "no usable wheels" in lines["art-runtime"]
    assert lines["art-gateway"] == "free"
    assert "Not ours: art-backend-serverless, art-core, art-runtime." in said.stderr
    assert not ran.exists()


@pytest.mark.slow
def test_an_index_that_cannot_be_asked_is_no_good_news(
    index: Index, names: Callable[[], subprocess.CompletedProcess[str]]
) -> None:
    index.status = 503
    said = names()
    assert said.returncode == 2
    assert "can't be asked" in said.stderr
    assert "503" in said.stderr
    assert "free" not in said.stdout
