"""The wire as an OpenAPI file: the server is what the file says, and answers nothing that it doesn't declare."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from art_backend_serverless import wire

FILE = Path(__file__).parents[1] / "openapi.json"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def described(server: Any) -> Any:
    """What the server says of itself, but for the names of the base models that it was started with."""
    page = httpx.get(f"{server.url.removesuffix('/v1')}/openapi.json").json()
    body = page["paths"]["/v1/preview/models"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["properties"]["base_model"].pop("enum") == ["tiny"]
    return page


def test_the_file_is_what_the_server_says_of_itself(server: Any, tmp_path: Path) -> None:
    """When it isn't, what the server says lies in `openapi.json` of the test's folder: look at it, and copy it over."""
    now = json.dumps(described(server), indent=1, ensure_ascii=False) + "\n"
    (tmp_path / "openapi.json").write_text(now, encoding="utf-8")
    assert now == FILE.read_text(encoding="utf-8"), f"copy {tmp_path / 'openapi.json'} to {FILE} if it is meant"


def test_every_address_of_the_wire_is_in_the_file() -> None:
    paths = json.loads(FILE.read_text(encoding="utf-8"))["paths"]
    addresses = {
        value
        for name, value in vars(wire).items()
        if name.isupper() and isinstance(value, str) and value.startswith("/")
    }
    assert addresses
    assert addresses <= {path.removeprefix("/v1") for path in paths}


@pytest.mark.parametrize(
    ("phases", "examples"),
    [
        ("fuzzing,stateful", 3),
        pytest.param("coverage,fuzzing,stateful", 50, marks=[pytest.mark.exhaustive, pytest.mark.timeout(1200)]),
    ],
)
def test_no_request_makes_the_server_fail_or_answer_what_it_does_not_declare(
    server: Any, phases: str, examples: int
) -> None:
    key = server.key("fuzz")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url.removesuffix('/v1')}/openapi.json"),
        *("--header", f"Authorization: Bearer {key}", "--max-examples", str(examples), "--seed", "1"),
        *("--phases", phases, "--no-color"),
        # A client may leave out what it has nothing to say of, and the backend may refuse what the schema allows.
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance,missing_required_header"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert "Tested: 19" in ran.stdout
