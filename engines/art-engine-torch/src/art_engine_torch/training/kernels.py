"""The three places where a Llama-shaped layer spends time outside its matrix products, as single autograd steps.

A LoRA projection, a gated activation and a root-mean-square norm, each keeping only what its backward needs. They
compute what PEFT and transformers compute; the modules they replace stay in charge of weights, names and files.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class LoraProjection(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ with W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a_low, b_low = a.to(x.dtype), b.to(x.dtype)
        narrow = flat @ a_low.T
        out = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        out.addmm_(narrow, b_low.T, alpha=scaling)
        ctx.save_for_backward(flat, weight, a, b, narrow)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        flat, weight, a, b, narrow = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_narrow = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)
        grad_a = (grad_narrow.T @ flat).to(a.dtype)
        grad_b = (grad.T @ narrow).to(b.dtype).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_narrow, a.to(grad.dtype)).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


class GatedSilu(torch.autograd.Function):
    """y = silu(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, nn.functional.silu(gate).mul_(grad)


class RmsNorm(torch.autograd.Function):
    """y = weight · x / sqrt(mean(x²) + eps), computed in fp32, weight frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(torch.linalg.vecdot(wide, wide).div_(wide.shape[-1]).add_(eps))[..., None]
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        weighted = (grad * weight).float()
        wide = x.float()
        slope = torch.linalg.vecdot(weighted, wide)[..., None].mul_(scale.pow(3)).div_(wide.shape[-1])
        return weighted.mul_(scale).addcmul_(wide, slope, value=-1).to(x.dtype), None, None


def _project(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    (name,) = self.active_adapters
    # A reference may be for other modules than the trained adapter.
    if self.disable_adapters or name not in self.lora_A:
        return self.base_layer(x)  # type: ignore[no-any-return]
    return LoraProjection.apply(  # type: ignore[no-untyped-call, no-any-return]
        x, self.base_layer.weight, self.base_layer.bias,
        self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name],
    )  # fmt: skip


def _gated(self: Any, x: Tensor) -> Tensor:
    gated = GatedSilu.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
    return self.down_proj(gated)  # type: ignore[no-any-return]


def _normalize(self: Any, x: Tensor) -> Tensor:
    return RmsNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call, no-any-return]


def use_single_steps(model: nn.Module) -> None:
    """Replace the forward of every module that these functions compute exactly; all others stay as they are."""
    from peft.tuners.lora.layer import Linear as LoraLinear
    from transformers.activations import ACT2FN

    silu = type(ACT2FN["silu"])
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            module.forward = MethodType(_project, module)  # type: ignore[method-assign]
        elif isinstance(getattr(module, "act_fn", None), silu | nn.SiLU) and _is_gated(module):
            module.forward = MethodType(_gated, module)
        elif type(module).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm"):
            module.forward = MethodType(_normalize, module)


def _is_gated(module: nn.Module) -> bool:
    return set(dict(module.named_children())) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
