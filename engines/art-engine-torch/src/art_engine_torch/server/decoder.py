"""The forward pass of a Llama- or Qwen-shaped decoder over a flat batch of tokens, with the weights fused for speed.

Knows weights, rotary positions and where keys and values go. It must not know requests, adapters' files, sampling or
HTTP: one call takes token ids and a plan that says which rows are single decode steps and which are pieces of prompts.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from .lora_batch import LoraBatch

# Model types whose layers have exactly the parts read below; another one would load and answer wrongly.
SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")
# Rotary types whose angles depend on the position alone, so that a table made once is right for every length.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class UnsupportedModel(ValueError):
    """The folder holds a model that this engine cannot run; the message says which ones it can."""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder. `max_positions` is the context length that the model's configuration declares, in tokens."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int

    @property
    def kv_numbers_per_token(self) -> int:
        """How many numbers one token leaves in the cache, over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim

    def module_widths(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every projection that an adapter may change."""
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


@dataclass(frozen=True)
class DecodeRows:
    """Rows of the batch that are one new token each of sequences with a row of their own in a lane of the cache.

    `kv` is the lane, [layers, 2, rows, capacity, kv_heads, head_dim]; the batch's rows from `offset` on are its first
    `count` rows. `slots` [count] says where each new token goes, as row * capacity + position. `mask` [count, 1, heads
    per kv head, length] is added to the scores and hides what lies beyond each sequence's end.
    """

    kv: Tensor
    offset: int
    count: int
    length: int
    slots: Tensor
    mask: Tensor


@dataclass(frozen=True)
class PromptPiece:
    """`count` consecutive tokens of one prompt, from position `start`. `kv` is its own [layers, 2, length, kv_heads,
    head_dim].
    """

    kv: Tensor
    offset: int
    start: int
    count: int


@dataclass(frozen=True)
class BatchPlan:
    """What each row of a flat batch is. `outputs` [n] are the rows whose next token is wanted."""

    decode: list[DecodeRows] = field(default_factory=list)
    prompts: list[PromptPiece] = field(default_factory=list)
    outputs: Tensor | None = None


@dataclass
class _Layer:
    """One layer's weights, [in, out] each, projections with the same input side by side."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Decoder:
    """Weights of one model on one device, and its forward pass."""

    def __init__(self, model: Any, device: torch.device, max_len: int) -> None:
        """Takes over a transformers causal language model; `model` must not be used afterwards.

        Raises UnsupportedModel for shapes that the forward pass does not cover.
        """
        config = model.config
        _refuse_unsupported(config, max_len)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.shape = DecoderShape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            max_positions=config.max_position_embeddings,
        )
        body = model.model
        self.device = device
        self.dtype: torch.dtype = body.embed_tokens.weight.dtype
        self._epsilon = float(config.rms_norm_eps)
        self._activation = body.layers[0].mlp.act_fn
        with torch.inference_mode():
            self._embedding = body.embed_tokens.weight.detach().to(device)
            tied = model.lm_head.weight.data_ptr() == body.embed_tokens.weight.data_ptr()
            self._head = self._embedding if tied else model.lm_head.weight.detach().to(device)
            self._final_norm = body.norm.weight.detach().to(device)
            self._cos, self._sin = _rotary_tables(body, max_len, head_dim, device, self.dtype)
            self._layers = []
            for index in range(len(body.layers)):
                self._layers.append(self._fuse(body.layers[index]))
                body.layers[index] = torch.nn.Identity()  # gives the parts back before the next layer is fused
        gc.collect()

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype, max_len: int | None) -> Decoder:
        """Reads a transformers folder. `max_len` is in tokens, None for the model's own."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        limit = config.max_position_embeddings if max_len is None else max_len
        _refuse_unsupported(config, limit)
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True)
        except SafetensorError as error:
            raise UnsupportedModel(
                f"The safetensors weights in {folder} cannot be read: {error}. Fetch them again."
            ) from error
        return cls(model, device, limit)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, plan: BatchPlan, lora: LoraBatch | None) -> Tensor:
        """Next-token logits, float32 [outputs, vocab], of `plan.outputs`; keys and values go where the plan says.

        `tokens` and `positions` are int64 [rows]; `lora` says which adapter each row runs under (None: all the base
        model).
        """
        shape = self.shape
        total = tokens.shape[0]
        cos, sin = self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)
        groups = _alike(plan.prompts)
        masks = [_piece_mask(group[0], shape, tokens.device) for group in groups]
        hidden = self._embedding[tokens]
        rotated = shape.heads + shape.kv_heads
        half = shape.head_dim // 2
        for index, layer in enumerate(self._layers):
            normed = F.rms_norm(hidden, (shape.hidden,), layer.input_norm, self._epsilon)
            projected = _project(normed, layer.qkv, layer.qkv_bias)
            if lora is not None:
                lora.add(projected, normed, index, "qkv")
            split = projected.view(total, rotated + shape.kv_heads, shape.head_dim)
            turned = split[:, :rotated]
            if layer.qk_norm is not None:
                turned = F.rms_norm(turned, (shape.head_dim,), None, self._epsilon) * layer.qk_norm
            turned = torch.addcmul(turned * cos, turned.roll(half, -1), sin)
            query, key, value = turned[:, : shape.heads], turned[:, shape.heads :], split[:, rotated:]
            attended = torch.empty_like(query, memory_format=torch.contiguous_format)
            for rows in plan.decode:
                self._attend_decode(attended, query, key, value, rows, index)
            for group, mask in zip(groups, masks, strict=True):
                if mask is None:
                    self._attend_starts(attended, query, key, value, group, index)
                else:
                    self._attend_piece(attended, query, key, value, group[0], mask, index)
            flat = attended.view(total, shape.heads * shape.head_dim)
            if lora is None:
                hidden.addmm_(flat, layer.out)
                if layer.out_bias is not None:
                    hidden += layer.out_bias
            else:
                projected = _project(flat, layer.out, layer.out_bias)
                lora.add(projected, flat, index, "out")
                hidden += projected
            normed = F.rms_norm(hidden, (shape.hidden,), layer.post_norm, self._epsilon)
            both = _project(normed, layer.gate_up, layer.gate_up_bias)
            if lora is not None:
                lora.add(both, normed, index, "gate_up")
            gated = self._activation(both[:, : shape.intermediate]).mul_(both[:, shape.intermediate :])
            if lora is None:
                hidden.addmm_(gated, layer.down)
                if layer.down_bias is not None:
                    hidden += layer.down_bias
            else:
                projected = _project(gated, layer.down, layer.down_bias)
                lora.add(projected, gated, index, "down")
                hidden += projected
        wanted = hidden if plan.outputs is None else hidden[plan.outputs]
        return F.linear(F.rms_norm(wanted, (shape.hidden,), self._final_norm, self._epsilon), self._head).float()

    @torch.inference_mode()
    def probe(self) -> None:
        """One small forward pass: libraries load and memory is mapped before a request waits for it.

        Raises ValueError when its logits are not finite, and whatever a device raises that is at its end.
        """
        shape, count = self.shape, 4
        size = (shape.layers, 2, count, shape.kv_heads, shape.head_dim)
        kv = torch.zeros(size, device=self.device, dtype=self.dtype)
        places = torch.arange(count, device=self.device)
        logits = self.forward(places, places, BatchPlan(prompts=[PromptPiece(kv, 0, 0, count)]), None)
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("The model's logits are not finite on a test input: its weights are damaged.")

    def move(self, device: torch.device) -> None:
        """Moves every weight, so that a sleeping server leaves the device's memory to others."""
        self._embedding, tied = self._embedding.to(device), self._head is self._embedding
        self._head = self._embedding if tied else self._head.to(device)
        self._final_norm = self._final_norm.to(device)
        self._cos, self._sin = self._cos.to(device), self._sin.to(device)
        for layer in self._layers:
            for name, weight in vars(layer).items():
                if weight is not None:
                    setattr(layer, name, weight.to(device))

    def _attend_decode(
        self, attended: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: DecodeRows, layer: int
    ) -> None:
        shape = self.shape
        here = slice(rows.offset, rows.offset + rows.count)
        keys, values = rows.kv[layer, 0], rows.kv[layer, 1]
        keys.view(-1, shape.kv_heads, shape.head_dim).index_copy_(0, rows.slots, key[here])
        values.view(-1, shape.kv_heads, shape.head_dim).index_copy_(0, rows.slots, value[here])
        # The query heads that share a key head stand where other code has query positions: no key is ever repeated.
        grouped = query[here].view(rows.count, shape.kv_heads, -1, shape.head_dim)
        result = F.scaled_dot_product_attention(
            grouped,
            keys[: rows.count, : rows.length].transpose(1, 2),
            values[: rows.count, : rows.length].transpose(1, 2),
            attn_mask=rows.mask,
        )
        attended[here] = result.flatten(1, 2)

    def _attend_starts(
        self, attended: Tensor, query: Tensor, key: Tensor, value: Tensor, group: list[PromptPiece], layer: int
    ) -> None:
        """First pieces of one length, row after row: short prompts cost more in calls than in arithmetic."""
        count = group[0].count
        here = slice(group[0].offset, group[0].offset + len(group) * count)
        for piece in group:
            own = slice(piece.offset, piece.offset + count)
            piece.kv[layer, 0, :count] = key[own]
            piece.kv[layer, 1, :count] = value[own]
        asked, keys, values = (
            rows[here].view(len(group), count, -1, self.shape.head_dim).transpose(1, 2) for rows in (query, key, value)
        )
        result = F.scaled_dot_product_attention(asked, keys, values, is_causal=True, enable_gqa=True)
        attended[here] = result.transpose(1, 2).flatten(0, 1)

    def _attend_piece(
        self,
        attended: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        piece: PromptPiece,
        mask: Tensor,
        layer: int,
    ) -> None:
        """A later piece of a prompt, which sees what came before it."""
        here, end = slice(piece.offset, piece.offset + piece.count), piece.start + piece.count
        keys, values = piece.kv[layer, 0], piece.kv[layer, 1]
        keys[piece.start : end] = key[here]
        values[piece.start : end] = value[here]
        past_keys, past_values = keys[:end].transpose(0, 1).unsqueeze(0), values[:end].transpose(0, 1).unsqueeze(0)
        grouped = query[here].transpose(0, 1).reshape(1, self.shape.kv_heads, -1, self.shape.head_dim)
        result = F.scaled_dot_product_attention(grouped, past_keys, past_values, attn_mask=mask)
        attended[here] = result.view(self.shape.heads, piece.count, self.shape.head_dim).transpose(0, 1)

    def _fuse(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp

        def weight(*parts: Any) -> Tensor:
            return torch.cat([part.weight.detach() for part in parts]).t().contiguous().to(self.device)

        def bias(*parts: Any) -> Tensor | None:
            if all(part.bias is None for part in parts):
                return None
            filled = [part.weight.new_zeros(part.out_features) if part.bias is None else part.bias for part in parts]
            return torch.cat([b.detach() for b in filled]).to(self.device)

        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        qk_norm = None
        if hasattr(attention, "q_norm"):
            query = attention.q_norm.weight.detach().expand(self.shape.heads, -1)
            keys = attention.k_norm.weight.detach().expand(self.shape.kv_heads, -1)
            qk_norm = torch.cat([query, keys]).to(self.device)
        return _Layer(
            input_norm=layer.input_layernorm.weight.detach().to(self.device),
            qkv=weight(*qkv),
            qkv_bias=bias(*qkv),
            qk_norm=qk_norm,
            out=weight(attention.o_proj),
            out_bias=bias(attention.o_proj),
            post_norm=layer.post_attention_layernorm.weight.detach().to(self.device),
            gate_up=weight(mlp.gate_proj, mlp.up_proj),
            gate_up_bias=bias(mlp.gate_proj, mlp.up_proj),
            down=weight(mlp.down_proj),
            down_bias=bias(mlp.down_proj),
        )


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _alike(pieces: list[PromptPiece]) -> list[list[PromptPiece]]:
    """First pieces of the same length that follow each other, together; any other piece by itself."""
    groups: list[list[PromptPiece]] = []
    for piece in pieces:
        last = groups[-1][-1] if groups else None
        if last is not None and piece.start == last.start == 0 and piece.count == last.count:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _piece_mask(piece: PromptPiece, shape: DecoderShape, device: torch.device) -> Tensor | None:
    """Which positions each token of a later piece sees, repeated for the query heads of a key head; None for a first
    piece.
    """
    if piece.start == 0:
        return None
    seen = torch.ones(piece.count, piece.start + piece.count, dtype=torch.bool, device=device).tril_(piece.start)
    return seen.repeat(shape.heads // shape.kv_heads, 1)


def _rotary_tables(
    body: Any, max_len: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [max_len, head_dim]; the first half of sin is negated, so that a roll by half a head does the
    rotation.
    """
    positions = torch.arange(max_len, device=body.embed_tokens.weight.device).unsqueeze(0)
    probe = torch.zeros(1, 1, dtype=torch.float32, device=positions.device)
    cos, sin = body.rotary_emb(probe, positions)
    if cos.shape[-1] != head_dim:
        raise UnsupportedModel(
            f"This model rotates {cos.shape[-1]} of each head's {head_dim} numbers; engine torch rotates all."
        )
    sin = torch.cat([-sin[0, :, : head_dim // 2], sin[0, :, head_dim // 2 :]], dim=-1)
    return cos[0].to(device, dtype), sin.to(device, dtype)


def _refuse_unsupported(config: Any, max_len: int) -> None:
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModel(
            f"Engine torch does not know model type {config.model_type!r}; it serves "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}. Another inference engine may: pip install art-engine-vllm."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise UnsupportedModel(
            f"Engine torch does not know rotary type {rope_type!r}; it knows {', '.join(SUPPORTED_ROPE_TYPES)}."
        )
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in layer_types or (config.model_type == "mistral" and window is not None)
    if slides and window is not None and max_len > window:
        raise UnsupportedModel(
            f"This model attends to the last {window} tokens only; engine torch does not slide. "
            f"Serve it with a context of at most {window} tokens (max_model_len={window})."
        )
    if layer_types - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"Engine torch does not know attention layers of type {sorted(layer_types)}.")
    if max_len > config.max_position_embeddings:
        raise UnsupportedModel(
            f"max_model_len={max_len} exceeds the {config.max_position_embeddings} positions this model was made for."
        )
