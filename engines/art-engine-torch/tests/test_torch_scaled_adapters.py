"""Adapters with scales, ranks and modules of their own: served and trained as PEFT computes them, in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from art_engine_kit.base_shapes import linear_shapes
from art_engine_kit.plain_adapter import plain_adapter
from art_engine_torch.server.decoder import Decoder
from art_engine_torch.server.generation import GenerationRequest, SequenceUpdate
from art_engine_torch.server.lora_files import read_adapter
from art_engine_torch.server.sampling import SamplingSettings
from art_engine_torch.server.scheduler import Limits, Scheduler
from art_engine_torch.training.policy import load_policy
from art_training_kit.logprobs import next_token_logprobs
from art_training_kit.packing import PackedRow, pack_rows
from art_training_kit.policy import PolicyRequest
from art_training_kit.rows import TokenRow

CPU = torch.device("cpu")
BASE = "llama-untied-rope-scaled"
ADAPTERS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"rank": 16, "use_rslora": True},
    "alpha_pattern": {"rank": 4, "alpha_pattern": {"q_proj": 1, r"layers\.1\.mlp\.up_proj": 24, "down_proj": 2.5}},
    "rank_pattern": {"rank": 4, "rank_pattern": {"q_proj": 2, "v_proj": 16, "^model.layers.0.mlp.gate_proj": 7}},
    "all three": {"rank": 4, "use_rslora": True, "rank_pattern": {"k_proj": 9}, "alpha_pattern": {"k_proj": 3}},
    "some layers": {"rank": 4, "layers_to_transform": [1], "exclude_modules": ["up_proj"], "lora_dropout": 0.05},
    "one of three": {"rank": 4, "modules": ["v_proj", "up_proj"]},
}


@pytest.fixture(params=sorted(ADAPTERS))
def adapter(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    adapter_maker: Callable[..., Path],
    tmp_path: Path,
) -> Path:
    return adapter_maker(tiny_model(BASE), tmp_path / "adapter", **ADAPTERS[request.param])


@pytest.fixture
def base(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model(BASE)


# served


@pytest.mark.slow
def test_the_server_computes_each_as_peft_does_all_in_one_batch_and_in_the_handed_form(
    base: Path, adapter_maker: Callable[..., Path], reference: Any, tmp_path: Path
) -> None:
    decoder = Decoder.load(base, CPU, torch.float32, 1024)
    limits = Limits(max_len=1024, max_sequences=16, batch_tokens=48, cache_tokens=64 * 1024, prefix_bytes=1 << 26)
    scheduler = Scheduler(decoder, limits)
    prompt = np.random.default_rng(3).integers(0, 256, 60).astype(np.int32)
    asked: list[tuple[str, Path, list[SequenceUpdate]]] = []
    for kind, settings in ADAPTERS.items():
        folder = adapter_maker(base, tmp_path / kind, **settings)
        plain = plain_adapter(folder, linear_shapes(base), tmp_path / "served" / kind)
        assert plain != folder
        for form in (folder, plain):
            loaded = read_adapter(
                kind,
                form,
                layers=decoder.shape.layers,
                widths=decoder.shape.module_widths(),
                max_rank=16,
                device=CPU,
                dtype=torch.float32,
            )
            scheduler.adapter_loaded(loaded.uid)
            news: list[SequenceUpdate] = []
            scheduler.add(GenerationRequest(prompt, loaded, [SamplingSettings(seed=len(asked))], 12, news.append))
            asked.append((kind, folder, news))
    while scheduler.step():
        pass
    for kind, folder, news in asked:
        (update,) = news
        rows = reference(base, folder, [*prompt.tolist(), *update.tokens])[len(prompt) - 1 : -1]
        expected = rows[torch.arange(len(update.tokens)), torch.tensor(update.tokens)]
        difference = float((torch.tensor(update.logprobs, dtype=torch.float64) - expected).abs().max())
        print(f"{kind}: max |Δ logprob| {difference:.1e}")
        assert difference < 1e-4, kind


# trained


def some_rows() -> list[TokenRow]:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 256, 12)
    rows = []
    for number in range(4):
        ids = np.array([*shared, *rng.integers(0, 256, 20)], np.int32)
        rows.append(TokenRow(ids, np.arange(14, 32, dtype=np.int32), np.zeros(18, np.float32), number))
    return rows


def ours(policy: Any, row: PackedRow) -> torch.Tensor:
    hidden = policy.hidden_states(row)[torch.from_numpy(row.parents)]
    targets = torch.from_numpy(row.target_parent), torch.from_numpy(row.targets)
    found, _ = next_token_logprobs(hidden, policy.output_weight, *targets)
    return found[torch.from_numpy(row.entry_target)]


def theirs(model: Any, row: TokenRow) -> torch.Tensor:
    ids, trained = torch.from_numpy(row.token_ids).long(), torch.from_numpy(row.trained).long()
    return torch.log_softmax(model(ids[None]).logits[0].float(), -1)[trained - 1, ids[trained]]


def stock(base: Path, folder: Path) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # Dropout is taken as 0 here, and so it is by PEFT in eval mode.
    return PeftModel.from_pretrained(plain, folder, is_trainable=True).eval()


def test_the_policy_computes_each_as_peft_does_with_its_gradients(base: Path, adapter: Path) -> None:
    policy = load_policy(PolicyRequest(base, dtype="float32"))
    policy.load_adapter(adapter)
    model, rows = stock(base, adapter), some_rows()
    (packed,) = pack_rows(rows, 2000)
    mine = ours(policy, packed)
    expected = torch.cat([theirs(model, rows[i]) for i in packed.sequences])
    assert float((mine - expected).abs().max().detach()) < 2e-5
    direction = torch.randn(len(mine), generator=torch.Generator().manual_seed(5))
    named = policy.adapter_parameters()
    others = dict(model.named_parameters())
    assert set(named) == {name for name in others if "lora_" in name}
    slopes = torch.autograd.grad(mine, list(named.values()), direction)
    wanted = torch.autograd.grad(expected, [others[name] for name in named], direction)
    for name, slope, want in zip(named, slopes, wanted, strict=True):
        assert float((slope - want).abs().max()) < 1e-4 * max(float(want.abs().max()), 1e-3), name


def test_what_the_policy_saves_is_the_same_adapter_to_peft(base: Path, adapter: Path, tmp_path: Path) -> None:
    policy = load_policy(PolicyRequest(base, dtype="float32"))
    policy.load_adapter(adapter)
    with torch.no_grad():
        for parameter in policy.adapter_parameters().values():
            parameter.add_(0.01)
    (tmp_path / "saved").mkdir()
    policy.save_adapter(tmp_path / "saved")
    row = some_rows()[0]
    (packed,) = pack_rows([row], 100)
    with torch.no_grad():
        assert torch.allclose(ours(policy, packed), theirs(stock(base, tmp_path / "saved"), row), atol=2e-5)
    before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (adapter, tmp_path / "saved"))
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform"):
        assert before[name] == after[name], name
    assert after["lora_dropout"] == 0.0


@pytest.mark.slow
def test_one_adapter_after_another_each_with_a_shape_of_its_own(
    base: Path, adapter_maker: Callable[..., Path], tmp_path: Path
) -> None:
    policy = load_policy(PolicyRequest(base, dtype="float32"))
    row = some_rows()[0]
    (packed,) = pack_rows([row], 100)
    folders = {kind: adapter_maker(base, tmp_path / kind, **settings) for kind, settings in ADAPTERS.items()}
    for kind, folder in [*folders.items(), *reversed(folders.items())]:
        policy.load_adapter(folder)
        with torch.no_grad():
            assert torch.allclose(ours(policy, packed), theirs(stock(base, folder), row), atol=2e-5), kind
    policy.load_adapter(folders["rsLoRA"])
    with torch.no_grad():
        for kind, folder in folders.items():
            with policy.reference(folder):
                assert torch.allclose(ours(policy, packed), theirs(stock(base, folder), row), atol=2e-5), kind


def test_an_adapter_in_torchs_older_file_is_trained_and_referred_to(
    base: Path, adapter_maker: Callable[..., Path], tmp_path: Path
) -> None:
    new = adapter_maker(base, tmp_path / "new")
    old = adapter_maker(base, tmp_path / "old", seed=2)
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    policy = load_policy(PolicyRequest(base, dtype="float32"))
    row = some_rows()[0]
    (packed,) = pack_rows([row], 100)
    expected = theirs(stock(base, old), row)
    policy.load_adapter(new)
    with torch.no_grad():
        with policy.reference(old):
            assert torch.allclose(ours(policy, packed), expected, atol=2e-5)
        policy.load_adapter(old)
        assert torch.allclose(ours(policy, packed), expected, atol=2e-5)
