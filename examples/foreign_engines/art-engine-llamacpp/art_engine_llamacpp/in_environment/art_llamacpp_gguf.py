"""Writes what llama.cpp reads: a folder of weights, or a PEFT adapter for it, as one GGUF file.

Knows the Llama shape and byte-level BPE tokenizers that split words as GPT-2 or SmolLM2 do, and refuses every other by
name. Starts nothing. Runs in the engine's own environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.utility import SafetensorsLocal

MODULES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


class Base:
    """A folder of weights: its config, and each token's text and kind. Raises ValueError for another shape."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read(folder / "config.json")
        tokenizer = _read(folder / "tokenizer.json")
        if self.config.get("model_type") != "llama" or tokenizer["model"].get("type") != "BPE":
            raise ValueError(f"{folder}: only Llama shapes with a byte-level BPE tokenizer are converted here")
        self.splitting = _splitting(tokenizer["pre_tokenizer"])
        self.merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
        added = {token["id"]: token for token in tokenizer["added_tokens"]}
        texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
        texts |= {number: token["content"] for number, token in added.items()}
        self.tokens = [texts.get(number, f"[unused {number}]") for number in range(self.config["vocab_size"])]
        self.kinds = [NORMAL if n not in added else CONTROL if added[n]["special"] else USER_DEFINED
                      for n in range(len(self.tokens))]  # fmt: skip

    def context(self) -> int:
        """How many tokens it was made for."""
        return int(self.config["max_position_embeddings"])

    def template(self) -> str | None:
        """Its chat template, where it has one."""
        beside = self.folder / "chat_template.jinja"
        if beside.exists():
            return beside.read_text(encoding="utf-8")
        found: str | None = _read(self.folder / "tokenizer_config.json").get("chat_template")
        return found

    def pieces(self) -> list[bytes]:
        """The bytes that each token adds to a text; control tokens add none."""
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        byte_of = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
        return [
            b""
            if kind == CONTROL
            else text.encode()
            if kind == USER_DEFINED
            else bytes(byte_of.get(c, 63) for c in text)
            for text, kind in zip(self.tokens, self.kinds, strict=True)
        ]


def write_base(base: Base, file: Path, *, exact: bool) -> None:
    """The model as GGUF, its matrices in 32 bits where `exact`, else in 16."""
    config, writer = base.config, gguf.GGUFWriter(file, "llama")
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    if config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ValueError(f"{base.folder}: scaled rotary positions are not converted here")
    writer.add_context_length(base.context())
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(base.splitting)
    writer.add_token_list(base.tokens)
    writer.add_token_types(base.kinds)
    writer.add_token_merges(base.merges)
    writer.add_bos_token_id(config["bos_token_id"])
    stop = config["eos_token_id"]
    writer.add_eos_token_id(stop[0] if isinstance(stop, list) else stop)
    writer.add_add_bos_token(False)
    if template := base.template():
        writer.add_chat_template(template)
    for shard in sorted(base.folder.glob("*.safetensors")):
        for name, values in _tensors(shard):
            module = name.removesuffix(".weight")
            layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
            known = MODULES.get(layer[2]) if layer else ENDS.get(module)
            if known is None:
                raise ValueError(f"{shard}: {name} is no tensor of a Llama shape")
            written = f"blk.{layer[1]}.{known}.weight" if layer else f"{known}.weight"
            values = _as_ggml(module, values, config)
            writer.add_tensor(written, values if exact or values.ndim == 1 else values.astype(np.float16))
    _finish(writer)


def write_adapter(base: Base, folder: Path, file: Path, *, max_rank: int) -> None:
    """The PEFT adapter in `folder` as GGUF. Raises ValueError or OSError for one that is none, or not plain."""
    config = _read(folder / "adapter_config.json")
    special = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
               if config.get(name)]  # fmt: skip
    if config.get("peft_type") != "LORA" or special or config.get("bias", "none") != "none":
        raise ValueError(
            f"{folder}: only plain LoRA is converted here{', not ' if special else ''}{', '.join(special)}"
        )
    if config["r"] > max_rank:
        raise ValueError(f"{folder}: rank {config['r']} is more than {max_rank}, the highest that was asked for")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, values in _tensors(folder / "adapter_model.safetensors"):
        part = re.fullmatch(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight", name)
        if part is None or part[2] not in MODULES:
            raise ValueError(f"{folder}: {name} is no LoRA of a linear layer that a Llama shape has")
        if not np.isfinite(values).all():
            raise ValueError(f"{folder}: {name} holds values that are not finite")
        turned = _as_ggml(part[2], values, base.config) if part[3] == "B" else values
        writer.add_tensor(f"blk.{part[1]}.{MODULES[part[2]]}.weight.lora_{part[3].lower()}", turned)
    _finish(writer)


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_bytes())
    return found


def _splitting(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer splits words."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] for part in parts]
    if kinds in (["ByteLevel"], ["Digits", "ByteLevel"]) and parts[-1].get("use_regex", True):
        return "gpt-2" if kinds == ["ByteLevel"] else "smollm"
    raise ValueError(f"a tokenizer that splits words by {', '.join(kinds)} is not converted here")


def _tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """The tensors of a safetensors file, in 32 bits."""
    for name, tensor in SafetensorsLocal(file).tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is {tensor.dtype}, not one of {', '.join(DTYPES)}")
        values = np.frombuffer(tensor.mmap_bytes(), DTYPES[tensor.dtype]).reshape(tensor.shape)
        if tensor.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        yield name, values.astype(np.float32)


def _as_ggml(module: str, values: Any, config: dict[str, Any]) -> Any:
    """Queries and keys as llama.cpp rotates them: in pairs beside each other, where transformers' are halves apart."""
    heads = config["num_attention_heads"]
    by_module = {"q_proj": heads, "k_proj": config.get("num_key_value_heads", heads)}
    count = by_module.get(module.rpartition(".")[2])
    if count is None:
        return values
    paired = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(paired.reshape(values.shape))


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
