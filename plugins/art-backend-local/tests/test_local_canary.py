"""The rule by which an engine's answers are held against a checkpoint's canary."""

from types import SimpleNamespace

import numpy as np
import pytest

from art_backend_local.servers.canary_reading import TOLERANCE, canary_request, first_token, read_canary_answers
from art_backend_local.servers.verification import CanaryAnswers, ask_canary, verify_adapter
from art_core.errors import EngineRefused
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


def exact(base=None, noise=1e-6, prompts=10, seed=0):
    """An engine that computes as the trainer does, but for `noise`: three expectations, and its answers."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(-3, -1, prompts)
    old = base + rng.normal(0, 0.5, prompts)
    new = old + rng.normal(0, 0.01, prompts)
    return base, old, new, new + rng.normal(0, noise, prompts)


def held_against(base, old, new, served):
    prompts = [
        CanaryPrompt(token_ids=[1, 2], expected={7: n}, previous={7: o}, base={7: b})
        for n, o, b in zip(new, old, base, strict=True)
    ]
    return read_canary_answers(Canary(prompts=prompts), [(7, value) for value in served])


@pytest.mark.parametrize("noise", [1e-7, 1e-5, 1e-3, 0.03, 0.1])
def test_the_right_adapter_passes_however_an_engine_rounds(noise):
    for seed in range(200):
        assert not held_against(*exact(noise=noise, seed=seed)).problem


def test_rounding_in_the_trainer_is_no_reason_either():
    """As in bf16: every expectation is off by itself, and the step is smaller than that."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        true = rng.uniform(-3, -1, 10)
        base, old, new, served = (true + rng.normal(0, 0.06, 10) for _ in range(4))
        assert not held_against(base, old, new, served).problem


@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3, 1e-4])
def test_a_stale_adapter_is_found_out_after_small_steps_on_an_exact_engine(step):
    base, old, new, served = exact(noise=1e-7)
    new, noise = old + (new - old) * step / 0.01, served - new
    assert "previous adapter" in held_against(base, old, new, old + noise).problem


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.9, 1.1, 2.0])
def test_a_wrong_strength_is_found_out_long_before_it_is_off_by_much(strength):
    base, old, new, served = exact()
    small_base, small_old = new - (new - base) * 0.02, new - (new - old) * 0.02
    problem = held_against(
        small_base, small_old, new, small_base + (new - small_base) * strength + (served - new)
    ).problem
    assert f"{strength:.3g} times its strength" in problem


def test_after_the_first_step_nothing_at_all_is_told_from_a_part():
    base, _, new, _ = exact()
    new = base + (new - base) * 0.01
    assert "previous adapter" in held_against(base, base, new, base + 1e-6).problem
    assert "0.25 times" in held_against(base, base, new, base + (new - base) * 0.25 + 1e-7).problem


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
    body = canary_request([1, 2])
    assert (body["prompt"], body["max_tokens"], body["temperature"]) == ([1, 2], 1, 0)


class Server:
    """Answers each prompt with its last id and a logprob made of it; `at_a_time` says how many prompts it takes."""

    def __init__(self, at_a_time=100, *, refuses=False):
        self.engine = SimpleNamespace(name="stub")
        self.asked, self.at_a_time, self.refuses = [], at_a_time, refuses

    async def complete(self, body, adapter):
        prompt = body["prompt"]
        prompts = prompt if isinstance(prompt[0], list) else [prompt]
        self.asked.append(len(prompts))
        if self.refuses and len(prompts) > self.at_a_time:
            raise EngineRefused("stub", f"answer as {adapter}", "one prompt at a time")
        choices = [
            {"index": i, "token_ids": [ids[-1]], "logprobs": {"token_logprobs": [-ids[-1] / 10]}}
            for i, ids in enumerate(prompts[: self.at_a_time])
        ]
        return {"choices": choices[::-1]}


PROMPTS = [[1, 2], [3], [4, 5, 6]]
ANSWERS = [(2, -0.2), (3, -0.3), (6, -0.6)]


async def test_all_prompts_of_a_canary_are_one_question():
    server = Server()
    found = await ask_canary(server, "m@1", PROMPTS)
    assert (found.answers, server.asked) == (ANSWERS, [3])


@pytest.mark.parametrize("refuses", [False, True])
async def test_a_server_that_takes_one_prompt_at_a_time_is_asked_so(refuses):
    server = Server(at_a_time=1, refuses=refuses)
    found = await ask_canary(server, "m@1", PROMPTS)
    assert (found.answers, server.asked) == (ANSWERS, [3, 1, 1, 1])


def canary_in(folder, logprobs):
    prompts = [
        CanaryPrompt(token_ids=ids, expected={ids[-1]: logprob}) for ids, logprob in zip(PROMPTS, logprobs, strict=True)
    ]
    (folder / "canary.json").write_text(Canary(prompts=prompts).model_dump_json())


async def test_what_a_server_said_before_is_judged_by_the_canary_and_not_asked_again(tmp_path):
    said = CanaryAnswers(PROMPTS, ANSWERS)
    server = Server()
    canary_in(tmp_path, [-0.2, -0.3, -0.6])
    await verify_adapter(server, "m@1", tmp_path, said)
    canary_in(tmp_path, [-2.0, -3.0, -6.0])
    with pytest.raises(EngineRefused, match="off by"):
        await verify_adapter(server, "m@1", tmp_path, said)
    assert server.asked == []


async def test_answers_to_other_prompts_count_for_nothing(tmp_path):
    server = Server()
    canary_in(tmp_path, [-2.0, -3.0, -6.0])
    with pytest.raises(EngineRefused, match="off by"):
        await verify_adapter(server, "m@1", tmp_path, CanaryAnswers([[7], [8], [9]], [(2, -2.0), (3, -3.0), (6, -6.0)]))
    assert server.asked == [3]
