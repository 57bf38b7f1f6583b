"""One packed row on the policy's device, and the two ways it is run: for logprobs alone, and for a loss.

Joins packing, policy, logprobs and losses. Knows no optimizer, no job and no file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from art_engine_kit.train_options import TrainOptions

from .logprobs import next_token_logprobs
from .losses import Entries, LossSums, policy_loss
from .packing import PackedRow
from .policy import Policy


@dataclass(frozen=True, slots=True)
class RowTensors:
    """A packed row's predictions and entries as tensors; see `PackedRow` for the shapes."""

    row: PackedRow
    parents: Tensor
    targets: Tensor
    target_parent: Tensor
    entry_target: Tensor
    entries: Entries

    @classmethod
    def of(cls, row: PackedRow, advantages: Any, weights: Any, device: torch.device) -> RowTensors:
        """`advantages` and `weights` have one value for each trajectory of the step."""

        def on_device(values: Any, dtype: torch.dtype | None = None) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)

        entries = Entries(
            old_logprobs=on_device(row.old_logprobs, torch.float32),
            advantages=on_device(advantages[row.entry_trajectory], torch.float32),
            weights=on_device(weights[row.entry_trajectory], torch.float32),
            sequence=on_device(row.entry_sequence),
        )
        return cls(
            row,
            on_device(row.parents),
            on_device(row.targets),
            on_device(row.target_parent),
            on_device(row.entry_target),
            entries,
        )

    def with_recalculated(self, logprobs: Tensor) -> RowTensors:
        """The trainer's own logprobs [E] become the old ones; what the engine reported stays for the mismatch."""
        entries = replace(self.entries, old_logprobs=logprobs, sampled_logprobs=self.entries.old_logprobs)
        return replace(self, entries=entries)

    def with_reference(self, logprobs: Tensor) -> RowTensors:
        """Add the KL reference policy's logprobs [E]."""
        return replace(self, entries=replace(self.entries, reference_logprobs=logprobs))

    def logprobs(self, policy: Policy) -> tuple[Tensor, Tensor]:
        """Logprobs [E] of the entries under the policy as it is, and entropies [E] of the distributions they came
        from.
        """
        hidden = policy.hidden_states(self.row)[self.parents]
        chosen, entropy = next_token_logprobs(hidden, policy.output_weight, self.target_parent, self.targets)
        return chosen[self.entry_target], entropy[self.target_parent[self.entry_target]]

    def loss(self, policy: Policy, options: TrainOptions) -> tuple[LossSums, Tensor, Tensor]:
        """The loss sums, carrying gradients, Σ entropy·w, and the logprobs [E] without gradients."""
        new, entropy = self.logprobs(policy)
        return policy_loss(new, self.entries, options), (entropy * self.entries.weights).sum(), new.detach()
