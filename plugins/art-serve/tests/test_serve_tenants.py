"""Two entities on one server: every way of one to reach what is the other's, and every body that would do harm, is
refused and leaves nothing.
"""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
MIB = 2**20
MESSAGES = [{"role": "user", "content": "hi"}]
GROUPS = [{"trajectories": [{"reward": 1.0}]}]


@dataclass(frozen=True)
class Two:
    """The owner of a model, with all that there is of it, and somebody else."""

    server: Any
    owner: Any
    other: Any
    model: str
    job: str
    blob: str
    upload: str

    def files(self) -> dict[str, int]:
        """Every file of the server that a client can cause, and its size."""
        kept = [self.server.data / name for name in ("jobs", "uploads", "exports", "backend")]
        found = (file for folder in kept for file in folder.rglob("*") if file.is_file() and file.suffix != ".log")
        return {str(file): file.stat().st_size for file in found}


@pytest.fixture(scope="module")
def two(serving: Any, tmp_path_factory: pytest.TempPathFactory, own_tiny_model: Path) -> Iterator[Two]:
    with serving(tmp_path_factory.mktemp("two"), own_tiny_model, "--job-mib", "8") as server:
        owner, other = server.client(server.key("owner")), server.client(server.key("other"))
        model = owner.model("secret-model")
        job = owner.submit(model)
        owner.ended(job)
        [blob, *_] = owner.json("GET", f"/preview/models/{model}/checkpoints/1/files")["files"]
        yield Two(server, owner, other, model, job, blob["sha256"], f"art-upload:///owner/{'0' * 64}")


NAMES = [
    "wandb-artifact:///owner/p/secret-model",
    "wandb-artifact:///owner/p/secret-model:step1",
    "wandb-artifact:///owner/p/secret-model:latest",
    "wandb-artifact:///other/../owner/p/secret-model",
    "wandb-artifact:///other/p/../../owner/p/secret-model",
    "wandb-artifact:///other/%2e%2e/owner/p/secret-model",
    "wandb-artifact:///other/p/secret-model",
    "wandb-artifact:///оwner/p/secret-model",  # a Cyrillic о
    "wandb-artifact:///owner\0/p/secret-model",
    "wandb-artifact:///OWNER/p/secret-model",
    "secret-model",
    "secret-model@1",
    "{model}@1",
]
ADDRESSES = [
    ("DELETE", "/preview/models/{model}"),
    ("POST", "/preview/models/{model}/log"),
    ("GET", "/preview/models/{model}/checkpoints"),
    ("DELETE", "/preview/models/{model}/checkpoints"),
    ("GET", "/preview/models/{model}/checkpoints/1/files"),
    ("GET", "/preview/models/{model}/blobs/{blob}"),
    ("POST", "/preview/models/{model}/fork"),
    ("POST", "/preview/training-jobs"),
    ("POST", "/preview/sft-training-jobs"),
    ("GET", "/preview/training-jobs/{job}"),
    ("GET", "/preview/training-jobs/{job}/events"),
]
BODIES: dict[str, Any] = {
    "log": {"model_id": "{model}", "trajectory_groups": GROUPS, "split": "train"},
    "checkpoints": {"steps": [0]},
    "fork": {"from_model": "secret-model"},
    "training-jobs": {"model_id": "{model}", "trajectory_groups": GROUPS},
    "sft-training-jobs": {"model_id": "{model}", "training_data_url": "x"},
}


def filled(text: str, two: Two, **instead: str) -> str:
    values = {"model": two.model, "job": two.job, "blob": two.blob, **instead}
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


def answer(two: Two, method: str, address: str, **instead: str) -> tuple[int, str]:
    """What somebody else is told."""
    body = BODIES.get(address.rpartition("/")[2]) if method != "GET" else None
    content = None if body is None else filled(json.dumps(body), two, **instead)
    got = two.other.ask(method, filled(address, two, **instead), content=content)
    return got.status_code, got.text


@pytest.mark.parametrize(("method", "address"), ADDRESSES)
def test_what_another_entity_has_is_not_there(two: Two, method: str, address: str) -> None:
    before = two.files()
    nobody = {"model": "0" * 32, "job": "0" * 32, "blob": "0" * 64}
    theirs, nothing = answer(two, method, address), answer(two, method, address, **nobody)
    assert theirs[0] == nothing[0] == 404
    assert theirs[1].replace(two.model, nobody["model"]).replace(two.job, nobody["job"]) == nothing[1]
    assert two.files() == before


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_ones_own_is_answered_as_nobodys(two: Two, name: str) -> None:
    for path in ("/chat/completions", "/completions"):
        asked = {"model": filled(name, two), "messages": MESSAGES, "prompt": "hi"}
        got = two.other.ask("POST", path, json=asked)
        assert got.status_code in (400, 404), got.text
        assert "choices" not in got.json()
        assert "secret" not in got.json()["error"]["message"].replace(repr(asked["model"]), "")


@pytest.mark.parametrize(
    "model_id",
    ["../{model}", "..%2f{model}", "%2e%2e/{model}", "{model}%00", "{model}/../{model}", "%EF%BC%A1", "{model} ", "."],
)
def test_an_id_with_tricks_in_it_leads_nowhere(two: Two, model_id: str) -> None:
    got = two.other.ask("GET", f"/preview/models/{filled(model_id, two)}/checkpoints")
    assert got.status_code in (404, 405)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../secret-model"),
        ("name", ".."),
        ("name", "%2e%2e"),
        ("name", "a\0b"),
        ("name", "a/b"),
        ("name", "ａgent"),
        ("name", ""),
        ("name", "x" * 129),
        ("project", "../p"),
        ("project", "p\\..\\q"),
        ("entity", "owner"),
        ("entity", "../owner"),
        ("base_model", "/etc/passwd"),
        ("base_model", "../../models"),
        ("base_model", "~root"),
        ("base_model", "tiny\0"),
    ],
)
def test_a_model_of_such_a_name_is_not_made(two: Two, field: str, value: str) -> None:
    before = two.files()
    body = {"project": "p", "name": "mine", "base_model": "tiny", field: value}
    got = two.other.ask("POST", "/preview/models", json=body)
    assert got.status_code in (404, 422), got.text
    assert got.json()["error"]["param"] == field
    assert two.other.json("GET", "/models")["data"] == []
    assert two.files() == before


@pytest.mark.parametrize(
    "header", ["X-Entity", "X-Forwarded-User", "X-Wandb-Entity", "Entity", "X-Original-Authorization"]
)
def test_a_header_that_names_an_entity_means_nothing(two: Two, header: str) -> None:
    got = two.other.ask("GET", f"/preview/models/{two.model}/checkpoints", headers={header: "owner"})
    assert got.status_code == 404
    assert two.other.ask("GET", "/capabilities", headers={header: "owner"}).json()["entity"] == "other"


def test_two_keys_in_one_request_are_none(two: Two) -> None:
    both = [("Authorization", f"Bearer {two.other.key}"), ("Authorization", f"Bearer {two.owner.key}")]
    assert httpx.get(f"{two.server.url}/capabilities", headers=both).status_code == 401


def test_keys_put_together_or_revoked_or_malformed_open_nothing(two: Two) -> None:
    mixed = "-".join([*two.owner.key.split("-")[:2], two.other.key.split("-")[2]])
    revoked = two.server.key("owner")
    assert httpx.get(f"{two.server.url}/models", headers={"Authorization": f"Bearer {revoked}"}).status_code == 200
    assert two.server.keys("revoke", revoked.split("-")[1]).exit_code == 0

    def refused(key: str) -> bool:
        got = httpx.get(f"{two.server.url}/models", headers={"Authorization": key.encode()})
        return got.status_code == 401

    two.owner.until(lambda: refused(f"Bearer {revoked}"), limit_s=10)
    for key in (
        "",
        "Bearer",
        f"Basic {two.owner.key}",
        f"Bearer {mixed}",
        "Bearer é",
        f"Bearer {two.owner.key}x",
    ):
        assert refused(key), key


def test_an_upload_of_another_entity_cannot_be_trained_on(two: Two) -> None:
    mine = two.other.model("mine")
    try:
        for url in (two.upload, "art-upload:///other/../owner/" + "0" * 64, "file:///etc/passwd", "http://127.0.0.1/"):
            body = {"model_id": mine, "training_data_url": url}
            got = two.other.ask("POST", "/preview/sft-training-jobs", json=body)
            assert got.status_code in (422, 501), got.text
        fork = {"from_model": "secret-model", "from_project": "p"}
        assert two.other.ask("POST", f"/preview/models/{mine}/fork", json=fork).status_code == 422
    finally:
        assert two.other.ask("DELETE", f"/preview/models/{mine}").status_code == 204


def test_a_body_that_is_too_large_is_refused_packed_or_not(two: Two) -> None:
    before = two.files()
    address = "/preview/training-jobs"
    large = b'{"model_id": "' + b"x" * (9 * MIB) + b'"}'
    assert two.other.ask("POST", address, content=large).status_code == 413

    def in_pieces() -> Iterator[bytes]:
        for at in range(0, len(large), MIB):
            yield large[at : at + MIB]

    assert two.other.ask("POST", address, content=in_pieces()).status_code == 413
    packed = {"Content-Encoding": "gzip"}
    bomb = gzip.compress(bytes(512 * MIB), 9)
    assert len(bomb) < MIB
    assert two.other.ask("POST", address, content=bomb, headers=packed).status_code == 413
    assert two.other.ask("POST", address, content=gzip.compress(bomb), headers=packed).status_code == 422
    for broken in (b"no gzip", gzip.compress(b"{}")[:-5], gzip.compress(b"{}") + b"more"):
        assert two.other.ask("POST", address, content=broken, headers=packed).status_code == 400
    assert two.other.ask("POST", address, content=b"{}", headers={"Content-Encoding": "br"}).status_code == 415
    assert two.other.ask("POST", address, content=b"[" * 100_000).status_code == 422
    assert two.files() == before


def test_a_body_that_does_not_come_holds_nobody_else_up(two: Two) -> None:
    host, port = two.server.url.removeprefix("http://").removesuffix("/v1").split(":")
    head = (
        f"POST /v1/preview/training-jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {two.other.key}\r\n"
        "Content-Length: 1000000\r\n\r\n{"
    )
    slow = [socket.create_connection((host, int(port)), timeout=10) for _ in range(20)]
    try:
        for connection in slow:
            connection.sendall(head.encode())
        assert two.owner.json("GET", f"/preview/training-jobs/{two.job}")["state"] == "succeeded"
        assert two.owner.ended(two.owner.submit(two.model))["type"] == "training_ended"
        many = two.other.ask("POST", "/preview/training-jobs", content=b"{}")
        assert (many.status_code, many.json()["error"]["code"]) == (429, "too_many_uploads")
        assert int(many.headers["Retry-After"]) > 0
    finally:
        for connection in slow:
            connection.close()
    two.owner.until(lambda: list((two.server.data / "jobs").iterdir()) == [])
