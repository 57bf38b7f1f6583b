"""One job from trajectories to a checkpoint, told as events: the order of things, and nothing that could be elsewhere.

Owns a policy and its optimizer between jobs, so that the next step of the same model loads nothing. Knows no HTTP and
no process; it runs in one thread and looks at `cancelled` between packed rows.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from art_engine_kit.canary import CANARY, Canary, read_canary
from art_engine_kit.chat_rendering import ChatRenderer
from art_engine_kit.checkpoint_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    OPTIMIZER_STATE,
    FileRecord,
    read_manifest,
    saving,
    seal,
)
from art_engine_kit.groups_file import read_records
from art_engine_kit.sequence_limit import SequenceLimit, check_lengths
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import (
    AdapterWritten,
    GradientStep,
    JobEnded,
    JobProgress,
    JobSaved,
    JobStarted,
    KlReference,
    TrainEvent,
    TrainJob,
)

from .adapter_settings import check_peft_args
from .advantages import balance_step
from .canaries import CanaryMaker
from .chat_template import ChatTemplate
from .disk_errors import explained
from .divergence import grown_from, largest_weight, refuse_diverged
from .mismatch import Mismatch
from .optimizer import OPTIMIZER_SETTINGS, REPLIES, REWARDS, AdapterOptimizer, OptimizerOptions
from .out_of_memory import in_parts, tried_in_less_memory
from .packed_work import GradientStepRun, PackedWork, mean_of, totals
from .packing import PackedRow, pack_rows
from .policy import Policy
from .row_tensors import RowTensors
from .rows import TokenizedStep, TokenRow
from .supervised import rates_of, tokenize_supervised
from .tokenize import tokenize_groups

_log = logging.getLogger(__name__)

_ROW_MULTIPLE = 2048


class JobCancelled(Exception):
    """The job's client went away. Nothing was saved."""


class Trainer:
    """Runs jobs one after the other on one policy."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._optimizer: AdapterOptimizer | None = None
        self._holds: tuple[Path, bytes, OptimizerOptions, str] | None = None

    def run(self, job: TrainJob, cancelled: Callable[[], bool] = lambda: False) -> Iterator[TrainEvent]:
        """Train one step and save it. Ends with `JobEnded` or raises; after a raise the next job loads its start
        afresh. What runs out of memory is tried once more in shorter rows, which starts anew.
        """
        run = self._run if job.supervised is None else self._run_supervised
        weight = self._policy.output_weight
        where = f"{weight.device} (base in {str(weight.dtype).removeprefix('torch.')})"
        what = f"step {job.step} of {job.model}"
        try:
            yield from tried_in_less_memory(lambda parts: run(job, cancelled, parts), what, where, self._forget)
        except BaseException:
            self._forget()
            raise

    def _forget(self) -> None:
        self._holds = None

    def _run(self, job: TrainJob, cancelled: Callable[[], bool], parts: int) -> Iterator[TrainEvent]:
        started = time.monotonic()
        options = job.options
        optimizer_options = OptimizerOptions.of(job.adapter.trainer_args)
        check_peft_args(job.adapter.peft_args, job.start)
        step = self._tokenize(job)
        advantages, weights = balance_step(step.advantages, step.trained_tokens, options.advantage_balance)
        if not advantages.any():
            yield from self._carry(job, step.metrics, started)
            return
        packed = pack_rows(step.rows, in_parts(self._row_length(job, step.rows), parts, step.rows))
        window = (options.grad_accumulation_sequences or 1) * parts

        def gradient_steps() -> Iterator[GradientStepRun]:
            tensors = self._prepare(packed, advantages, weights, options, job.reference, cancelled)
            for begin in range(0, len(tensors), window):
                yield self._gradient_step(tensors[begin : begin + window], options, cancelled, first=begin == 0)

        work = PackedWork(
            step.metrics, step.rows, packed, -(-len(packed) // window), gradient_steps, optimizer_options, REWARDS
        )
        yield work.started()
        if options.plot_tensors:
            from .plot import plot_rows

            plot_rows(packed, advantages, weights, job.destination.parent.parent / "plots" / f"step-{job.step:04d}.png")
        yield from self._train(job, work, started, cancelled)

    def _run_supervised(self, job: TrainJob, cancelled: Callable[[], bool], parts: int) -> Iterator[TrainEvent]:
        """A batch is one optimizer step: Σ −log π of its reply tokens ÷ their number. Weight decay is 0 and the norm's
        limit 1, unless `trainer_args` says otherwise.
        """
        assert job.supervised is not None
        started = time.monotonic()
        optimizer_options = OptimizerOptions.of(job.adapter.trainer_args, weight_decay=0.0, max_grad_norm=1.0)
        check_peft_args(job.adapter.peft_args, job.start)
        limit = self._limit(job)
        step = tokenize_supervised(
            read_records(job.groups_file),
            renderer=ChatRenderer(self._policy.tokenizer, job.adapter.chat_template, job.adapter.chat_template_kwargs),
            tokenizer=self._policy.tokenizer,
            batch_size=job.supervised.batch_size,
            vocabulary_size=self._policy.vocabulary_size,
            max_length=limit.tokens,
        )
        if step.lengths:
            _warn_of_lengths(job, step.lengths, limit)
        rates = rates_of(job.supervised.learning_rates, len(step.batches))
        if not step.rows:
            yield from self._carry(job, step.metrics, started)
            return
        length = in_parts(self._row_length(job, step.rows), parts, step.rows)
        batches = [(rate, pack_rows(batch, length)) for rate, batch in zip(rates, step.batches, strict=True) if batch]
        packed = [row for _, batch in batches for row in batch]
        work = PackedWork(
            step.metrics, step.rows, packed, len(batches),
            lambda: (self._supervised_step(batch, rate, cancelled) for rate, batch in batches),
            optimizer_options, REPLIES,
        )  # fmt: skip
        yield work.started()
        yield from self._train(job, work, started, cancelled)

    def _train(
        self, job: TrainJob, work: PackedWork, started: float, cancelled: Callable[[], bool]
    ) -> Iterator[TrainEvent]:
        """Load the start, take every gradient step, refuse what diverged, and save."""
        self._load(job.start, work.optimizer_options, work.learns_from)
        canary, largest = CanaryMaker(self._policy, work.rows), largest_weight(self._policy)
        samples: list[dict[str, float]] = []
        done = 0
        for index, gradient_step in enumerate(work.gradient_steps()):
            for result in gradient_step:
                if isinstance(result, dict):
                    samples.append(result)
                    yield GradientStep(index=index, total=work.num_gradient_steps, metrics=result)
                else:
                    done += 1
                    yield JobProgress(done=done, total=len(work.packed))
            if job.options.verbose:
                _log.info(
                    "step %d, gradient step %d of %d: %s", job.step, index + 1, work.num_gradient_steps, samples[-1]
                )
        mask = max(self._policy.attention_mask_bytes(len(row)) for row in work.packed)
        metrics = work.metrics(time.monotonic() - started) | mean_of(samples)
        metrics["data/step_attention_mask_bytes"] = float(mask)
        refuse_diverged(job, grown_from(largest, self._policy), samples[-1])
        yield from self._save(job, metrics, canary, samples[-1], cancelled)
        self._remember(job.destination, work.optimizer_options, work.learns_from)
        yield JobSaved(path=job.destination)
        yield JobEnded(metrics=metrics)

    def _supervised_step(
        self, batch: Sequence[PackedRow], learning_rate: float, cancelled: Callable[[], bool]
    ) -> GradientStepRun:
        """Yields a row's number when it is done, then the batch's metrics."""
        assert self._optimizer is not None
        count = sum(len(row.entry_target) for row in batch)
        loss = 0.0
        self._optimizer.clear_gradients()
        for done, row in enumerate(batch, start=1):
            _stop_if(cancelled)
            same = np.ones(int(row.entry_trajectory.max()) + 1)
            logprobs, _ = RowTensors.of(row, same, same, self._policy.device).logprobs(self._policy)
            part = -logprobs.sum() / count
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
            yield done
        norm = self._optimizer.step(learning_rate)
        yield {"loss/train": loss, "loss/grad_norm": norm, "loss/learning_rate": learning_rate}

    def _tokenize(self, job: TrainJob) -> TokenizedStep:
        options = job.options
        limit = self._limit(job)
        template = ChatTemplate(self._policy.tokenizer, job.adapter.chat_template, job.adapter.chat_template_kwargs)
        step = tokenize_groups(
            read_records(job.groups_file),
            vocabulary_size=self._policy.vocabulary_size,
            max_length=limit.tokens,
            scale_rewards=options.scale_rewards and options.normalize_advantages,
            without_logprobs=template if options.allow_training_without_logprobs else None,
        )
        _warn_of_lengths(job, step.lengths, limit)
        return step

    def _limit(self, job: TrainJob) -> SequenceLimit:
        return SequenceLimit.of(job.options.packed_sequence_length, job.adapter.max_seq_length, self._policy.max_length)

    def _row_length(self, job: TrainJob, rows: Sequence[TokenRow]) -> int:
        """As asked for; else the longest row, rounded up so that several fit beside each other."""
        if job.options.packed_sequence_length is not None:
            return job.options.packed_sequence_length
        longest = max(map(len, rows))
        rounded = -(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE
        return max(longest, min(rounded, job.adapter.max_seq_length))

    def _load(self, start: Path, options: OptimizerOptions, learns_from: str) -> None:
        """Weights and optimizer state of the start checkpoint, unless they are what is held already."""
        wanted = (start.resolve(), (start / MANIFEST).read_bytes(), options, learns_from)
        if self._holds == wanted:
            return
        read_manifest(start, hashes=True)
        self._holds = None
        self._policy.load_adapter(start)
        self._optimizer = AdapterOptimizer(self._policy.adapter_parameters(), options, learns_from)
        resumed = self._optimizer.load(start)
        _log.info(
            "loaded %s, %s", start, "with its optimizer state" if resumed else "without an optimizer state of its kind"
        )
        self._holds = wanted

    def _remember(self, folder: Path, options: OptimizerOptions, learns_from: str) -> None:
        self._holds = (folder.resolve(), (folder / MANIFEST).read_bytes(), options, learns_from)

    def _prepare(
        self,
        packed: Sequence[PackedRow],
        advantages: npt.NDArray[np.float64],
        weights: npt.NDArray[np.float64],
        options: TrainOptions,
        reference: KlReference | None,
        cancelled: Callable[[], bool],
    ) -> list[RowTensors]:
        tensors = [RowTensors.of(row, advantages, weights, self._policy.device) for row in packed]
        if options.precalculate_logprobs:
            fresh = self._logprobs(tensors, cancelled)
            tensors = [row.with_recalculated(values) for row, values in zip(tensors, fresh, strict=True)]
        if reference is not None:
            with self._policy.reference(reference.adapter):
                known = self._logprobs(tensors, cancelled)
            tensors = [row.with_reference(values) for row, values in zip(tensors, known, strict=True)]
        return tensors

    def _logprobs(self, tensors: Sequence[RowTensors], cancelled: Callable[[], bool]) -> list[Tensor]:
        result = []
        for row in tensors:
            _stop_if(cancelled)
            with torch.no_grad():
                result.append(row.logprobs(self._policy)[0])
        return result

    def _gradient_step(
        self, part: Sequence[RowTensors], options: TrainOptions, cancelled: Callable[[], bool], *, first: bool
    ) -> GradientStepRun:
        """Yields a row's number when it is done, then the step's metrics. The loss is a mean over the trained tokens of
        all `part`. Of the first, whose policy nothing has changed yet, the mismatch with the engine is measured.
        """
        assert self._optimizer is not None
        count = sum(len(row.entry_target) for row in part)
        sums = {"loss/train": 0.0, "loss/entropy": 0.0, "loss/kl_div": 0.0, "loss/kl_policy_ref": 0.0}
        mismatch = Mismatch()
        self._optimizer.clear_gradients()
        for done, row in enumerate(part, start=1):
            _stop_if(cancelled)
            loss, entropy, logprobs = row.loss(self._policy, options)
            if first:
                mismatch += Mismatch.of(logprobs, row.entries)
            (loss.loss / count).backward()  # type: ignore[no-untyped-call]
            sums["loss/train"] += float(loss.loss.detach())
            sums["loss/entropy"] += float(entropy)
            sums["loss/kl_div"] += float(loss.kl_div)
            if loss.kl_policy_ref is not None:
                sums["loss/kl_policy_ref"] += float(loss.kl_policy_ref)
            yield done
        if part[0].entries.reference_logprobs is None:
            del sums["loss/kl_policy_ref"]
        trajectories = len(np.unique(np.concatenate([row.row.entry_trajectory for row in part])))
        learning_rate = options.learning_rate * trajectories**options.num_trajectories_learning_rate_multiplier_power
        norm = self._optimizer.step(learning_rate)
        yield {
            **{key: value / count for key, value in sums.items()},
            **mismatch.metrics(),
            "loss/grad_norm": norm,
            "loss/learning_rate": learning_rate,
        }

    def _save(
        self,
        job: TrainJob,
        metrics: dict[str, float],
        canary: CanaryMaker,
        last: dict[str, float],
        cancelled: Callable[[], bool],
    ) -> Iterator[TrainEvent]:
        """Servers may load the adapter while the canary is computed, and beside that what is written hashed and synced.

        What takes room on the disk is written before anybody is told: a name that a server was given is never used
        again.
        """
        assert self._optimizer is not None
        sealed: dict[str, FileRecord] = {}

        def seal_files() -> None:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER_STATE):
                sealed[name] = seal(folder / name)

        with explained(job), self._saving(job, metrics, sealed) as folder:
            self._policy.save_adapter(folder)
            self._optimizer.save(folder)
            if job.tell_written:
                yield AdapterWritten(folder=folder, prompts=canary.prompts)
            with ThreadPoolExecutor(1, "art-seal") as beside:
                sealing = beside.submit(seal_files)
                (folder / CANARY).write_text(canary.make().model_dump_json(), encoding="utf-8")
                sealing.result()
            refuse_diverged(job, canary.went_wrong(), last)
            _stop_if(cancelled)

    def _carry(self, job: TrainJob, counts: dict[str, float], started: float) -> Iterator[TrainEvent]:
        """Nothing to train on: the start checkpoint becomes the new step, weights, optimizer state and canary
        unchanged.
        """
        yield JobStarted(num_sequences=0, num_rows=0, packed_tokens=0, trained_tokens=0)
        metrics = (
            counts
            | totals(tokens=0, trained=0, packed=0, gradient_steps=0)
            | {"time/step_trainer_s": time.monotonic() - started}
        )
        read_manifest(job.start, hashes=True)
        with explained(job), self._saving(job, metrics) as folder:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER_STATE, OPTIMIZER_SETTINGS):
                if (job.start / name).exists():
                    shutil.copyfile(job.start / name, folder / name)
            canary = read_canary(job.start)
            if canary is not None:
                # The weights it comes from are its own, so before and after are the same.
                same = [prompt.model_copy(update={"previous": prompt.expected}) for prompt in canary.prompts]
                (folder / CANARY).write_text(Canary(prompts=same).model_dump_json(), encoding="utf-8")
        held = self._holds
        if held is not None and held[0] == job.start.resolve():
            self._remember(job.destination, held[2], held[3])
        yield JobSaved(path=job.destination)
        yield JobEnded(metrics=metrics)

    def _saving(
        self, job: TrainJob, metrics: dict[str, float], sealed: Mapping[str, FileRecord] | None = None
    ) -> AbstractContextManager[Path]:
        return saving(
            job.destination,
            step=job.step,
            base_model=self._policy.base_model,
            engine=self._policy.engine,
            metrics=metrics,
            sealed=sealed,
        )


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise JobCancelled("the client went away, so the job was stopped between two rows; nothing was saved")


def _warn_of_lengths(job: TrainJob, lengths: Sequence[int], limit: SequenceLimit) -> None:
    left_out = check_lengths(lengths, limit)
    if left_out:
        _log.warning("step %d of %s: %s", job.step, job.model, left_out)
