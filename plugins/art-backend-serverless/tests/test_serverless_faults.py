"""A service that is too busy, broken, slow, cut off or wrong: what can be repeated is, what can't is said in words, and
nothing is trained twice.
"""

from __future__ import annotations

import asyncio
import resource
import shutil
import ssl
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import art
from art_backend_serverless import (
    JobStalled,
    OutcomeUnknown,
    Patience,
    ServerlessBackend,
    ServiceRefused,
    ServiceUnreachable,
)
from art_core import hookimpl, installed_plugins
from art_core.errors import TrainingFailed

JOBS = "/v1/preview/training-jobs"
EVENTS = "/v1/preview/training-jobs/.*/events"
CHECKPOINTS = ".*/checkpoints"


def status(cloud: Any, code: int, **headers: str) -> Any:
    async def instead(asked: Any) -> Any:
        return cloud.answer({"detail": "not now"}, code, **headers)

    return instead


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
async def test_a_question_is_asked_again(cloud: Any, serverless: Any, model: Any, groups: Any, code: int) -> None:
    cloud.fails("GET", EVENTS, times=3, instead=status(cloud, code))
    cloud.fails("GET", CHECKPOINTS, times=3, instead=status(cloud, code))
    assert (await serverless.train(model, groups)).step == 1
    assert len(cloud.jobs) == 1


def test_pauses_grow_and_differ_from_one_client_to_the_next() -> None:
    patience = Patience()
    shortest, longest = (
        [edge(patience.pause(attempt) for _ in range(200)) for attempt in range(1, 8)] for edge in (min, max)
    )
    assert shortest[:5] == sorted(shortest[:5])
    assert longest[4] > 8 * longest[0]
    assert all(least < most for least, most in zip(shortest, longest, strict=True))
    assert max(longest) <= patience.longest_pause_s


@pytest.mark.slow
@pytest.mark.parametrize("code", [429, 503])
async def test_retry_after_is_kept_to(cloud: Any, serverless: Any, model: Any, groups: Any, code: int) -> None:
    busy_until = asyncio.get_running_loop().time() + 0.5

    async def busy(asked: Any) -> Any:
        if asyncio.get_running_loop().time() < busy_until:
            return cloud.answer({"detail": "busy"}, code, Retry_After="0.5")
        return cloud.handle(asked)

    cloud.fails("POST", JOBS, times=100, instead=busy)
    await serverless.train(model, groups)
    # Without it there would be dozens.
    first, *_, last = sent = cloud.calls("POST", JOBS)
    assert len(sent) <= 3
    assert first.headers["idempotency-key"] == last.headers["idempotency-key"]
    assert first.body == last.body


@pytest.mark.parametrize("code", [429, 503])
async def test_a_job_that_was_not_taken_is_sent_again(
    cloud: Any, serverless: Any, model: Any, groups: Any, code: int
) -> None:
    cloud.fails("POST", JOBS, times=2, instead=status(cloud, code))
    assert (await serverless.train(model, groups)).step == 1
    assert len(cloud.jobs) == 1


async def test_a_500_for_ever_ends_with_its_reason(cloud: Any, serverless: Any, model: Any) -> None:
    cloud.fails("GET", CHECKPOINTS, times=100, instead=status(cloud, 500))
    with pytest.raises(ServiceRefused, match="HTTP 500: not now"):
        await model.get_step()
    assert len(cloud.calls("GET", CHECKPOINTS)) == 5  # one when it was registered


async def test_a_service_that_was_away_may_break_an_answer_when_it_is_back(
    cloud: Any, serverless: Any, model: Any, groups: Any
) -> None:
    cloud.fails("GET", EVENTS, times=6, instead=status(cloud, 502))
    cloud.fails("GET", EVENTS, after=lambda given: replace(given, body=given.body[:9]))
    cloud.fails("GET", EVENTS, instead=status(cloud, 500))
    assert (await serverless.train(model, groups)).step == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"cut_at": 0},
        {"after": lambda given: replace(given, status=502)},
        {"after": lambda given: replace(given, status=500)},
        {"after": lambda given: replace(given, body=given.body[:5])},
        {"after": lambda given: replace(given, body=given.body[:5], announced=len(given.body))},
        {"after": lambda given: replace(given, body=b"<html>")},
    ],
    ids=["cut off in the upload", "502 after it was taken", "500", "truncated JSON", "cut off in the answer", "a page"],
)
async def test_a_job_that_may_have_been_taken_is_not_sent_twice(
    cloud: Any, serverless: Any, model: Any, groups: Any, fault: Any
) -> None:
    cloud.fails("POST", JOBS, **fault)
    with pytest.raises(OutcomeUnknown, match="may have been done all the same") as told:
        await serverless.train(model, groups)
    assert "get_step" in str(told.value)
    assert len(cloud.jobs) <= 1
    assert len(cloud.calls("POST", JOBS)) <= 1
    # Whoever looks and goes on gets a step of his own.
    step = await model.get_step()
    assert (await serverless.train(model, groups)).step == step + 1


@pytest.mark.parametrize("path", [EVENTS, CHECKPOINTS])
@pytest.mark.parametrize(
    "change",
    [
        lambda given: replace(given, body=given.body[:9]),
        lambda given: replace(given, body=given.body[:9], announced=len(given.body)),
        lambda given: replace(given, body=b""),
    ],
    ids=["truncated", "cut", "empty"],
)
async def test_a_broken_answer_to_a_question_is_asked_for_again(
    cloud: Any, serverless: Any, model: Any, groups: Any, path: str, change: Any
) -> None:
    cloud.fails("GET", path, times=2, after=change)
    assert (await serverless.train(model, groups)).step == 1


async def test_pages_that_come_twice_count_once(cloud: Any, serverless: Any, model: Any, groups: Any) -> None:
    cloud.page = 2

    async def first_page(asked: Any) -> Any:
        return cloud.answer({"data": cloud.jobs["job-0"][:2]})

    cloud.fails("GET", EVENTS, times=1)
    cloud.fails("GET", EVENTS, times=2, instead=first_page)
    result = await serverless.train(model, groups)
    assert result.metrics["data/step_num_gradient_steps"] == 2


@pytest.mark.slow
async def test_a_slow_service_is_waited_for(cloud: Any, serverless: Any, model: Any, groups: Any) -> None:
    async def slowly(asked: Any) -> Any:
        await asyncio.sleep(0.3)
        return cloud.handle(asked)

    for method, path in (("POST", JOBS), ("GET", EVENTS), ("GET", CHECKPOINTS)):
        cloud.fails(method, path, instead=slowly)
    assert (await serverless.train(model, groups)).step == 1


@pytest.mark.slow
async def test_a_service_that_comes_back_is_met_again(cloud: Any, serverless: Any, model: Any, groups: Any) -> None:
    server = cloud.server
    cloud.scripts.append([])
    training = asyncio.create_task(serverless.train(model, groups))
    while not cloud.calls("GET", EVENTS):
        await asyncio.sleep(0.01)
    server.close()
    cloud.drop()
    await asyncio.sleep(0.5)
    cloud.jobs["job-0"].append({"id": "end", "type": "training_ended", "data": {}})
    cloud.add_checkpoint("model-0", 1)
    again = await asyncio.start_server(cloud.serve, "127.0.0.1", cloud.port)
    async with again:
        assert (await training).step == 1
        cloud.drop()


@pytest.mark.slow
async def test_a_service_that_never_was_there_is_said_so_soon(patience: Any) -> None:
    backend = ServerlessBackend("k", "http://127.0.0.1:9/v1", patience=patience, show_progress=False)
    with pytest.raises(ServiceUnreachable, match="can't be reached"):
        await art.TrainableModel(name="a", project="p", base_model="b").register(backend)


async def test_a_wrong_key_is_refused_at_once(cloud: Any, patience: Any) -> None:
    backend = ServerlessBackend("another", cloud.base_url, patience=patience, show_progress=False)
    with pytest.raises(ServiceRefused, match=r"HTTP 401.*WANDB_API_KEY") as refusal:
        await art.TrainableModel(name="a", project="p", base_model="b").register(backend)
    assert refusal.value.status == 401
    assert len(cloud.asked) == 1


async def test_a_redirection_is_not_followed_with_the_key(cloud: Any, serverless: Any, model: Any) -> None:
    cloud.fails("GET", CHECKPOINTS, instead=status(cloud, 307, Location="http://127.0.0.1:9/elsewhere"))
    with pytest.raises(ServiceRefused, match="redirection"):
        await model.get_step()


async def test_a_failed_job_raises_the_service_s_reason(cloud: Any, serverless: Any, model: Any, groups: Any) -> None:
    failed: list[BaseException] = []

    class Listener:
        art_api = 1

        @hookimpl
        def art_train_failed(self, error: BaseException) -> None:
            failed.append(error)

    installed_plugins().register(Listener(), "listener")
    try:
        cloud.scripts.append([("training_started", {}), ("training_failed", {"error_message": "out of memory"})])
        with pytest.raises(TrainingFailed, match=r"job-0 failed at .*: out of memory\."):
            await serverless.train(model, groups)
    finally:
        installed_plugins().unregister("listener")
    assert len(failed) == 1
    assert await model.get_step() == 0
    assert (await serverless.train(model, groups)).step == 1


async def test_a_silent_job_is_given_up_with_what_was_last_heard(
    cloud: Any, patience: Any, groups: Any, tmp_path: Any
) -> None:
    backend = ServerlessBackend(
        cloud.key, cloud.base_url, patience=replace(patience, job_silence_s=0.2), show_progress=False
    )
    model = art.TrainableModel(name="a", project="p", base_model="b", base_path=str(tmp_path))
    await model.register(backend)
    cloud.scripts.append([("training_started", {"num_sequences": 4}), ("something_new", {"from": "a later service"})])
    with pytest.raises(JobStalled, match=r"job-0 .* silent .* something_new .* may still finish"):
        await backend.train(model, groups)


async def test_a_job_without_a_single_event_is_given_up_too(
    cloud: Any, patience: Any, groups: Any, tmp_path: Any
) -> None:
    backend = ServerlessBackend(
        cloud.key, cloud.base_url, patience=replace(patience, job_silence_s=0.2), show_progress=False
    )
    model = art.TrainableModel(name="a", project="p", base_model="b", base_path=str(tmp_path))
    await model.register(backend)
    cloud.scripts.append([])
    with pytest.raises(JobStalled, match="nothing at all"):
        await backend.train(model, groups)


async def test_who_stops_waiting_is_told_which_job_may_finish(
    cloud: Any, patience: Any, groups: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = ServerlessBackend(cloud.key, cloud.base_url, patience=patience)
    model = art.TrainableModel(name="a", project="p", base_model="b", base_path=str(tmp_path))
    await model.register(backend)
    cloud.scripts.append([("training_started", {})])
    training = asyncio.create_task(backend.train(model, groups))
    while not cloud.calls("GET", EVENTS):
        await asyncio.sleep(0.01)
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    assert "job-0" in " ".join(capsys.readouterr().err.split())
    # The model isn't held by what was cancelled.
    assert (await backend.train(model, groups)).step == 1


async def test_a_step_that_a_plugin_refuses_is_served_and_its_error_raised(
    cloud: Any, serverless: Any, model: Any, groups: Any
) -> None:
    heard: list[str] = []

    class Listener:
        art_api = 1

        @hookimpl
        def art_before_publish_checkpoint(self) -> None:
            heard.append("asked")
            raise ValueError("not this one")

        @hookimpl
        def art_checkpoint_published(self, receipt: Any) -> None:
            heard.append(receipt.inference_name)

        @hookimpl
        def art_after_train(self) -> None:
            heard.append("after")

    installed_plugins().register(Listener(), "listener")
    try:
        with pytest.raises(ValueError, match="not this one"):
            await serverless.train(model, groups)
    finally:
        installed_plugins().unregister("listener")
    assert heard == ["asked", "wandb-artifact:///key-owner/my-project/agent-001:step1", "after"]
    assert model.get_inference_name().endswith(":step1")


async def test_a_plugin_that_refuses_the_step_keeps_it_from_being_sent(
    cloud: Any, serverless: Any, model: Any, groups: Any
) -> None:
    class Listener:
        art_api = 1

        @hookimpl
        def art_before_train(self, step: int) -> None:
            raise ValueError(f"not step {step}")

    installed_plugins().register(Listener(), "listener")
    try:
        with pytest.raises(ValueError, match="not step 1"):
            await serverless.train(model, groups)
    finally:
        installed_plugins().unregister("listener")
    assert not cloud.calls("POST", JOBS)


async def test_no_proxy_stands_before_this_machine(
    cloud: Any, serverless: Any, model: Any, groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await serverless.train(model, groups)).step == 1


async def test_another_machine_is_asked_through_the_proxy_of_the_environment(
    patience: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readline())
        writer.write(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with pytest.warns(RuntimeWarning, match="isn't https"):
            backend = ServerlessBackend("k", "http://training.example/v1", patience=patience, show_progress=False)
        with pytest.raises(ServiceRefused, match="HTTP 401"):
            await art.TrainableModel(name="a", project="p", base_model="b").register(backend)
    assert seen == [b"POST http://training.example/v1/preview/models HTTP/1.1\r\n"]


async def test_what_a_model_logs_and_cannot_be_sent_is_warned_of_and_kept_here(
    cloud: Any, patience: Any, groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("art_backend_serverless.backend.LOGS_LIMIT_S", 0.2)
    backend = ServerlessBackend(cloud.key, cloud.base_url, patience=patience, show_progress=False)
    model = art.TrainableModel(name="a", project="p", base_model="b", base_path=str(tmp_path))
    await model.register(backend)
    cloud.fails("POST", ".*/log", times=10_000, instead=status(cloud, 503))
    with pytest.warns(RuntimeWarning, match="'serverless' failed in art_log_trajectories"):
        await model.log(groups, split="train", step=1)
    assert len(cloud.calls("POST", ".*/log")) > 1
    assert (model._folder() / "trajectories" / "train" / "0001.parquet").exists()


async def test_a_late_checkpoint_is_waited_for(cloud: Any, serverless: Any, model: Any, groups: Any) -> None:
    async def none_yet(asked: Any) -> Any:
        return cloud.answer({"data": []})

    cloud.fails("GET", CHECKPOINTS, times=4, instead=none_yet)
    assert (await serverless.train(model, groups)).step == 1


async def test_a_large_step_is_sent_in_little_memory(cloud: Any, serverless: Any, model: Any) -> None:
    import tracemalloc

    text = "x" * 2_000_000
    groups = [
        art.TrajectoryGroup(
            art.Trajectory(messages_and_choices=[{"role": "user", "content": text}], reward=float(n)) for n in range(4)
        )
        for _ in range(6)
    ]

    async def took(asked: Any) -> Any:
        return cloud.submit({"model_id": "model-0"})

    cloud.fails("POST", JOBS, instead=took, drops=True)
    tracemalloc.start()
    try:
        await serverless.train(model, groups)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cloud.received > 48_000_000
    # Six copies of a trajectory at most, where the whole is twenty-four.
    assert peak < 16_000_000


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes a certificate, isn't installed")
async def test_a_certificate_that_nobody_vouches_for_is_refused_at_once(
    cloud: Any, patience: Any, groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, make, check=True, capture_output=True, timeout=60)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    server = await asyncio.start_server(cloud.serve, "127.0.0.1", 0, ssl=tls)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    async with server:
        model = art.TrainableModel(name="a", project="p", base_model="b", base_path=str(tmp_path))
        stranger = ServerlessBackend(cloud.key, url, patience=patience, show_progress=False)
        with pytest.raises(ServiceUnreachable, match="SSL_CERT_FILE"):
            await model.register(stranger)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        trusting = ServerlessBackend(cloud.key, url, patience=patience, show_progress=False)
        await model.register(trusting)
        assert (await trusting.train(model, groups)).step == 1
        cloud.drop()


async def test_a_full_disk_is_said_and_nothing_is_sent(
    cloud: Any, serverless: Any, model: Any, groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # what was read of the environment before
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # no file may be larger, as on a disk that is full
    try:
        with pytest.raises(OSError, match=rf"could not be written to {tmp_path}: .* TMPDIR"):
            await serverless.train(model, groups)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not cloud.calls("POST", JOBS)
    assert (await serverless.train(model, groups)).step == 1
