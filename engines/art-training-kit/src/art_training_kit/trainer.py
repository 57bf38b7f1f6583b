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
from art_engine_kit.training_wire import (
    AdapterWritten,
    GradientStep,
    JobEnded,
    JobProgress,
    JobSaved,
    JobStarted,
    TrainEvent,
    TrainJob,
)

from .adapter_settings import check_peft_args
from .advantages import balance_step
from .canaries import CanaryMaker
from .cancellation import stop_if
from .chat_template import ChatTemplate
from .disk_errors import explained
from .divergence import grown_from, largest_weight, refuse_diverged
from .gradient_steps import GradientSteps
from .optimizer import OPTIMIZER_SETTINGS, REPLIES, REWARDS, AdapterOptimizer, OptimizerOptions
from .out_of_memory import in_parts, tried_in_less_memory
from .packed_work import PackedWork, mean_of, totals
from .packing import pack_rows
from .policy import Policy
from .ranks import Ranks
from .rows import TokenizedStep, TokenRow
from .supervised import rates_of, tokenize_supervised
from .tokenize import tokenize_groups

_log = logging.getLogger(__name__)

_ROW_MULTIPLE = 2048


class Trainer:
    """Runs jobs one after the other on one policy, as one of the `ranks`, all of which are given the same jobs."""

    def __init__(self, policy: Policy, ranks: Ranks | None = None) -> None:
        self._policy = policy
        ranks = Ranks() if ranks is None else ranks
        self._ranks = ranks.in_step() if policy.sharded else ranks
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
            attempt = self._ranks.together(lambda parts: run(job, cancelled, parts))
            yield from tried_in_less_memory(attempt, what, where, self._forget)
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
        window = (options.grad_accumulation_sequences or self._ranks.count) * parts
        steps = [packed[begin : begin + window] for begin in range(0, len(packed), window)]
        work = PackedWork(
            step.metrics, step.rows, packed, len(steps),
            lambda: self._gradient_steps(cancelled).reinforced(steps, advantages, weights, options, job.reference),
            optimizer_options, REWARDS,
        )  # fmt: skip
        yield work.started()
        if options.plot_tensors and self._ranks.leads:
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
        batches = [
            (rate, pack_rows(batch, self._for_each_rank(length, batch)))
            for rate, batch in zip(rates, step.batches, strict=True)
            if batch
        ]
        packed = [row for _, batch in batches for row in batch]
        work = PackedWork(
            step.metrics, step.rows, packed, len(batches),
            lambda: [self._gradient_steps(cancelled).supervised(batch, rate) for rate, batch in batches],
            optimizer_options, REPLIES,
        )  # fmt: skip
        yield work.started()
        yield from self._train(job, work, started, cancelled)

    def _train(
        self, job: TrainJob, work: PackedWork, started: float, cancelled: Callable[[], bool]
    ) -> Iterator[TrainEvent]:
        """Load the start, take every gradient step, refuse what diverged, and save."""
        self._load(job.start, work.optimizer_options, work.learns_from)
        canary = None
        if self._ranks.leads or self._ranks.are_in_step:
            with self._ranks.turn(cancelled):
                canary = CanaryMaker(self._policy, work.rows)
        largest = largest_weight(self._policy)
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
        # What the first saves stays: none may have failed by then.
        self._ranks.agree()
        if canary is not None and self._ranks.leads:
            yield from self._save(job, metrics, canary, samples[-1], cancelled)
        elif canary is not None:
            self._make(canary)
        self._ranks.agree()
        self._remember(job.destination, work.optimizer_options, work.learns_from)
        yield JobSaved(path=job.destination)
        yield JobEnded(metrics=metrics)

    def _gradient_steps(self, cancelled: Callable[[], bool]) -> GradientSteps:
        assert self._optimizer is not None
        return GradientSteps(self._policy, self._optimizer, self._ranks, cancelled)

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
            refuse_altered=options.altered_sampling == "refuse",
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
        length = max(longest, min(rounded, job.adapter.max_seq_length))
        return self._for_each_rank(length, rows) if job.supervised is None else length

    def _for_each_rank(self, length: int, rows: Sequence[TokenRow]) -> int:
        """An equal part for each rank of a packed row of this length, or of all `rows` where these are less."""
        if self._ranks.count == 1:
            return length
        tokens = min(length, sum(map(len, rows)))
        return max(-(-tokens // self._ranks.count), *map(len, rows))

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
                (folder / CANARY).write_text(self._make(canary).model_dump_json(), encoding="utf-8")
                sealing.result()
            refuse_diverged(job, canary.went_wrong(), last)
            stop_if(cancelled)

    def _make(self, canary: CanaryMaker) -> Canary:
        # The first rank has written by now, or failed to, and then none computes.
        with self._ranks.turn(lambda: False):
            return canary.make()

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
        self._ranks.agree()
        if self._ranks.leads:
            self._copy_start(job, metrics)
        self._ranks.agree()
        held = self._holds
        if held is not None and held[0] == job.start.resolve():
            self._remember(job.destination, held[2], held[3])
        yield JobSaved(path=job.destination)
        yield JobEnded(metrics=metrics)

    def _copy_start(self, job: TrainJob, metrics: dict[str, float]) -> None:
        with explained(job), self._saving(job, metrics) as folder:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER_STATE, OPTIMIZER_SETTINGS):
                if (job.start / name).exists():
                    shutil.copyfile(job.start / name, folder / name)
            canary = read_canary(job.start)
            if canary is not None:
                # The weights it comes from are its own, so before and after are the same.
                same = [prompt.model_copy(update={"previous": prompt.expected}) for prompt in canary.prompts]
                (folder / CANARY).write_text(Canary(prompts=same).model_dump_json(), encoding="utf-8")

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


def _warn_of_lengths(job: TrainJob, lengths: Sequence[int], limit: SequenceLimit) -> None:
    left_out = check_lengths(lengths, limit)
    if left_out:
        _log.warning("step %d of %s: %s", job.step, job.model, left_out)
