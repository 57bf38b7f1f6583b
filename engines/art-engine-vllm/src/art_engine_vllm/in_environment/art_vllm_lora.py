"""The products of LoRA on a CPU: for each adapter in a batch, one product of all its rows with each of its matrices.

vLLM's own code for a CPU copies an adapter's matrices anew for every token, and computes a token of the base model as
one of the adapter in the last slot. Knows vLLM's LoRA metadata; runs in vLLM's environment, with nothing of ART.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Rows = slice | torch.Tensor


def groups_of(slots: torch.Tensor) -> list[tuple[int, Rows]]:
    """The adapters' slots that occur among a batch's rows, and where: a slice if they lie together.

    `slots` holds a slot a row, -1 for the base model, whose rows are in no group.
    """
    groups: list[tuple[int, Rows]] = []
    for slot in torch.unique(slots).tolist():
        if slot < 0:
            continue
        rows = torch.nonzero(slots == slot).flatten()
        first, last = int(rows[0]), int(rows[-1])
        groups.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return groups


def add_product(output: torch.Tensor, rows: Rows, inputs: torch.Tensor, weight: torch.Tensor) -> None:
    """Add `inputs` [rows, in] times the transpose of `weight` [out, in] to the `rows` of `output` [all rows, out]."""
    if isinstance(rows, slice):
        output[rows].addmm_(inputs, weight.T)
    else:
        output.index_add_(0, rows, inputs @ weight.T)


class PunicaWrapperByAdapter(PunicaWrapperCPU):  # type: ignore[misc]
    """See `vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase`. Matrices are stacked as [slots, 1, out, in].

    vLLM asks for the embedding's and the head's at every step, whether an adapter has any or zeros stand there.
    """

    def update_metadata(self, *arguments: Any, **settings: Any) -> None:
        """Take note of which rows of the coming batches have which adapter."""
        super().update_metadata(*arguments, **settings)
        self._of_tokens = groups_of(self.token_lora_indices)
        self._of_samples = groups_of(self.sampler_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """Add to y [tokens, out] the adapters' part, for each of the layers that are computed as one."""
        outputs = y.view(-1, y.shape[-1]).split_with_sizes(output_slices, dim=1)
        x = x.view(-1, x.shape[-1])
        for slot, rows in self._of_tokens:
            inputs = x[rows]
            for output, a, b in zip(outputs, lora_a_stacked, lora_b_stacked, strict=True):
                add_product(output, rows, (inputs @ a[slot, 0].T) * scale, b[slot, 0])

    def add_lora_embedding(self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, **_: Any) -> None:
        """Add to y [tokens, out] the adapters' part of an embedding; x [tokens, rank] has been looked up."""
        for slot, rows in self._of_tokens:
            add_product(y, rows, x[rows].to(y.dtype), lora_b_stacked[slot, 0])

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **_: Any,
    ) -> None:
        """Add to y [samples, vocabulary] the adapters' part of the head."""
        x = x.view(-1, x.shape[-1])
        # Either may be padded further than the other.
        width = min(y.shape[-1], lora_b_stacked.shape[-2])
        output = y.view(-1, y.shape[-1])[:, :width]
        for slot, rows in self._of_samples:
            add_product(output, rows, (x[rows] @ lora_a_stacked[slot, 0].T) * scale, lora_b_stacked[slot, 0, :width])
