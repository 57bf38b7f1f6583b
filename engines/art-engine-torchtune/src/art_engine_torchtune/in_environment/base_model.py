"""Builds torchtune's model of a base: a folder of weights in transformers' layout becomes a decoder that computes them.

Knows torchtune's builders, their settings and the names of their modules. Whatever a builder would compute otherwise
than the config says is refused here by name; `proof` holds the result against transformers. Knows no adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.models.qwen2._component_builders import qwen2
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

from art_engine_kit.base_shapes import weight_files

INSTEAD: Final = "Train it with engine torch: pip install art-engine-torch."
# The frequencies that torchtune's Llama 3 RoPE is written for; it takes only their factor.
_LLAMA3_ROPE: Final = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Models whose queries and keys torchtune keeps in an order of its own; Qwen's are as transformers has them.
_ORDERED: Final = ("llama",)
# A projection's path within a layer, in transformers' names and in torchtune's.
PROJECTIONS: Final[Mapping[str, str]] = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}


@dataclass(frozen=True)
class Base:
    """A base model as torchtune computes it.

    `decoder` maps ids [1, S] with `mask` [1, S, S] and `input_pos` [1, S] to final hidden states [1, S, hidden size];
    its output layer was taken out. `output_weight` is that layer's matrix [vocabulary, hidden size]. `projections` are
    the linear layers by their paths in transformers' model. `rows` says, for a projection whose rows torchtune keeps in
    another order, which of transformers' rows each is.
    """

    config: Any
    decoder: Any
    output_weight: Tensor
    projections: Mapping[str, nn.Linear]
    rows: Mapping[str, Tensor]


def build_base(folder: Path, *, config: Any, device: torch.device, dtype: torch.dtype, max_seq_len: int) -> Base:
    """Load the base model in `folder`, frozen, for rows of up to `max_seq_len` tokens. `config` is transformers'.

    Raises ValueError, naming the setting and another engine, for a model that torchtune would compute otherwise.
    """
    refuse_what_differs(folder, config)
    tied = bool(config.tie_word_embeddings)
    rope: dict[str, Any] = config.rope_parameters
    shape = {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "embed_dim": config.hidden_size,
        "intermediate_dim": config.intermediate_size,
        "max_seq_len": max_seq_len,
        "norm_eps": config.rms_norm_eps,
        "rope_base": rope["rope_theta"],
        "tie_word_embeddings": tied,
    }
    llama = config.model_type == "llama"
    with torch.device("meta"):
        # The builder's own scale_factor is 32, whatever the model.
        decoder = llama3_2(**shape, scale_factor=rope.get("factor", 1)) if llama else qwen2(**shape)
    weights = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    if tied:
        weights.pop("lm_head.weight", None)
    heads = {"num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads}
    to_torchtune = hf_to_tune if llama else qwen2_hf_to_tune
    state = to_torchtune(weights, **heads, dim=config.hidden_size)
    decoder.load_state_dict({name: t.to(device, dtype) for name, t in state.items()}, strict=True, assign=True)
    with device:
        for module in decoder.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    decoder.requires_grad_(False).eval()
    output_weight = decoder.tok_embeddings.weight if tied else decoder.output.weight
    # There is no other way to have hidden states of it.
    decoder.output = nn.Identity()
    projections = {
        f"model.layers.{index}.{name}": layer.get_submodule(own)
        for index, layer in enumerate(decoder.layers)
        for name, own in PROJECTIONS.items()
    }
    rows = {
        name: row_order(projection.out_features, heads["num_heads" if name.endswith("q_proj") else "num_kv_heads"])
        for name, projection in projections.items()
        if config.model_type in _ORDERED and name.endswith(("q_proj", "k_proj"))
    }
    return Base(config, decoder, output_weight, projections, rows)


def row_order(rows: int, heads: int) -> Tensor:
    """[rows]: which of transformers' rows each of torchtune's is, in a projection that its Llama RoPE turns.

    transformers turns the first half of a head against the second, torchtune each even row against the next.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def refuse_what_differs(folder: Path, config: Any) -> None:
    """Raise ValueError for what torchtune's builders have no setting for."""
    rope: dict[str, Any] = config.rope_parameters
    kind = rope.get("rope_type", "default")
    wrong = [
        (config.model_type not in ("llama", "qwen2"), f"model_type is {config.model_type!r}"),
        (config.hidden_act != "silu", f"hidden_act is {config.hidden_act!r}"),
        (
            (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
            * config.num_attention_heads
            != config.hidden_size,
            "head_dim times num_attention_heads is not hidden_size",
        ),
        (config.model_type == "llama" and config.attention_bias, "attention_bias is true"),
        (bool(getattr(config, "mlp_bias", False)), "mlp_bias is true"),
        ("sliding_attention" in (getattr(config, "layer_types", None) or ()), "it has sliding-window layers"),
        (kind not in ("default", "llama3"), f"rope_type is {kind!r}"),
        (kind == "llama3" and config.model_type != "llama", "rope_type is 'llama3' in a model that is no Llama"),
        (
            kind == "llama3" and any(rope.get(name) != value for name, value in _LLAMA3_ROPE.items()),
            f"its llama3 RoPE has other settings than {_LLAMA3_ROPE}",
        ),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, "partial_rotary_factor is not 1"),
    ]
    found = [what for is_wrong, what in wrong if is_wrong]
    if found:
        raise ValueError(
            f"torchtune cannot compute the base model in {folder} as it is meant: {'; '.join(found)}. It has builders"
            f" for Llama and Qwen2.5 shapes only. {INSTEAD}"
        )
