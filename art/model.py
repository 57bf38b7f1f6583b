"""The model an agent talks to: its names, its endpoint, its state on disk and what is logged about it.

A Model is any OpenAI-compatible endpoint; a TrainableModel is registered with a backend, which serves and trains it.
Knows the Backend protocol and no backend; writes nothing but state.json itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import operator
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from art_core import (
    Backend,
    ModelKey,
    TrainResult,
    Trajectory,
    TrajectoryGroup,
    announce,
    check_name,
    inference_name,
    installed_plugins,
)
from art_core.atomic_files import write_json_atomically
from art_core.errors import CheckpointInUse, NotRegistered, UnknownArgument
from art_core.history import HISTORY

from .best_step import best_step
from .deprecation import deprecated
from .dev import InternalModelConfig, read_internal_config
from .leave_out import without_unsound
from .metrics import trajectory_metrics, warn_of_left_out, warn_of_non_finite, with_sections, without_unsound_metrics
from .pinned_step import pinned_name
from .policy_age import age_metrics
from .step_clock import StepClock
from .trackers import trackers
from .train_config import TrainConfig, TrainSFTConfig

if TYPE_CHECKING:
    from openai import AsyncOpenAI

INSTEAD_OF_TRAIN = """Training is started through the backend, and logging is explicit. Instead of

    await model.train(groups, config=art.TrainConfig(learning_rate=1e-5))

write

    result = await backend.train(model, groups, learning_rate=1e-5)
    await model.log(groups, metrics=result.metrics, step=result.step, split="train")
"""

STATE_LIMIT_S = 60.0

TrajectoriesToLog = Iterable[TrajectoryGroup] | Iterable[Trajectory | BaseException]


class Model(BaseModel):
    """A model behind an OpenAI-compatible endpoint, which is asked and compared but not trained.

    `inference_model_name` is what requests ask for when it differs from `name`. Its files lie under
    `{base_path}/{project}/models/{name}`. `config` is the user's own. `report_metrics` names the trackers to report to,
    as `art plugins` lists them: None for all that are installed, an empty list for none. Raises InvalidName for a name
    that cannot be a folder and part of an address.
    """

    model_config = ConfigDict(extra="forbid", defer_build=True, arbitrary_types_allowed=True)

    trainable: ClassVar[bool] = False

    name: str
    project: str
    entity: str | None = None
    id: str | None = None
    config: Any = None
    inference_api_key: str | None = Field(None, repr=False)
    inference_base_url: str | None = None
    inference_model_name: str | None = None
    base_path: str = ".art"
    report_metrics: list[str] | None = None

    _backend: Backend | None = PrivateAttr(None)
    _openai_client: tuple[tuple[Any, ...], AsyncOpenAI] | None = PrivateAttr(None)
    _clock: StepClock = PrivateAttr(default_factory=StepClock)

    def __init__(self, **fields: Any) -> None:
        known = {*type(self).model_fields, *type(self).__private_attributes__} - {
            "_backend",
            "_openai_client",
            "_clock",
        }
        for field in fields:
            if field not in known:
                raise UnknownArgument(field, where=type(self).__name__, known=known)
        if "name" in fields:
            check_name(fields["name"], what="model name")
        if "project" in fields:
            check_name(fields["project"], what="project")
        for path in ("base_path", "base_model"):
            if isinstance(fields.get(path), os.PathLike):
                fields[path] = os.fspath(fields[path])
        super().__init__(**fields)

    # the backend and its endpoint

    def backend(self) -> Backend:
        """The backend this model is registered with. Raises NotRegistered when there is none."""
        if self._backend is None:
            raise NotRegistered(
                f"the model {self.name!r} is not registered; call `await model.register(backend)` first."
            )
        return self._backend

    async def register(self, backend: Backend) -> None:
        """Remember the backend. A model that isn't trainable is served by its own endpoint, not by the backend.

        Raises PluginNotInstalled for a name in `report_metrics` that is no tracker.
        """
        trackers(installed_plugins(), self.report_metrics)
        self._backend = backend

    def openai_client(self) -> AsyncOpenAI:
        """An OpenAI client for this model's endpoint, the same one each time; it holds thousands of requests at once.

        Nothing is added to what you ask for: of a registered TrainableModel, the gateway itself returns token ids and
        logprobs with every choice. Who asks it for this model's `name` asks for what the endpoint calls it. Raises
        NotRegistered, or ValueError when there is no endpoint or no key.
        """
        base_url, api_key = self._endpoint()
        served_as = self.inference_model_name or self.name
        try:
            loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if self._openai_client is not None:
            (known, known_loop), client = self._openai_client
            # Connections belong to an event loop; a client made before any ran has none yet.
            if known == (base_url, api_key, served_as) and (loop is None or known_loop in (None, loop)):
                self._openai_client = ((known, known_loop or loop), client)
                return client
        from .openai_client import make_openai_client

        client = make_openai_client(base_url=base_url, api_key=api_key, served_as={self.name: served_as})
        self._openai_client = (((base_url, api_key, served_as), loop), client)
        return client

    def litellm_completion_params(self, step: int | None = None) -> dict[str, Any]:
        """Keyword arguments for `litellm.completion`; `step` asks for a certain step of a trainable model."""
        prefix = "hosted_vllm/" if self.trainable else ""
        return {
            "model": prefix + self.get_inference_name(step),
            "base_url": self.inference_base_url,
            "api_key": self.inference_api_key,
            "temperature": 1,
        }

    def get_inference_name(self, step: int | None = None) -> str:
        """The name to ask for in a request."""
        return inference_name(self.inference_model_name or self.name, step)

    def _endpoint(self) -> tuple[str, str]:
        if not self.inference_base_url or not self.inference_api_key:
            missing = "inference_api_key" if self.inference_base_url else "inference_base_url"
            raise ValueError(
                f"the model {self.name!r} has no {missing}: give Model(inference_base_url=..., inference_api_key=...),"
                " any text as the key when the endpoint asks for none."
            )
        return self.inference_base_url, self.inference_api_key

    # state on disk

    def overwrite_state(self, state: Mapping[str, Any]) -> None:
        """Replace state.json."""
        path = self._folder() / "state.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(path, dict(state))

    def merge_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Update the top-level keys of state.json and give the whole.

        Others that merge meanwhile, in this process or another, wait: none loses a key. Raises TimeoutError when one
        keeps this one waiting for a minute.
        """
        from filelock import FileLock, Timeout  # takes as long as a tenth of `import art`

        folder = self._folder()
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.state.lock"))
        try:
            lock.acquire(timeout=STATE_LIMIT_S, poll_interval=0.01)
        except Timeout as error:
            raise TimeoutError(
                f"another process has been merging into {folder / 'state.json'} for {STATE_LIMIT_S:g} s, so nothing was"
                f" merged; it holds {lock.lock_file}. End that process, and merge again."
            ) from error
        try:
            merged = {**(self.read_state() or {}), **state}
            self.overwrite_state(merged)
        finally:
            lock.release()
        return merged

    def read_state(self) -> dict[str, Any] | None:
        """What state.json holds; None when there is none. Raises ValueError when it is not a JSON object."""
        path = self._folder() / "state.json"
        try:
            state = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); mend or remove it.") from error
        if not isinstance(state, dict):
            raise ValueError(f"{path} holds a {type(state).__name__}, not an object; mend or remove it.")
        return state

    def safe_model_dump(self) -> dict[str, Any]:
        """This model as values that JSON can hold, without the API key."""
        dumped = self.model_dump(exclude={"inference_api_key", "config"})
        return {**dumped, "trainable": self.trainable, "config": _as_json(self.config)}

    def _folder(self) -> Path:
        return ModelKey(self.project, self.name).folder(Path(self.base_path))

    # steps and logging

    async def get_step(self) -> int:
        """The latest step; 0 for a model that isn't trained."""
        return 0

    async def log(
        self,
        trajectories: TrajectoriesToLog | None = None,
        split: str = "val",
        *,
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> None:
        """Send trajectories and metrics to the trackers that `report_metrics` names, or to all that are installed.

        `trajectories` are groups, or trajectories and exceptions of one group. Rewards, their spread and the other
        metrics of the trajectories are computed, and for gathered groups how long that took and how many tokens a
        second it gave (`art.step_clock`), of a trained step also how old its tokens were. `metrics` are added and win
        over a computed one of the same name. A name without a section is put under `split`. `step` None means the
        current step. Metrics that are not finite are kept, with a warning. A value that can't be kept is named in a
        warning and left out; it costs nothing else. A tracker that fails is warned of and does not keep the others from
        being told.
        """
        check_name(split, what="split")
        step = await self.get_step() if step is None else _whole(step)
        registry = installed_plugins()
        told = trackers(registry, self.report_metrics)
        kept = [without_unsound(group, f"trajectory_groups[{g}]") for g, group in enumerate(_as_groups(trajectories))]
        groups = [group for group, _ in kept]
        given, problems = without_unsound_metrics(metrics or {})
        given = with_sections(given, split)
        aged = age_metrics(groups, step, given) if split == "train" else {}
        logged = trajectory_metrics(groups, split) | self._clock.metrics(groups, split, given) | aged | given
        if groups:
            await announce(
                registry,
                "art_log_trajectories",
                only=told,
                model=self,
                trajectory_groups=groups,
                step=step,
                split=split,
            )
        if logged:
            await announce(registry, "art_log_metrics", only=told, model=self, metrics=logged, step=step, split=split)
        # Last, since who has warnings raised as errors is to lose nothing by them.
        if (groups or logged) and not told and self.report_metrics is None:
            warnings.warn(
                "model.log: no tracker is installed, so nothing is kept. To keep history.jsonl and the trajectories:"
                " pip install art-tracker-files",
                RuntimeWarning,
                stacklevel=2,
            )
        warn_of_non_finite(logged)
        warn_of_left_out([problem for _, said in kept for problem in said] + problems)


class TrainableModel(Model):
    """A model that a backend serves and trains.

    `base_model` is a name that a plugin knows (`smollm2-135m-instruct`), a folder of weights, or a PEFT adapter folder
    to start from. `_internal_config` holds `art.dev.InternalModelConfig`; an unknown key is refused.
    """

    trainable: ClassVar[bool] = True

    base_model: str

    _internal_config: InternalModelConfig | None = PrivateAttr(None)
    _served_steps: int | None = PrivateAttr(None)

    def __init__(self, *, _internal_config: InternalModelConfig | None = None, **fields: Any) -> None:
        config = read_internal_config(_internal_config or {})
        super().__init__(**fields)
        self._internal_config = config

    @property
    def internal_config(self) -> Mapping[str, Any]:
        """The settings of `_internal_config` as they were read, empty when none were given."""
        return dict(self._internal_config or {})

    @property
    def served_steps(self) -> int | None:
        """How many steps the backend can serve at once; None before registration and where there is no limit."""
        return self._served_steps

    async def register(self, backend: Backend) -> None:
        """Have the backend serve this model, and learn its endpoint, key and folder. Again, it changes nothing.

        Raises PluginNotInstalled for a name in `report_metrics` that is no tracker, and what the backend raises.
        """
        trackers(installed_plugins(), self.report_metrics)
        registration = await backend.register(self)
        self.inference_base_url = registration.inference_base_url
        self.inference_api_key = registration.inference_api_key
        self.inference_model_name = registration.inference_model_name or self.name
        if registration.base_path is not None:
            self.base_path = str(registration.base_path)
        self._backend, self._served_steps = backend, registration.served_steps
        await announce(installed_plugins(), "art_model_registered", backend=backend, model=self)

    def get_inference_name(self, step: int | None = None) -> str:
        """`name@step` of the latest published step, or of `step`, once registered.

        In a rollout of a PipelineTrainer that holds a step, that one is named instead of the latest.
        """
        if self._backend is None:
            return super().get_inference_name(step)
        if step is None and (held := pinned_name(self.inference_base_url or "", self.name)) is not None:
            return held
        return self._backend.inference_name(self, step)

    async def get_step(self) -> int:
        """The latest published step. Raises NotRegistered."""
        return await self.backend().get_step(self)

    async def train(
        self,
        trajectory_groups: Iterable[TrajectoryGroup],
        config: TrainConfig | None = None,
        *,
        verbose: bool = False,
    ) -> None:
        """Deprecated: does `backend.train`, then `model.log` with split "train"."""
        deprecated("model.train()", instead=INSTEAD_OF_TRAIN, removed_in="1.0")
        groups = list(trajectory_groups)
        arguments = (config or TrainConfig()).as_arguments() | ({"verbose": True} if verbose else {})
        result = await self.backend().train(self, groups, **arguments)
        await self.log(groups, metrics=result.metrics, step=result.step, split="train")

    async def train_sft(
        self,
        trajectories: Iterable[Trajectory],
        config: TrainSFTConfig | None = None,
        *,
        verbose: bool = False,
        log_metrics: bool = True,
    ) -> TrainResult:
        """Train one step on the replies of conversations, publish it, and log its metrics with split "train".

        Every message of the assistant is trained on, whatever the trajectory's reward; which tokens they are is read
        from the chat template. `verbose` prints the metrics. A later `backend.train` goes on from the weights. Raises
        UnsupportedCapability for a backend that can't, and what `backend.train_sft` raises.
        """
        settings = config or TrainSFTConfig()
        result = await self.backend().train_sft(
            self, list(trajectories), learning_rate=settings.learning_rate, batch_size=settings.batch_size
        )
        if log_metrics:
            await self.log(metrics=result.metrics, step=result.step, split="train")
        if verbose:
            print(", ".join(f"{name} {value:g}" for name, value in sorted(result.metrics.items())))
        return result

    async def delete_checkpoints(self, best_checkpoint_metric: str = "val/reward") -> list[int]:
        """Delete all checkpoints but the latest and the one with the highest `best_checkpoint_metric` in history.jsonl.

        Gives the steps that were deleted; one that is served or leased stays. When the metric was never logged nothing
        is deleted, with a warning, as the best step is not known.
        """
        backend = self.backend()
        steps = await backend.list_steps(self)
        if len(steps) < 2:
            return []
        best = await asyncio.to_thread(best_step, self._folder() / HISTORY, best_checkpoint_metric)
        if best is None:
            warnings.warn(
                f"{self._folder() / HISTORY} has no {best_checkpoint_metric!r}, so the best checkpoint is not known and"
                " none was deleted. Log it with model.log, or name another best_checkpoint_metric.",
                RuntimeWarning,
                stacklevel=2,
            )
            return []
        deleted: list[int] = []
        for step in sorted(set(steps) - {max(steps), best}):
            try:
                deleted += await backend.delete_checkpoints(self, [step])
            except CheckpointInUse:
                continue  # it goes with a later call
        return deleted

    def _endpoint(self) -> tuple[str, str]:
        if self._backend is None and not (self.inference_base_url and self.inference_api_key):
            self.backend()
        return super()._endpoint()


def _as_groups(trajectories: TrajectoriesToLog | None) -> list[TrajectoryGroup]:
    if trajectories is None:
        return []
    if isinstance(trajectories, TrajectoryGroup):
        return [trajectories]
    given = list(cast("Iterable[Any]", trajectories))
    for item in given:
        if not isinstance(item, TrajectoryGroup | Trajectory | BaseException):
            raise TypeError(
                f"model.log takes trajectory groups, or trajectories and exceptions, not {type(item).__name__};"
                " await groups that are still being gathered."
            )
    groups = [item for item in given if isinstance(item, TrajectoryGroup)]
    loose = [item for item in given if not isinstance(item, TrajectoryGroup)]
    return [*groups, TrajectoryGroup(loose)] if loose else groups


def _whole(step: Any) -> int:
    try:
        return operator.index(step)
    except TypeError as error:
        raise TypeError(f"model.log: step must be a whole number, not {step!r}") from error


def _as_json(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=str))
