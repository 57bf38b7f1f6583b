"""One optimizer step over packed rows: forward and backward of this rank's rows, the sum over all ranks, the step, and
what was measured on the way.

Knows a policy, its optimizer and the ranks. Which rows there are, and what is loaded and saved, is the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import KlReference

from .mismatch import Mismatch
from .optimizer import AdapterOptimizer
from .packed_work import GradientStepRun
from .packing import PackedRow
from .policy import Policy
from .ranks import Ranks
from .row_tensors import RowTensors

_SUMS = ("loss/train", "loss/entropy", "loss/kl_div", "loss/kl_policy_ref")


class GradientSteps:
    """Optimizer steps of one job, on one policy. `cancelled` is looked at between rows."""

    def __init__(
        self, policy: Policy, optimizer: AdapterOptimizer, ranks: Ranks, cancelled: Callable[[], bool]
    ) -> None:
        self._policy = policy
        self._optimizer = optimizer
        self._ranks = ranks
        self._cancelled = cancelled

    def reinforced(
        self,
        steps: Sequence[Sequence[PackedRow]],
        advantages: npt.NDArray[np.float64],
        weights: npt.NDArray[np.float64],
        options: TrainOptions,
        reference: KlReference | None,
    ) -> list[GradientStepRun]:
        """A run for each of `steps`, whose rows make one optimizer step together. What the policy says before any of
        them is asked here and now.
        """
        prepared = [
            [RowTensors.of(row, advantages, weights, self._policy.device) for row in self._ranks.share(rows)]
            for rows in steps
        ]
        if options.precalculate_logprobs:
            prepared = self._with_logprobs(prepared, steps, RowTensors.with_recalculated)
        if reference is not None:
            with self._policy.reference(reference.adapter):
                prepared = self._with_logprobs(prepared, steps, RowTensors.with_reference)
        return [
            self._reinforced(rows, share, options, first=index == 0, referred=reference is not None)
            for index, (rows, share) in enumerate(zip(steps, prepared, strict=True))
        ]

    def supervised(self, rows: Sequence[PackedRow], learning_rate: float) -> GradientStepRun:
        """The loss is Σ −log π of the reply tokens of all `rows` ÷ their number."""
        count = sum(len(row.entry_target) for row in rows)
        loss = 0.0
        self._optimizer.clear_gradients()
        share = self._ranks.share(rows)
        for done, row in enumerate(share, start=1):
            with self._turn():
                same = np.ones(int(row.entry_trajectory.max()) + 1)
                logprobs, _ = RowTensors.of(row, same, same, self._policy.device).logprobs(self._policy)
                part = -logprobs.sum() / count
                part.backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())
            yield done
        (loss,) = self._summed(rows, [loss])
        norm = self._step(learning_rate)
        yield from range(len(share) + 1, len(rows) + 1)
        yield {"loss/train": loss, "loss/grad_norm": norm, "loss/learning_rate": learning_rate}

    def _reinforced(
        self, rows: Sequence[PackedRow], share: Sequence[RowTensors], options: TrainOptions, *, first: bool,
        referred: bool,
    ) -> GradientStepRun:  # fmt: skip
        """Yields a row's number when it is done, then the step's metrics. The loss is a mean over the trained tokens of
        all `rows`. Of the first, whose policy nothing has changed yet, the mismatch with the engine is measured.
        """
        count = sum(len(row.entry_target) for row in rows)
        sums = dict.fromkeys(_SUMS, 0.0)
        mismatch = Mismatch()
        self._optimizer.clear_gradients()
        for done, row in enumerate(share, start=1):
            with self._turn():
                loss, entropy, logprobs = row.loss(self._policy, options)
                (loss.loss / count).backward()  # type: ignore[no-untyped-call]
            if first:
                mismatch += Mismatch.of(logprobs, row.entries)
            sums["loss/train"] += float(loss.loss.detach())
            sums["loss/entropy"] += float(entropy)
            sums["loss/kl_div"] += float(loss.kl_div)
            if loss.kl_policy_ref is not None:
                sums["loss/kl_policy_ref"] += float(loss.kl_policy_ref)
            yield done
        totals = self._summed(rows, [*sums.values(), *astuple(mismatch)])
        sums, mismatch = dict(zip(_SUMS, totals, strict=False)), Mismatch(*totals[len(_SUMS) :])
        if not referred:
            del sums["loss/kl_policy_ref"]
        trajectories = len(np.unique(np.concatenate([row.entry_trajectory for row in rows])))
        learning_rate = options.learning_rate * trajectories**options.num_trajectories_learning_rate_multiplier_power
        norm = self._step(learning_rate)
        yield from range(len(share) + 1, len(rows) + 1)
        yield {
            **{key: value / count for key, value in sums.items()},
            **mismatch.metrics(),
            "loss/grad_norm": norm,
            "loss/learning_rate": learning_rate,
        }

    def _with_logprobs(
        self,
        prepared: Sequence[Sequence[RowTensors]],
        steps: Sequence[Sequence[PackedRow]],
        add: Callable[[RowTensors, Tensor], RowTensors],
    ) -> list[list[RowTensors]]:
        """This rank's rows of each step, to which the policy's logprobs [E] as it is now are added."""
        done = []
        with torch.no_grad():
            for share, rows in zip(prepared, steps, strict=True):
                added = []
                for row in share:
                    with self._turn():
                        added.append(add(row, row.logprobs(self._policy)[0]))
                self._accompany(rows)
                done.append(added)
        return done

    def _summed(self, rows: Sequence[PackedRow], numbers: Sequence[float]) -> list[float]:
        """After this rank's part of `rows`: the sums of each number over all ranks, once all are through theirs."""
        self._accompany(rows)
        self._ranks.agree()
        return self._ranks.add(numbers)

    def _step(self, learning_rate: float) -> float:
        self._ranks.add_gradients(list(self._policy.adapter_parameters().values()))
        return self._optimizer.step(learning_rate)

    def _accompany(self, rows: Sequence[PackedRow]) -> None:
        """Take part in what the other ranks compute of `rows` after this one's are done, where they can't without."""
        for _ in range(self._ranks.idle_turns(rows)):
            with self._turn():
                hidden = self._policy.hidden_states(min(rows, key=len))
                if hidden.requires_grad:
                    (hidden.sum() * 0.0).backward()  # type: ignore[no-untyped-call]

    def _turn(self) -> AbstractContextManager[None]:
        return self._ranks.turn(self._cancelled)
