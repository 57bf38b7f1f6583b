"""The wire as an OpenAPI file: the server is what the file says, and answers nothing that it doesn't declare."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from art_backend_serverless import wire

FILE = Path(__file__).parents[1] / "openapi.json"
PAGE = json.loads(FILE.read_text(encoding="utf-8"))
OPERATIONS = [operation["operationId"] for item in PAGE["paths"].values() for operation in item.values()]
INFERENCE = "^create_(chat_)?completion$"
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
    addresses = {
        value
        for name, value in vars(wire).items()
        if name.isupper() and isinstance(value, str) and value.startswith("/")
    }
    assert addresses
    assert addresses <= {path.removeprefix("/v1") for path in PAGE["paths"]}


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
    said = fuzz(server, "--exclude-operation-id-regex", INFERENCE, phases=phases, examples=examples)
    assert f"Tested: {len(OPERATIONS) - 2}" in said


@pytest.mark.parametrize(
    ("phases", "examples"),
    [
        ("fuzzing,stateful", 20),
        pytest.param("coverage,fuzzing,stateful", 50, marks=[pytest.mark.exhaustive, pytest.mark.timeout(1200)]),
    ],
)
def test_no_question_makes_a_real_engine_fail_or_answer_what_is_not_declared(
    serving: Any, tmp_path: Path, own_tiny_model: Path, phases: str, examples: int
) -> None:
    """The inference addresses, and those that lead to them."""
    pytest.importorskip("art_engine_torch")
    asked = f"^create_model$|^list_models$|{INFERENCE}"
    with serving(tmp_path / "torch", own_tiny_model, engine="torch") as server:
        # The engine starts with the first model.
        server.client(server.key("fuzz")).model()
        said = fuzz(server, "--include-operation-id-regex", asked, phases=phases, examples=examples)
        answered = re.search(r'"path": "/v1/\S*completions", "status": 200', server.log.read_text(encoding="utf-8"))
    assert "Tested: 4" in said
    assert answered, "no question was a sound one: it shows nothing"


def fuzz(server: Any, *which: str, phases: str, examples: int) -> str:
    """What schemathesis says when it has found nothing."""
    key = server.key("fuzz")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url.removesuffix('/v1')}/openapi.json", *which),
        *("--header", f"Authorization: Bearer {key}", "--max-examples", str(examples), "--seed", "1"),
        *("--request-timeout", "60"),
        *("--phases", phases, "--no-color"),
        # A client may leave out what it has nothing to say of, and the backend may refuse what the schema allows.
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance,missing_required_header"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    return ran.stdout
