"""A tiny random Llama model and adapters for it, written without torch, so that any engine can be tried in seconds.

The weights are random but not flat: next tokens differ clearly between prompts and between adapters. A few dimensions
of the residual stream are reserved for a scripted tool call: when tools are given, the chat template ends with a token
after which the model says one tool call, greedily and whatever came before. The same seed gives the same bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, CONTEXT = 64, 2, 2, 1, 128, 1024
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# After the first of these the model says the second, and so on, up to the end of the message.
TOOL_CALL = '\n{"name": "look_up", "arguments": {"city": "Paris"}}\n'
SCRIPT = ("<|use_tool|>", "<tool_call>", TOOL_CALL, "</tool_call>", "<|im_end|>")
_RESERVED = len(SCRIPT) - 1
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if tools %}<|use_tool|>{% endif %}{% endif %}"
)
_TEXT = (
    "You are a helpful assistant. Say something about the city and the weather. The user asks, the assistant answers "
    "with a word, a number like 1234567890, or a list of names; then it stops. Yes, no, maybe. What is it? It is so! "
    'system user assistant {"type": "function", "function": {"name": "look_up", "description": "x", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}} '
)

Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Shapes:
    """What an adapter needs to know of its base: how many layers, and each module's (out, in) features."""

    layers: int
    modules: Mapping[str, tuple[int, int]]
    reserved: int = 0


def write_base_model(folder: Path, *, seed: int = 1) -> Path:
    """Write config, weights and tokenizer of the tiny model into `folder`, and give it."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(ids),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    stops = [ids["<|im_end|>"]]
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": stops, "do_sample": True}), encoding="utf-8"
    )
    save_file(_weights(ids, np.random.default_rng(seed)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shapes_of(base_model: Path) -> Shapes:
    """The shapes of any Llama- or Qwen-like base model, read from its config."""
    config = json.loads((base_model / "config.json").read_bytes())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv, wide = head_dim * config.get("num_key_value_heads", heads), config["intermediate_size"]
    modules = {
        "self_attn.q_proj": (head_dim * heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, head_dim * heads),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    ours = config["hidden_size"] == HIDDEN and config["num_hidden_layers"] == LAYERS
    return Shapes(config["num_hidden_layers"], modules, _RESERVED if ours else 0)


def write_adapter(
    folder: Path, base_model: Path, *, seed: int, rank: int = 8, strength: float = 0.5, width_error: int = 0
) -> Path:
    """Write a random LoRA adapter as PEFT would, and give its folder. `strength` 0 makes it the identity (B = 0).

    `strength` is the size of what the adapter adds, against that of the base's own weights; `width_error` makes every
    lora_A wider than its base by that much, as in an adapter of another model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, shapes = np.random.default_rng(seed), shapes_of(base_model)
    alpha = 2 * rank
    tensors: Tensors = {}
    for layer in range(shapes.layers):
        for module, (out_features, in_features) in shapes.modules.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            a = rng.standard_normal((rank, in_features + width_error)) / np.sqrt(in_features)
            b = rng.standard_normal((out_features, rank)) * strength / np.sqrt(rank) * rank / alpha
            if shapes.reserved and module.endswith(("o_proj", "down_proj")):
                b[-shapes.reserved :] = 0.0
            tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = b.astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(MODULES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def change_adapter(folder: Path, change: Any) -> None:
    """Rewrite an adapter's weights with `change(tensors)`, in place."""
    file = folder / "adapter_model.safetensors"
    tensors = {name: values.copy() for name, values in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _weights(ids: dict[str, int], rng: np.random.Generator) -> Tensors:
    reserved = slice(HIDDEN - _RESERVED, HIDDEN)

    def matrix(out_features: int, in_features: int, gain: float = 1.0) -> NDArray[np.float32]:
        values = rng.standard_normal((out_features, in_features)) * gain / np.sqrt(in_features)
        return np.asarray(values, dtype=np.float32)

    head_dim = HIDDEN // HEADS
    embed = rng.standard_normal((len(ids), HIDDEN)).astype(np.float32)
    head = matrix(len(ids), HIDDEN, 2.0)
    embed[:, reserved] = 0.0
    head[:, reserved] = 0.0
    for step, (said, following) in enumerate(itertools.pairwise(SCRIPT)):
        embed[ids[said], HIDDEN - _RESERVED + step] = 16.0
        head[ids[following], HIDDEN - _RESERVED + step] = 8.0
    tensors: Tensors = {
        "model.embed_tokens.weight": embed,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": head,
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = np.ones(HIDDEN, np.float32)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = np.ones(HIDDEN, np.float32)
        tensors[f"{prefix}.self_attn.q_proj.weight"] = matrix(HIDDEN, HIDDEN)
        tensors[f"{prefix}.self_attn.k_proj.weight"] = matrix(head_dim * KV_HEADS, HIDDEN)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = matrix(head_dim * KV_HEADS, HIDDEN)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = matrix(HIDDEN, HIDDEN)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{prefix}.mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
        # Nothing but the embedding writes to the reserved dimensions, so that the script is never disturbed.
        tensors[f"{prefix}.self_attn.o_proj.weight"][reserved] = 0.0
        tensors[f"{prefix}.mlp.down_proj.weight"][reserved] = 0.0
    return tensors


def _write_tokenizer(folder: Path) -> dict[str, int]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    scripted = [token for token in SCRIPT if token not in SPECIAL]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320 - len(SPECIAL) - len(scripted), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in scripted])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return vocabulary
