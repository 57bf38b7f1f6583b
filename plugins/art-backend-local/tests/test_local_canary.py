"""The rule by which an engine's answers are held against a checkpoint's canary."""

import pytest

from art_backend_local.servers.canary_reading import TOLERANCE, canary_request, first_token, read_canary_answers
from art_engine_kit.canary import Canary, CanaryPrompt


def canary(new, old):
    return Canary(
        prompts=[
            CanaryPrompt(token_ids=[1, 2], expected={7: n}, previous={7: o}) for n, o in zip(new, old, strict=True)
        ]
    )


def reading(served, new, old):
    return read_canary_answers(canary(new, old), [(7, value) for value in served])


def test_the_right_adapter_passes_also_on_an_engine_that_computes_less_exactly():
    assert not reading([-1.0, -2.0], [-1.0, -2.0], [-1.5, -2.5]).problem
    assert not reading([-1.05, -1.95], [-1.0, -2.0], [-1.5, -2.5]).problem
    # The two adapters hardly differ, as after a step with a small learning rate.
    assert not reading([-1.03, -1.96], [-1.0, -2.0], [-1.001, -2.001]).problem


def test_carried_weights_pass():
    assert not reading([-1.0], [-1.0], [-1.0]).problem


def test_another_adapter_is_off():
    assert "off by" in reading([-1.0 - 2 * TOLERANCE], [-1.0], [-1.0]).problem


@pytest.mark.parametrize("step", [0.15, 0.02, 0.002])
def test_the_previous_adapter_is_recognised_however_small_the_step(step):
    assert "previous adapter" in reading([-1.0, -2.0], [-1.0 + step, -2.0 + step], [-1.0, -2.0]).problem


def test_a_token_nobody_expects_counts_as_wrong():
    answers = [(8, -0.1)]
    assert read_canary_answers(canary([-0.1], [-0.1]), answers).problem


def test_a_canary_without_previous_adapter_is_held_against_the_new_one_only():
    only = Canary(prompts=[CanaryPrompt(token_ids=[1], expected={7: -1.0})])
    assert not read_canary_answers(only, [(7, -1.0)]).problem
    assert read_canary_answers(only, [(7, -2.0)]).problem


def test_the_first_token_is_read_from_both_shapes_of_logprobs():
    assert first_token({"choices": [{"token_ids": [5], "logprobs": {"content": [{"logprob": -0.5}]}}]}) == (5, -0.5)
    assert first_token({"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [-0.5]}}]}) == (5, -0.5)
    with pytest.raises(ValueError, match="no token id"):
        first_token({"choices": [{"token_ids": []}]})


def test_the_request_asks_for_one_token_at_temperature_0():
    body = canary_request(CanaryPrompt(token_ids=[1, 2], expected={}))
    assert (body["prompt"], body["max_tokens"], body["temperature"]) == ([1, 2], 1, 0)
