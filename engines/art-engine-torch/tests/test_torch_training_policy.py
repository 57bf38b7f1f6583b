"""The torch policy on small random models of each supported shape, against stock transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from art_core.errors import AdapterMismatch, UnknownArgument
from art_engine_torch.training.kernels import GatedSilu, LoraProjection, RmsNorm
from art_engine_torch.training.policy import load_policy
from art_training_kit.device_choice import compute_dtype
from art_training_kit.logprobs import next_token_logprobs
from art_training_kit.packing import PackedRow, pack_rows
from art_training_kit.policy import PolicyRequest
from art_training_kit.rows import TokenRow

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, 300)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), eos_token="<eos>").save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, seed: int = 1, **config: Any) -> Path:
    """A PEFT adapter with B away from zero."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL} | config
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def rows_sharing(seed: int = 0) -> list[TokenRow]:
    """Three groups over one system prompt, several turns, some sampled beginnings shared."""
    rng = np.random.default_rng(seed)
    system, rows = rng.integers(1, 300, 12), []
    for group in range(3):
        prompt = [*system, *rng.integers(1, 300, 20)]
        for t in range(4):
            common = np.random.default_rng(group).integers(1, 300, 3)
            ids = [*prompt, *common, *rng.integers(1, 300, 9), *rng.integers(1, 300, 6), *rng.integers(1, 300, 8)]
            trained = [*range(32, 44), *range(50, 58)]
            rows.append(
                TokenRow(np.array(ids, np.int32), np.array(trained, np.int32), np.zeros(20, np.float32), group * 4 + t)
            )
    return rows


def logprobs(policy: Any, row: PackedRow) -> torch.Tensor:
    """Of every entry, in the packed row's order."""
    hidden = policy.hidden_states(row)[torch.from_numpy(row.parents)]
    found, _ = next_token_logprobs(
        hidden, policy.output_weight, torch.from_numpy(row.target_parent), torch.from_numpy(row.targets)
    )
    return found[torch.from_numpy(row.entry_target)]


def stock_logprobs(model: Any, row: TokenRow) -> torch.Tensor:
    ids = torch.from_numpy(row.token_ids).long()
    trained = torch.from_numpy(row.trained).long()
    return torch.log_softmax(model(ids[None]).logits[0].float(), -1)[trained - 1, ids[trained]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_logprobs_and_gradients_equal_stock_peft(base: Path, tmp_path: Path, checkpointing: bool) -> None:
    folder = adapter(base, tmp_path / "a")
    policy = load_policy(PolicyRequest(base, dtype="float32", gradient_checkpointing=checkpointing))
    policy.load_adapter(folder)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder, is_trainable=True
    )
    rows = rows_sharing()
    (packed,) = pack_rows(rows, 2000)
    assert len(packed) < 0.7 * sum(map(len, rows))
    ours = logprobs(policy, packed)
    theirs = torch.cat([stock_logprobs(stock, rows[i]) for i in packed.sequences])
    difference = float((ours - theirs).abs().max().detach())
    direction = torch.randn(len(ours), generator=torch.Generator().manual_seed(5))
    names, parameters = zip(*policy.adapter_parameters().items(), strict=True)
    mine = torch.autograd.grad(ours, parameters, direction)
    others = dict(stock.named_parameters())
    expected = torch.autograd.grad(theirs, [others[name] for name in names], direction)
    slope = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, expected, strict=True))
    print(f"max |Δ logprob| {difference:.1e}, max relative |Δ gradient| {slope:.1e}")
    assert difference < 2e-5
    assert slope < 1e-4


def test_saved_adapters_load_in_stock_peft_and_here_again(base: Path, tmp_path: Path) -> None:
    policy = load_policy(PolicyRequest(base, dtype="float32"))
    policy.load_adapter(adapter(base, tmp_path / "a"))
    with torch.no_grad():
        for parameter in policy.adapter_parameters().values():
            parameter.add_(0.01)
    (tmp_path / "b").mkdir()
    policy.save_adapter(tmp_path / "b")
    row = rows_sharing()[0]
    (packed,) = pack_rows([row], 100)
    with torch.no_grad():
        expected = logprobs(policy, packed)
        stock = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "b"
        )
        assert torch.allclose(stock_logprobs(stock, row), expected, atol=2e-5)
        policy.load_adapter(tmp_path / "a")
        assert not torch.allclose(logprobs(policy, packed), expected, atol=1e-3)
        policy.load_adapter(tmp_path / "b")
        assert torch.equal(logprobs(policy, packed), expected)
    (tmp_path / "c").mkdir()
    policy.save_adapter(tmp_path / "c")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


@pytest.mark.slow
def test_references_are_the_base_or_another_adapter_and_then_gone(base: Path, tmp_path: Path) -> None:
    trained, other = adapter(base, tmp_path / "a"), adapter(base, tmp_path / "b", seed=2)
    policy = load_policy(PolicyRequest(base, dtype="float32"))
    policy.load_adapter(trained)
    parameters = policy.adapter_parameters()
    row = rows_sharing()[0]
    (packed,) = pack_rows([row], 100)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = logprobs(policy, packed)
        with policy.reference(None):
            assert torch.allclose(logprobs(policy, packed), stock_logprobs(plain, row), atol=2e-5)
        with policy.reference(other):
            there = logprobs(policy, packed)
        assert torch.equal(logprobs(policy, packed), before)
        policy.load_adapter(other)
        assert torch.equal(logprobs(policy, packed), there)
    now = policy.adapter_parameters()
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] and now[name].requires_grad for name in now)


def test_another_shape_of_adapter_replaces_the_first(base: Path, tmp_path: Path) -> None:
    policy = load_policy(PolicyRequest(base, dtype="float32"))
    (packed,) = pack_rows([rows_sharing()[0]], 100)
    for number, config in enumerate(({}, {"r": 6, "target_modules": ["q_proj", "v_proj"]}, {})):
        folder = adapter(base, tmp_path / str(number), **config)
        policy.load_adapter(folder)
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
        with torch.no_grad():
            assert torch.allclose(logprobs(policy, packed), stock_logprobs(stock, rows_sharing()[0]), atol=2e-5)
        assert len(policy.adapter_parameters()) == len(load_file(folder / "adapter_model.safetensors"))


def test_an_adapter_that_does_not_fit_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    policy = load_policy(PolicyRequest(base, dtype="float32"))
    good = adapter(base, tmp_path / "good")
    state = load_file(good / "adapter_model.safetensors")
    name = next(n for n in sorted(state) if "q_proj.lora_A" in n)
    config = json.loads((good / "adapter_config.json").read_text())
    bad = tmp_path / "bad"
    bad.mkdir()

    def refused(match: str, weights: dict[str, torch.Tensor] = state, **changes: Any) -> None:
        save_file(weights, bad / "adapter_model.safetensors")
        (bad / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(AdapterMismatch, match=match):
            policy.load_adapter(bad)

    odd = {f"base_model.model.odd.lora_{side}.weight": torch.zeros(2) for side in "AB"}
    refused(r"q_proj.lora_A has shape \[4, 7\]", state | {name: torch.zeros(4, 7)})
    refused("not finite", state | {name: torch.full_like(state[name], float("nan"))})
    refused("has only lora_B for .*q_proj", {k: v for k, v in state.items() if k != name})
    refused("lacks weights for .*q_proj", {k: v for k, v in state.items() if name.partition(".lora")[0] not in k})
    refused("'odd', a module that its base model does not have", state | odd)
    refused("which the target_modules of its config do not name", target_modules=["no_such_proj"])
    refused("no LoRA weights", {}, target_modules=["no_such_proj"])
    refused("use_dora", use_dora=True)
    refused("lm_head", target_modules=["lm_head"])
    policy.load_adapter(good)


def test_unknown_init_args_are_refused(base: Path) -> None:
    with pytest.raises(UnknownArgument, match="load_in_4bit"):
        load_policy(PolicyRequest(base, init_args={"load_in_4bit": True}))


def test_bf16_base_keeps_an_fp32_adapter(base: Path, tmp_path: Path) -> None:
    policy = load_policy(PolicyRequest(base, dtype="bfloat16"))
    policy.load_adapter(adapter(base, tmp_path / "a"))
    (packed,) = pack_rows(rows_sharing(), 2000)
    logprobs(policy, packed).sum().backward()
    for parameter in policy.adapter_parameters().values():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())


def test_dtype_by_the_machine() -> None:
    assert compute_dtype(torch.device("cpu"), "bfloat16") is torch.bfloat16
    assert compute_dtype(torch.device("cpu"), "auto") in (torch.float32, torch.bfloat16)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True
    )


@pytest.mark.parametrize("bias", [False, True])
def test_projection_against_its_formula(bias: bool) -> None:
    x, a, b = double(2, 5, 6), double(3, 6), double(7, 3)
    weight, offset = double(7, 6).detach(), double(7).detach() if bias else None
    expected = torch.nn.functional.linear(x, weight, offset) + 1.5 * (x @ a.T) @ b.T
    assert torch.allclose(LoraProjection.apply(x, weight, offset, a, b, 1.5), expected)
    assert torch.autograd.gradcheck(lambda *t: LoraProjection.apply(t[0], weight, offset, t[1], t[2], 1.5), (x, a, b))


def test_gate_and_norm_against_their_formulas() -> None:
    gate, up = double(4, 6), double(4, 6)
    up = up.detach().roll(1).requires_grad_()
    assert torch.allclose(GatedSilu.apply(gate, up), torch.nn.functional.silu(gate) * up)
    assert torch.autograd.gradcheck(GatedSilu.apply, (gate, up))
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(8)
    expected = torch.nn.functional.rms_norm(x, (8,), weight, 1e-5)
    assert torch.allclose(RmsNorm.apply(x, weight, 1e-5), expected, atol=1e-6)
    direction = torch.randn(3, 8)
    (ours,) = torch.autograd.grad(RmsNorm.apply(x, weight, 1e-5), x, direction)
    assert torch.allclose(ours, torch.autograd.grad(expected, x, direction)[0], atol=1e-5)
