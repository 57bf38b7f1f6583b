"""Adapters as torchtune computes them: each of a PEFT adapter's pairs in a LoRALinear that stands for its projection.

Their parameters keep PEFT's layout, and torchtune's own order of rows is made on the way into the product. So what is
saved is what is held, a checkpoint's optimizer state means the same to every engine, and nothing is ever converted
back: torchtune has no inverse of its export to PEFT, which gets Qwen's weights wrong besides. Knows no row and no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchtune.modules.peft import LoRALinear

from art_engine_kit.adapter_config import AdapterConfig
from art_engine_kit.adapter_files import PEFT_PREFIX, Adapter

from .base_model import Base


class _InRowsOf(nn.Module):
    """A matrix in transformers' order of rows as torchtune needs it."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight[self.rows]


@dataclass(frozen=True)
class Lora:
    """One adapter: its config, its layers and their (A, B), by the module's path in transformers' model."""

    config: AdapterConfig
    layers: Mapping[str, nn.Module]
    pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """By the names that PEFT gives them in a model whose adapter is called default."""
        for module, (a, b) in self.pairs.items():
            yield f"{PEFT_PREFIX}{module}.lora_A.default.weight", a
            yield f"{PEFT_PREFIX}{module}.lora_B.default.weight", b


def lora_of(adapter: Adapter, base: Base, device: torch.device, *, trained: bool) -> Lora:
    """The adapter, which was found to fit `base`, in fp32 whatever the base's dtype."""
    layers: dict[str, nn.Module] = {}
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for module, pair in adapter.pairs.items():
        a, b = (
            nn.Parameter(torch.from_numpy(side.float32()).to(device, copy=True), requires_grad=trained) for side in pair
        )
        layers[module] = _layer(base, module, a, b, adapter.config)
        pairs[module] = (a, b)
    return Lora(adapter.config, layers, pairs)


def _layer(base: Base, module: str, a: nn.Parameter, b: nn.Parameter, config: AdapterConfig) -> nn.Module:
    projection = base.projections[module]
    rank = config.rank(module)
    # It makes weights of its own, which are replaced.
    with torch.device("meta"):
        layer = LoRALinear(
            projection.in_features,
            projection.out_features,
            rank,
            # It multiplies by alpha / rank, and rsLoRA's scale is another.
            config.scaling(module) * rank,
            use_bias=projection.bias is not None,
        )
    layer.weight, layer.bias = projection.weight, projection.bias
    layer.lora_a.weight, layer.lora_b.weight = a, b
    if module in base.rows:
        parametrize.register_parametrization(layer.lora_b, "weight", _InRowsOf(base.rows[module].to(b.device)))
        layer.lora_b.parametrizations.weight.original = b
    return layer  # type: ignore[no-any-return]
