"""What tells whose weights answered: the wrong ones are noticed, and two that say the same aren't played off."""

from __future__ import annotations

from pathlib import Path

import pytest

from art_conformance.backend_fixtures import BackendSuite
from art_conformance.oracle import Oracle, oracle_for
from art_conformance.serving import Sample
from art_conformance.tiny_model import write_adapter

pytestmark = pytest.mark.slow


def answer(oracle: Oracle, adapter: Path, off: float = 0.0) -> Sample:
    """What an engine whose logprobs are `off` by so many nats says as an adapter."""
    prompt, ids = [5, 6, 7], [20, 21, 22, 23]
    logprobs = [float(value) + off for value in oracle.logprobs(prompt, ids, adapter)]
    return Sample(prompt, ids, logprobs, "", "length", {})


def test_the_weights_of_another_step_are_noticed_and_the_same_weights_elsewhere_are_not(
    own_tiny_model: Path, tmp_path: Path
) -> None:
    oracle = oracle_for(own_tiny_model)
    mine = write_adapter(tmp_path / "mine", own_tiny_model, seed=1)
    same = write_adapter(tmp_path / "same", own_tiny_model, seed=1)
    near = write_adapter(tmp_path / "near", own_tiny_model, seed=1, strength=0.51)
    suite = BackendSuite()
    suite.assert_answers_as(oracle, [answer(oracle, mine, off=0.01)], mine, [same, None])
    with pytest.raises(AssertionError, match="not the weights of"):
        suite.assert_answers_as(oracle, [answer(oracle, mine)], None)
    assert oracle.apart([answer(oracle, near)], mine, near) < 0.1
    with pytest.raises(AssertionError, match="rather"):
        suite.assert_answers_as(oracle, [answer(oracle, near)], mine, [near])
