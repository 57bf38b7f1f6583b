"""The scheduler on tiny models: logprobs are those of transformers + PEFT, whatever shares the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from art_engine_torch.server.decoder import Decoder, UnsupportedModel
from art_engine_torch.server.generation import GenerationRequest, SequenceUpdate
from art_engine_torch.server.lora_batch import LoraAdapter
from art_engine_torch.server.lora_files import read_adapter
from art_engine_torch.server.sampling import SamplingSettings
from art_engine_torch.server.scheduler import Limits, Scheduler

KINDS = ["llama-tied", "llama-untied-rope-scaled", "llama-biased", "qwen2", "qwen3"]
CPU = torch.device("cpu")
TOLERANCE = 1e-3


def scheduler_for(folder: Path, **limits: int) -> Scheduler:
    defaults = {
        "max_len": 1024,
        "max_sequences": 16,
        "batch_tokens": 48,
        "cache_tokens": 64 * 1024,
        "prefix_bytes": 1 << 26,
    }
    return Scheduler(Decoder.load(folder, CPU, torch.float32, 1024), Limits(**{**defaults, **limits}))


def load(scheduler: Scheduler, folder: Path, name: str = "a") -> LoraAdapter:
    decoder = scheduler.decoder
    adapter = read_adapter(
        name,
        folder,
        layers=decoder.shape.layers,
        widths=decoder.shape.module_widths(),
        max_rank=16,
        device=CPU,
        dtype=torch.float32,
    )
    scheduler.adapter_loaded(adapter.uid)
    return adapter


def prompt_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


def request_for(
    prompt: np.ndarray,
    news: list[SequenceUpdate],
    *,
    adapter: LoraAdapter | None = None,
    samples: int = 1,
    max_tokens: int = 12,
    seed: int = 0,
    **settings: Any,
) -> GenerationRequest:
    chosen = [SamplingSettings(seed=seed * 1000 + i, **settings) for i in range(samples)]
    return GenerationRequest(prompt, adapter, chosen, max_tokens, news.append)


def run(scheduler: Scheduler) -> None:
    for _ in range(5000):
        if not scheduler.step():
            return
    raise AssertionError("the scheduler does not come to an end")


def check_against(logprobs: torch.Tensor, prompt: np.ndarray, update: SequenceUpdate) -> None:
    rows = logprobs[len(prompt) - 1 : len(prompt) + len(update.tokens) - 1]
    expected = rows[torch.arange(len(update.tokens)), torch.tensor(update.tokens)]
    assert torch.allclose(torch.tensor(update.logprobs, dtype=torch.float64), expected, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_logprobs_of_sampled_tokens_equal_transformers(
    kind: str,
    with_adapter: bool,
    tiny_model: Callable[[str], Path],
    adapter_maker: Callable[..., Path],
    reference: Any,
    tmp_path: Path,
) -> None:
    base = tiny_model(kind)
    folder = adapter_maker(base, tmp_path / "adapter") if with_adapter else None
    scheduler = scheduler_for(base)
    adapter = load(scheduler, folder) if folder else None
    # Shorter than a piece, longer than one (pieces of at most 48 tokens), and longer than the smallest lane.
    for length, tokens in ((5, 10), (110, 20), (250, 20)):
        prompt, news = prompt_of(length, seed=length), []
        scheduler.add(request_for(prompt, news, adapter=adapter, samples=2, max_tokens=tokens))
        run(scheduler)
        assert [update.finished for update in news] == ["length", "length"]
        for update in news:
            assert len(update.tokens) == tokens
            check_against(reference(base, folder, [*prompt.tolist(), *update.tokens]), prompt, update)


@pytest.mark.slow
def test_adapters_and_the_base_share_a_batch_without_mixing(
    tiny_model: Callable[[str], Path], tiny_adapters: list[Path], reference: Any
) -> None:
    base = tiny_model("llama-tied")
    scheduler = scheduler_for(base)
    folders = [None, *tiny_adapters]
    adapters = [None if folder is None else load(scheduler, folder, f"m@{i}") for i, folder in enumerate(folders)]
    runs = []
    for i, adapter in enumerate(adapters):
        for length in (9, 60):
            prompt, news = (
                prompt_of(length, seed=1),
                [],
            )  # the same prompts for all: nothing may be shared across adapters
            scheduler.add(request_for(prompt, news, adapter=adapter, max_tokens=15 + i, seed=i))
            runs.append((folders[i], prompt, news))
    run(scheduler)
    for folder, prompt, news in runs:
        check_against(reference(base, folder, [*prompt.tolist(), *news[0].tokens]), prompt, news[0])


def test_samples_of_one_prompt_compute_it_once(tiny_model: Callable[[str], Path]) -> None:
    scheduler = scheduler_for(tiny_model("llama-tied"))
    news: list[SequenceUpdate] = []
    scheduler.add(request_for(prompt_of(100), news, samples=8))
    run(scheduler)
    assert len(news) == 8
    assert scheduler.counters.prompt_tokens == 100
    assert len({tuple(update.tokens) for update in news}) > 1


@pytest.mark.slow
def test_a_growing_conversation_computes_only_what_is_new(tiny_model: Callable[[str], Path], reference: Any) -> None:
    base = tiny_model("llama-tied")
    scheduler = scheduler_for(base)
    first: list[SequenceUpdate] = []
    prompt = prompt_of(90)
    scheduler.add(request_for(prompt, first, max_tokens=30))
    run(scheduler)
    computed = scheduler.counters.prompt_tokens
    second: list[SequenceUpdate] = []
    longer = np.concatenate([prompt, np.array(first[0].tokens, np.int32), prompt_of(25, seed=5)])
    scheduler.add(request_for(longer, second))
    run(scheduler)
    # All but the very last sampled token of the first turn had been computed.
    assert scheduler.counters.prompt_tokens - computed == 25 + 1
    check_against(reference(base, None, [*longer.tolist(), *second[0].tokens]), longer, second[0])


def test_prompts_with_a_common_start_compute_it_once(tiny_model: Callable[[str], Path]) -> None:
    scheduler = scheduler_for(tiny_model("llama-tied"))
    common, news = prompt_of(160), []
    for i in range(6):
        scheduler.add(request_for(np.concatenate([common, prompt_of(10, seed=i + 1)]), news, seed=i))
    run(scheduler)
    assert len(news) == 6
    assert scheduler.counters.prompt_tokens == 160 + 6 * 10


@pytest.mark.slow
def test_sequences_that_give_way_go_on_where_they_were(tiny_model: Callable[[str], Path], reference: Any) -> None:
    base = tiny_model("llama-tied")
    # Room for one sequence of full length, or four short ones: growing past 256 tokens makes others give way.
    scheduler = scheduler_for(base, cache_tokens=1024, prefix_bytes=0)
    runs = []
    for i in range(4):
        prompt, news = prompt_of(230, seed=i), []
        scheduler.add(request_for(prompt, news, max_tokens=60, seed=i))
        runs.append((prompt, news))
    run(scheduler)
    assert scheduler.counters.preemptions > 0
    for prompt, news in runs:
        assert len(news) == 1
        assert len(news[0].tokens) == 60
        check_against(reference(base, None, [*prompt.tolist(), *news[0].tokens]), prompt, news[0])


@pytest.mark.slow
def test_memory_given_back_in_the_middle_loses_nothing(tiny_model: Callable[[str], Path], reference: Any) -> None:
    base = tiny_model("qwen3")
    scheduler = scheduler_for(base)
    prompt, news = prompt_of(70), []
    scheduler.add(request_for(prompt, news, samples=3, max_tokens=20))
    for _ in range(8):
        scheduler.step()
    scheduler.release_memory()
    run(scheduler)
    assert len(news) == 3
    for update in news:
        assert len(update.tokens) == 20
        check_against(reference(base, None, [*prompt.tolist(), *update.tokens]), prompt, update)


@pytest.mark.slow
def test_a_seed_gives_the_same_tokens_whatever_else_runs(tiny_model: Callable[[str], Path]) -> None:
    base = tiny_model("llama-tied")
    alone: list[SequenceUpdate] = []
    scheduler = scheduler_for(base)
    scheduler.add(request_for(prompt_of(40), alone, max_tokens=30, seed=3))
    run(scheduler)
    crowded: list[SequenceUpdate] = []
    scheduler = scheduler_for(base)
    for i in range(5):
        scheduler.add(request_for(prompt_of(20 + i, seed=i), [], max_tokens=25, seed=50 + i))
    scheduler.add(request_for(prompt_of(40), crowded, max_tokens=30, seed=3))
    run(scheduler)
    # Sums in another order may flip a draw that was on the edge; a shared stream of randomness would change nearly all.
    assert np.mean(np.array(alone[0].tokens[:10]) == np.array(crowded[0].tokens[:10])) >= 0.9


@pytest.mark.slow
def test_removed_requests_end_and_leave_the_others_alone(tiny_model: Callable[[str], Path]) -> None:
    scheduler = scheduler_for(tiny_model("llama-tied"), max_sequences=3)
    gone: list[SequenceUpdate] = []
    stays: list[SequenceUpdate] = []
    leaving = request_for(prompt_of(30), gone, samples=2, max_tokens=200)
    scheduler.add(leaving)
    scheduler.add(request_for(prompt_of(30, seed=2), stays, samples=2, max_tokens=10))
    for _ in range(5):
        scheduler.step()
    scheduler.remove(leaving)
    run(scheduler)
    assert [update.finished for update in gone] == ["abort", "abort"]
    assert [update.finished for update in stays] == ["length", "length"]
    assert scheduler.running == scheduler.waiting == 0


@pytest.mark.slow
def test_an_unloaded_adapter_serves_its_running_requests_to_the_end(
    tiny_model: Callable[[str], Path], tiny_adapters: list[Path], reference: Any
) -> None:
    base = tiny_model("llama-tied")
    scheduler = scheduler_for(base)
    adapter = load(scheduler, tiny_adapters[0])
    prompt, news = prompt_of(50), []
    scheduler.add(request_for(prompt, news, adapter=adapter, max_tokens=20))
    for _ in range(6):
        scheduler.step()
    scheduler.adapter_unloaded(adapter.uid)
    run(scheduler)
    check_against(reference(base, tiny_adapters[0], [*prompt.tolist(), *news[0].tokens]), prompt, news[0])
    assert scheduler.prefix_bytes == 0  # nothing of it is kept


@pytest.mark.slow
def test_logits_that_are_not_finite_end_only_their_own_request(
    tiny_model: Callable[[str], Path], tiny_adapters: list[Path], reference: Any
) -> None:
    base = tiny_model("llama-tied")
    scheduler = scheduler_for(base)
    poisoned = load(scheduler, tiny_adapters[0])
    bad: list[SequenceUpdate] = []
    good: list[SequenceUpdate] = []
    later: list[SequenceUpdate] = []
    prompt = prompt_of(40)
    scheduler.add(request_for(prompt_of(30, seed=1), bad, adapter=poisoned, samples=2, max_tokens=50))
    scheduler.add(request_for(prompt, good, max_tokens=20))
    for _ in range(5):
        scheduler.step()
    for weights in poisoned.up.values():
        weights.fill_(1e30)  # finite, as a loaded adapter's weights are, and more than float32 holds two layers on
    scheduler.adapter_unloaded(poisoned.uid)  # what was laid out of it before goes; its sequences hold the weights
    run(scheduler)
    assert [update.finished for update in bad] == ["error", "error"]
    assert "not finite" in str(bad[0].reason)
    assert good[0].finished == "length"
    check_against(reference(base, None, [*prompt.tolist(), *good[0].tokens]), prompt, good[0])
    scheduler.add(request_for(prompt_of(40, seed=9), later, samples=8, max_tokens=20))  # takes the poisoned row again
    run(scheduler)
    assert all(update.finished == "length" for update in later)


@pytest.mark.slow
def test_greedy_takes_the_likeliest_and_reports_the_alternatives(
    tiny_model: Callable[[str], Path], reference: Any
) -> None:
    base = tiny_model("qwen2")
    scheduler = scheduler_for(base)
    prompt, news = prompt_of(30), []
    scheduler.add(request_for(prompt, news, temperature=0.0, top_logprobs=5))
    run(scheduler)
    expected = reference(base, None, [*prompt.tolist(), *news[0].tokens])[len(prompt) - 1 : -1]
    assert news[0].tokens == expected.argmax(-1).tolist()
    for row, top in zip(expected, news[0].top, strict=True):
        values, tokens = row.topk(5)
        assert [token for token, _ in top] == tokens.tolist()
        assert [logprob for _, logprob in top] == pytest.approx(values.tolist(), abs=TOLERANCE)


def test_a_model_type_that_is_not_covered_is_refused_by_name(
    tiny_model: Callable[[str], Path], tmp_path: Path, json_editor: Callable[..., None]
) -> None:
    import shutil

    folder = shutil.copytree(tiny_model("llama-tied"), tmp_path / "other")
    json_editor(folder / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedModel, match=r"gpt2.*llama, qwen2, qwen3"):
        Decoder.load(folder, CPU, torch.float32, 512)


def test_a_context_beyond_the_models_own_is_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModel, match="2048 positions"):
        Decoder.load(tiny_model("llama-tied"), CPU, torch.float32, 4096)


@pytest.mark.slow
def test_a_cache_too_small_for_one_sequence_is_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="--kv-cache-gb"):
        scheduler_for(tiny_model("llama-tied"), cache_tokens=1000)


def test_a_question_for_one_token_is_answered_in_the_next_step_while_all_places_are_taken(
    tiny_model: Callable[[str], Path],
) -> None:
    scheduler = scheduler_for(tiny_model("llama-tied"), max_sequences=2)
    long: list[SequenceUpdate] = []
    for i in range(4):
        scheduler.add(request_for(prompt_of(20, seed=i), long, max_tokens=50, seed=i))
    while scheduler.running < 2 or scheduler.counters.sampled_tokens < 4:
        scheduler.step()
    assert scheduler.waiting == 2
    asked: list[SequenceUpdate] = []
    for i in range(3):
        scheduler.add(request_for(prompt_of(6, seed=10 + i), asked, max_tokens=1))
    scheduler.step()
    assert [len(update.tokens) for update in asked] == [1, 1, 1]
    run(scheduler)
    assert [len(update.tokens) for update in long] == [50] * 4


def test_questions_for_one_token_leave_half_of_a_step_to_older_prompts(tiny_model: Callable[[str], Path]) -> None:
    scheduler = scheduler_for(tiny_model("llama-tied"), prefix_bytes=0)
    long: list[SequenceUpdate] = []
    scheduler.add(request_for(prompt_of(240), long, max_tokens=2))
    asked: list[SequenceUpdate] = []
    for i in range(50):
        scheduler.add(request_for(prompt_of(6, seed=10 + i), asked, max_tokens=1))
    # 48 rows a step: 24 for four of the questions, and 24 for the long prompt.
    for step in range(1, 11):
        scheduler.step()
        assert len(asked) == 4 * step
    assert not long
    scheduler.step()
    assert [update.finished for update in long] == ["length"]


@pytest.mark.slow
def test_prompts_of_one_length_under_several_adapters_are_computed_beside_each_other(
    tiny_model: Callable[[str], Path], tiny_adapters: list[Path], reference: Any
) -> None:
    base = tiny_model("llama-tied")
    scheduler = scheduler_for(base, batch_tokens=96)
    folders = [None, *tiny_adapters]
    adapters = [None if folder is None else load(scheduler, folder, f"m@{i}") for i, folder in enumerate(folders)]
    runs = []
    for i, (adapter, length) in enumerate([(a, n) for n in (7, 7, 5) for a in adapters]):
        prompt, news = prompt_of(length, seed=i), []
        scheduler.add(request_for(prompt, news, adapter=adapter, max_tokens=3, seed=i))
        runs.append((folders[i % len(folders)], prompt, news))
    scheduler.step()
    assert scheduler.counters.prompt_tokens == sum(len(prompt) for _, prompt, _ in runs)
    run(scheduler)
    for folder, prompt, news in runs:
        check_against(reference(base, folder, [*prompt.tolist(), *news[0].tokens]), prompt, news[0])
