"""The benchmarks that start an engine run to their end, on a tiny model; their figures are nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import inference
import pytest


def run(script: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark and give the object that it prints."""
    finished = subprocess.run(
        [sys.executable, str(Path(inference.__file__).with_name(script)), *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, f"{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


@pytest.mark.slow
def test_inference(tiny_base_model: Path) -> None:
    small = ("--requests", "4", "--tokens", "4", "--repeats", "1")
    result = run("inference.py", "--engines", "torch", "--base-model", str(tiny_base_model), *small)
    assert [row["engine"] for row in result["results"]] == ["torch"]
    assert result["results"][0]["tokens_per_s"] > 0


@pytest.mark.slow
def test_engine_curves(tiny_base_model: Path) -> None:
    small = ("--steps", "2", "--samples", "2", "--base-model", str(tiny_base_model))
    result = run("engine_curves.py", "--training-engines", "torch", *small)
    [curve] = result["curves"]
    assert (curve["training_engine"], curve["inference_engine"]) == ("torch", "torch")
    assert len(curve["rewards"]) == 2
    assert 0 <= curve["mismatch"] < 0.3


@pytest.mark.slow
def test_publish_latency() -> None:
    result = run("publish_latency.py", "--tiny", "--publishes", "2", "--in-flight", "4")
    assert result["publishes"] == len(result["each"]) == 2
    assert result["requests"] > 0
    assert not result["failed"]
    assert not result["mislabelled"]


@pytest.mark.slow
def test_recovery() -> None:
    result = run("recovery.py", "--tiny", "--kills", "1", "--in-flight", "4", "--pause", "1")
    [kill] = result["kills"]
    assert kill["back_s"] > 0
    assert result["requests"] > 0
    assert not result["failed"], "whole answers are asked for again when their server dies"
    assert not result["mislabelled"]


@pytest.mark.slow
def test_gateway_overhead_in_front_of_an_engine(tiny_base_model: Path) -> None:
    small = ("--at-once", "1,4", "--rounds", "2", "--waves", "1", "--tokens", "2")
    result = run("gateway_overhead.py", "--engine", "torch", "--base-model", str(tiny_base_model), *small)
    [rows] = [value for value in result.values() if isinstance(value, list)]
    assert [row["concurrency"] for row in rows] == [1, 4]
    assert all(len(row["lost_each_round"]) == 2 for row in rows)


@pytest.mark.slow
def test_no_request_ends_a_server_or_costs_another_its_answer() -> None:
    result = run("fuzz_requests.py", "--requests", "400")
    assert result["servers_alive"]
    assert not result["failures"], result["first_failures"]
    assert not result["honest_failures"], result["first_honest_failures"]
    assert result["statuses"]["200"] > 20, "next to none of the requests reached the engine"


@pytest.mark.slow
def test_hostile_environments() -> None:
    [ran] = run("hostile_environments.py", "--only", "files that shadow modules")["runs"]
    assert ran["trained"], ran["said"]


@pytest.mark.slow
def test_the_example_learns_in_a_pipeline_and_one_after_the_other(tiny_base_model: Path) -> None:
    result = run("pipeline_learning.py", "--steps", "1", "--goal", "0", "--base-model", str(tiny_base_model))
    for way in ("plain", "pipeline"):
        [(rollouts, seconds)] = result["reached"][way]
        assert rollouts == 64, "all eight complaints are attempted eight times"
        assert seconds > 0


@pytest.mark.slow
def test_rollouts_that_outlast_steps_are_answered_by_the_weights_they_hold() -> None:
    result = run("pipeline_leases.py", "--steps", "6", "--longest", "3", "--workers", "6")
    assert result["steps"] == 6
    assert result["steps_deleted"] > 0
    assert result["steps_that_answered"] > 3
    assert result["nats_from_oracle"]["told_apart"] > 0.5, "else other weights would pass for the right ones"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_nothing_is_lost_when_a_pipelines_worker_and_client_are_killed() -> None:
    result = run("pipeline_kills.py", "--kills", "1", "--parts", "worker", "client")
    assert result["kills"] == {"worker": 1, "client": 1}
    assert result["starts"] >= 2
    assert result["steps"] > 1


@pytest.mark.slow
def test_the_loop_beside_the_longer_of_its_parts() -> None:
    small = ("--steps", "4", "--warm", "1", "--batch", "4", "--workers", "4", "--rollout-s", "0.05")
    result = run("pipeline_overlap.py", *small, "--without-peers")
    assert [row["loop"] for row in result["results"]] == ["pipeline", "plain"] * 3
    # No bound on the ratio itself: rollouts that waited in the queue at first make so few steps faster than it.
    assert all(row["step_s"] > 0.99 * row["train_s"] for row in result["results"]), "two steps trained at once"


@pytest.mark.slow
def test_thousands_in_flight() -> None:
    result = run("pipeline_in_flight.py", "--in-flight", "40", "--steps", "3", "--batch", "20", "--step-s", "0.1")
    assert (result["in_flight"], result["steps"]) == (40, 3)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_serve_polls() -> None:
    small = ("--polls", "40", "--models", "4", "--events", "200", "--clients", "8", "--jobs", "1")
    result = run("serve_polls.py", *small)
    assert result["empty"]["count"] == result["full"]["count"] == 40
    assert result["busy"]["polls"]["count"] == result["busy"]["samples"]["count"] > 0
    assert not result["busy"]["errors"], result["busy"]["first_errors"]


@pytest.mark.slow
def test_train_throughput(tiny_base_model: Path) -> None:
    small = ("--shapes", "16,4,3", "turns", "--repeats", "1", "--threads", "1", "--without-peers")
    result = run("train_throughput.py", "--base-model", str(tiny_base_model), *small)
    assert [shape["shape"] for shape in result["shapes"]] == ["16,4,3", "turns"]
    for shape in result["shapes"]:
        dense, shared = shape["modes"]
        assert (dense["mode"], shared["mode"]) == ("dense", "shared")
        assert dense["tokens_computed"] / shared["tokens_computed"] == pytest.approx(shape["sharing_bound"], rel=0.1)


@pytest.mark.slow
def test_tokenize_pack() -> None:
    result = run(
        "tokenize_pack.py", "--groups", "2", "--size", "3", "--turns", "2", "--repeats", "1", "--without-peers"
    )
    assert result["ours"]["tokens"] > 0
    assert 0 < result["ours"]["fill"] <= 1
    assert not result["peers"]
