"""For each check of a training engine an engine that breaks it and nothing else: torch's, spoiled in one place.

Most speak to the sound worker and change the job before it sees it, what it says, or what it saved; some change the
plan that it is started by; those of `misbehaving_worker` are a process of their own. Knows a check only by its id.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from art_conformance.live_worker import LiveWorker
from art_conformance.oracle import oracle_for
from art_conformance.spoiled import reseal
from art_conformance.tiny_model import change_adapter
from art_core import LaunchPlan, TrainingCapability, TrainingEngine, TrainingLaunch, installed_plugins
from art_core.registry import instantiate
from art_engine_kit.canary import CANARY
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, MANIFEST, OPTIMIZER_STATE, read_manifest, whole_steps
from art_engine_kit.groups_file import read_groups, write_groups
from art_engine_kit.training_wire import (
    AdapterWritten,
    GradientStep,
    JobEnded,
    JobFailed,
    JobStarted,
    TrainEvent,
    TrainJob,
    read_event,
)

MISBEHAVING = Path(__file__).with_name("misbehaving_worker.py")
TORCH: TrainingEngine = instantiate(installed_plugins().training_engine("torch"))


@dataclass(frozen=True, kw_only=True)
class SpoiledEngine:
    """The torch engine's description, passed through but for what is given."""

    name: str = TORCH.name
    capabilities: frozenset[TrainingCapability] = TORCH.capabilities
    heard: Callable[[TrainingLaunch], TrainingLaunch] = lambda config: config
    planned: Callable[[LaunchPlan], LaunchPlan] = lambda plan: plan

    def launch(self, config: TrainingLaunch) -> LaunchPlan:
        """The torch engine's plan for what was heard, changed."""
        return self.planned(TORCH.launch(self.heard(config)))


def _without_host(plan: LaunchPlan) -> LaunchPlan:
    place = plan.argv.index("--host")
    return replace(plan, argv=plan.argv[:place] + plan.argv[place + 2 :])


def _with_variables(variables: Callable[[LaunchPlan], dict[str, str]]) -> SpoiledEngine:
    return SpoiledEngine(planned=lambda plan: replace(plan, env={**plan.env, **variables(plan)}))


def misbehaving(id: str, **changes: Any) -> SpoiledEngine:
    """The engine whose worker has the fault of that id."""

    def planned(plan: LaunchPlan) -> LaunchPlan:
        python, _, _, *words = plan.argv
        return replace(plan, argv=(python, str(MISBEHAVING), id, *words), **changes)

    return SpoiledEngine(planned=planned)


class SpoiledWorker(LiveWorker):
    """A worker of which one thing is wrong: a mutant changes one of these methods."""

    def asked(self, job: TrainJob) -> TrainJob:
        """The job that the sound worker is sent in its place."""
        return job

    def told(self, event: TrainEvent, job: TrainJob) -> TrainEvent:
        """What is said where the sound worker says `event`."""
        return event

    def saved(self, job: TrainJob, ended: JobEnded) -> None:
        """Change the checkpoint before anybody is told that the job has ended."""

    def written(self, line: bytes) -> bytes:
        """The line that is sent in place of another."""
        return line

    async def lines(self, job: TrainJob | dict[str, Any], **settings: Any) -> AsyncIterator[bytes]:
        """See `LiveWorker`."""
        asked = self.asked(job.model_copy(deep=True)) if isinstance(job, TrainJob) else job
        async with aclosing(super().lines(asked, **settings)) as lines:  # type: ignore[type-var]
            async for line in lines:
                if not isinstance(job, TrainJob):
                    yield line
                    continue
                event = read_event(line)
                if isinstance(event, JobEnded):
                    self.saved(job, event)
                told = self.told(event, job)
                yield self.written(line if told is event else told.model_dump_json().encode())


def change_groups(job: TrainJob, change: Callable[[Any], None]) -> TrainJob:
    """The job with every trajectory changed, where it has some."""
    if not job.groups_file.exists():
        return job
    groups = read_groups(job.groups_file)
    for group in groups:
        for trajectory in group:
            change(trajectory)
    changed = job.groups_file.with_suffix(".changed")
    write_groups(changed, groups)
    return job.model_copy(update={"groups_file": changed})


def change_options(job: TrainJob, **changes: Any) -> TrainJob:
    """The job with other options."""
    return job.model_copy(update={"options": job.options.model_copy(update=changes)})


def change_weights(job: TrainJob, by: Callable[[Any], Any]) -> None:
    """Add to every saved tensor what `by` makes of it; the manifest agrees."""
    manifest = read_manifest(job.destination)

    def change(tensors: dict[str, Any]) -> None:
        for values in tensors.values():
            values += by(values)

    change_adapter(job.destination, change)
    reseal(job.destination, manifest)


def unseal(folder: Path, name: str) -> None:
    """Take a file out of a checkpoint's manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][name]
    (folder / MANIFEST).write_text(json.dumps(manifest))


class CountsGradientStepsFromOne(SpoiledWorker):
    def told(self, event: TrainEvent, job: TrainJob) -> TrainEvent:
        return event.model_copy(update={"index": event.index + 1}) if isinstance(event, GradientStep) else event


class LeavesTheConfigUnsealed(SpoiledWorker):
    """The manifest doesn't know the adapter's config, so nobody would notice that it is damaged."""

    def saved(self, job: TrainJob, ended: JobEnded) -> None:
        unseal(job.destination, ADAPTER_CONFIG)


class WrongCanary(SpoiledWorker):
    def saved(self, job: TrainJob, ended: JobEnded) -> None:
        file = job.destination / CANARY
        if not file.exists():
            return  # nothing was trained
        canary = json.loads(file.read_text())
        for prompt in canary["prompts"]:
            prompt["expected"] = {token: value - 0.5 for token, value in prompt["expected"].items()}
        manifest = read_manifest(job.destination)
        file.write_text(json.dumps(canary))
        reseal(job.destination, manifest)


class ZeroIsTheDefault(SpoiledWorker):
    """A learning rate of 0 is taken for one that wasn't given."""

    def asked(self, job: TrainJob) -> TrainJob:
        return change_options(job, learning_rate=job.options.learning_rate or 5e-6)


class BeginsATokenTooEarly(SpoiledWorker):
    """Where there is one answer, the prompt's last token is trained on in place of the first that was sampled."""

    def asked(self, job: TrainJob) -> TrainJob:
        def change(trajectory: Any) -> None:
            choices = list(trajectory.choices())
            if len(choices) == 1:
                choices[0].token_ids = [choices[0].prompt_token_ids[-1], *choices[0].token_ids[1:]]

        return change_groups(job, change)


class ForgetsEarlyTurns(SpoiledWorker):
    """Answers before the last two become plain messages, which nothing trains on."""

    def asked(self, job: TrainJob) -> TrainJob:
        def change(trajectory: Any) -> None:
            items = trajectory.messages_and_choices
            sampled = [place for place, item in enumerate(items) if not isinstance(item, dict)]
            for place in sampled[:-2]:
                items[place] = {"role": "assistant", "content": items[place].message.content}

        return change_groups(job, change)


class TrustsTheText(SpoiledWorker):
    """Where text and ids disagree it takes as many tokens of the text, as one who tokenizes it again would."""

    def asked(self, job: TrainJob) -> TrainJob:
        read = oracle_for(self.launch.base_model).text

        def change(trajectory: Any) -> None:
            for choice in trajectory.choices():
                text, count = choice.message.content, len(choice.token_ids)
                if text != read(choice.token_ids):
                    choice.token_ids = [3 + ord(letter) % 200 for letter in text * count][:count]

        return change_groups(job, change)


class PunishesByPpo(SpoiledWorker):
    def asked(self, job: TrainJob) -> TrainJob:
        def change(trajectory: Any) -> None:
            trajectory.reward = -trajectory.reward

        return change_groups(job, change) if job.options.loss_fn == "ppo" else job


class GoesOnFromTheNewest(SpoiledWorker):
    """Trains on from the run's newest checkpoint, whichever the job names."""

    def asked(self, job: TrainJob) -> TrainJob:
        steps = whole_steps(job.destination.parent)
        return job.model_copy(update={"start": steps[max(steps)] if steps else job.start})


@dataclass
class ForgetsWhatOthersTrained(SpoiledWorker):
    """Of a start that it hasn't saved itself it takes the weights, and not the optimizer's state."""

    own: set[Path] = field(default_factory=set)

    def asked(self, job: TrainJob) -> TrainJob:
        if job.start in self.own or not (job.start / OPTIMIZER_STATE).exists():
            return job
        start = job.groups_file.parent / "forgetful" / job.start.name
        shutil.copytree(job.start, start)
        (start / OPTIMIZER_STATE).unlink()
        unseal(start, OPTIMIZER_STATE)
        return job.model_copy(update={"start": start})

    def saved(self, job: TrainJob, ended: JobEnded) -> None:
        self.own.add(job.destination)


class MeasuresNoDivergence(SpoiledWorker):
    def told(self, event: TrainEvent, job: TrainJob) -> TrainEvent:
        if not isinstance(event, JobEnded) or "loss/kl_policy_ref" not in event.metrics:
            return event
        return event.model_copy(update={"metrics": {**event.metrics, "loss/kl_policy_ref": 0.0}})


class RefusesSome(SpoiledWorker):
    """Sound, for an engine that declares neither references nor supervised jobs."""

    async def lines(self, job: TrainJob | dict[str, Any], **settings: Any) -> AsyncIterator[bytes]:
        """See `LiveWorker`."""
        if isinstance(job, TrainJob) and (job.reference is not None or job.supervised is not None):
            refused = JobFailed(error_type="UnsupportedCapability", message="this engine trains by rewards alone")
            yield refused.model_dump_json().encode()
            return
        async with aclosing(super().lines(job, **settings)) as lines:  # type: ignore[type-var]
            async for line in lines:
                yield line


class SharesNothing(SpoiledWorker):
    def told(self, event: TrainEvent, job: TrainJob) -> TrainEvent:
        if not isinstance(event, JobStarted):
            return event
        return event.model_copy(update={"packed_tokens": event.packed_tokens * 3})


class MovesWhatItCarries(SpoiledWorker):
    def saved(self, job: TrainJob, ended: JobEnded) -> None:
        if ended.metrics["data/step_num_gradient_steps"] == 0:
            change_weights(job, lambda values: 1e-6)


class SilentOfDamage(SpoiledWorker):
    """Of a damaged checkpoint it says that the job failed, and not why."""

    def told(self, event: TrainEvent, job: TrainJob) -> TrainEvent:
        damaged = isinstance(event, JobFailed) and event.error_type == "CorruptCheckpoint"
        return event.model_copy(update={"message": "failed"}) if damaged else event


class TrainsWithoutLogprobs(SpoiledWorker):
    def asked(self, job: TrainJob) -> TrainJob:
        return change_options(job, allow_training_without_logprobs=True) if job.supervised is None else job


class WritesAgain(SpoiledWorker):
    """Makes room for a checkpoint by removing the one that is there."""

    def asked(self, job: TrainJob) -> TrainJob:
        if job.destination.exists():
            shutil.rmtree(job.destination)
        return job


@dataclass
class DisturbedByTheNext(SpoiledWorker):
    """What it saves is moved when another job came while it was at work, though that one is refused."""

    begun: list[Path] = field(default_factory=list)

    def asked(self, job: TrainJob) -> TrainJob:
        self.begun.append(job.destination)
        return job

    def saved(self, job: TrainJob, ended: JobEnded) -> None:
        if self.begun[-1] != job.destination:
            change_weights(job, lambda values: 1e-3)


class NeverTheSame(SpoiledWorker):
    """What was trained has noise in it, far below what rounding may do."""

    def saved(self, job: TrainJob, ended: JobEnded) -> None:
        # What was told of before it was saved stays as it was.
        if job.options.learning_rate and ended.metrics["data/step_num_gradient_steps"] and not job.tell_written:
            change_weights(job, lambda values: 1e-6 * np.random.default_rng().random(values.shape, np.float32))


class LearnsOnlyLastReplies(SpoiledWorker):
    """Of a conversation to learn it takes the last question and its reply."""

    def asked(self, job: TrainJob) -> TrainJob:
        def change(trajectory: Any) -> None:
            trajectory.messages_and_choices = trajectory.messages_and_choices[-2:]

        return job if job.supervised is None else change_groups(job, change)


class SaysMoreThanTheWire(SpoiledWorker):
    """Of each row it tells one thing more, which a reader of a later wire may take for another."""

    def written(self, line: bytes) -> bytes:
        told = json.loads(line)
        return json.dumps({**told, "seconds": 0.5}).encode() if told["event"] == "progress" else line


class TellsOfTheStart(SpoiledWorker):
    """Who loads early what it names as written serves the step before."""

    def told(self, event: TrainEvent, job: TrainJob) -> TrainEvent:
        return event.model_copy(update={"folder": job.start}) if isinstance(event, AdapterWritten) else event


# The check that must notice → the engine whose plan or whose declaration is wrong, on the sound worker.
ENGINES: dict[str, SpoiledEngine] = {
    "TRN-001": SpoiledEngine(name="Torch "),
    "TRN-002": _with_variables(lambda plan: {"ART_TOKEN": next(iter(plan.secret_env.values()))}),
    "TRN-003": SpoiledEngine(planned=_without_host),
    "TRN-004": SpoiledEngine(heard=lambda config: replace(config, init_args={})),
    "TRN-005": _with_variables(lambda plan: {"ART_RUN": uuid4().hex}),
    "TRN-006": SpoiledEngine(heard=lambda config: replace(config, python=sys.executable)),
    "TRN-007": SpoiledEngine(heard=lambda config: replace(config, devices=())),
    "TRN-114": SpoiledEngine(capabilities=frozenset()),
}
# For each capability that a job can ask for, the engine that doesn't declare it.
DECLARE_LESS: dict[str, SpoiledEngine] = {
    lacking.value: SpoiledEngine(capabilities=TORCH.capabilities - {lacking})
    for lacking in (TrainingCapability.KL_REFERENCE, TrainingCapability.SFT)
}
# … → the worker that changes what goes to the sound one and what comes from it.
WORKERS: dict[str, type[SpoiledWorker]] = {
    "TRN-103": CountsGradientStepsFromOne,
    "TRN-104": LeavesTheConfigUnsealed,
    "TRN-105": WrongCanary,
    "TRN-106": ZeroIsTheDefault,
    "TRN-107": BeginsATokenTooEarly,
    "TRN-108": ForgetsEarlyTurns,
    "TRN-109": TrustsTheText,
    "TRN-110": PunishesByPpo,
    "TRN-111": GoesOnFromTheNewest,
    "TRN-112": ForgetsWhatOthersTrained,
    "TRN-113": MeasuresNoDivergence,
    "TRN-115": SharesNothing,
    "TRN-116": MovesWhatItCarries,
    "TRN-117": SilentOfDamage,
    "TRN-118": TrainsWithoutLogprobs,
    "TRN-120": WritesAgain,
    "TRN-121": DisturbedByTheNext,
    "TRN-123": NeverTheSame,
    "TRN-150": LearnsOnlyLastReplies,
    "TRN-152": SaysMoreThanTheWire,
    "TRN-154": TellsOfTheStart,
}
# … → the engine whose process misbehaves.
PROCESSES: dict[str, SpoiledEngine] = {
    id: misbehaving(id, **({"stop_timeout_s": 3.0} if id == "TRN-141" else {}))
    for id in import_module(MISBEHAVING.stem).FAULTS
}
