"""LocalBackend: serves and trains models on this machine, through a host process that owns the engines.

This is the client's side: it resolves names, asks plugins, writes the step's trajectories to a file and follows the
host's work. No weights, no traffic and no engine ever live in this process.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from art_core import (
    BackendCapability,
    LocalTrainResult,
    ModelKey,
    PolicyModel,
    Registration,
    TrainingCapability,
    Trajectory,
    TrajectoryGroup,
    check_groups,
    inference_name,
    installed_plugins,
    require,
    resolve_checkpoint,
    run_step,
)
from art_core.cancellation import to_the_end
from art_core.errors import BackendUnreachable, CheckpointNotFound, NotRegistered, PluginError
from art_engine_kit.model_folder import ModelFolder
from art_engine_kit.sequence_limit import SequenceLimit, check_lengths, known_lengths
from art_engine_kit.sft_options import SftOptions
from art_engine_kit.train_options import TrainOptions
from art_runtime import accelerators
from art_runtime.environments import engine_for

from ..adapters.copies import copy_adapter
from ..wire.deployment import works_at_once
from ..wire.messages import ForkRequest, LeaseEnd, LeaseRequest, OfModel, StepsRequest
from ..wire.settings import ModelSettings, read_settings
from .backend_path import backend_path
from .control_client import ControlClient
from .engine_choice import EngineChoice, choose_engines
from .registration import EnginePythons, registration_request
from .server_choice import choose_servers
from .step import HostStep, tell_deleted
from .step_warnings import StepWarnings
from .waiting import Waiting

DEFAULT_IDLE_TIMEOUT_S = 1800.0
DEFAULT_MAX_ADAPTERS = 8
_ALWAYS = frozenset(BackendCapability) - {
    BackendCapability.CONCURRENT_INFERENCE,
    BackendCapability.CHECKPOINTS_AS_ARTIFACTS,
    BackendCapability.SFT,
}


class LocalBackend:
    """Serves and trains models on this machine.

    `in_process=True`: everything ends when this process ends, however it ends. `in_process=False`: a host process
    outlives it, is found again by the next client with the same path without loading weights again, and ends after
    `idle_timeout_s` seconds without use or by `art down`. `path` holds models, checkpoints and logs; None is `.art` in
    the root of the git repository around the working folder, or in the working folder. `inference_engine` and
    `training_engine` are names of installed plugins; None chooses among those and prints why. `inference_python` and
    `training_python` are interpreters of your own for them; without, an engine that needs an environment of its own
    uses the one of `art engines install`, which `auto_install` runs if need be. An engine holds at most `max_adapters`
    steps at once.

    `inference_replicas` servers share the requests, each on its share of the GPUs; a step is published once all hold
    it, and one that dies is taken out and brought back. `inference_url`, one or several, uses servers that you run,
    with `inference_api_key`; they must see the same files as this process, and `art plugins show NAME` says how to
    start one.

    `save_checkpoint` of `train`: with True the step's PEFT folder stays on disk; with False it goes once a later step
    is served. Either way the step is published.
    """

    name = "local"

    def __init__(
        self,
        *,
        in_process: bool = False,
        path: str | Path | None = None,
        inference_engine: str | None = None,
        training_engine: str | None = None,
        idle_timeout_s: float = DEFAULT_IDLE_TIMEOUT_S,
        max_adapters: int = DEFAULT_MAX_ADAPTERS,
        inference_python: str | None = None,
        inference_replicas: int = 1,
        inference_url: str | Sequence[str] | None = None,
        inference_api_key: str | None = None,
        training_python: str | None = None,
        auto_install: bool = False,
        show_progress: bool = True,
    ) -> None:
        if type(max_adapters) is not int or max_adapters < 2:
            raise ValueError(
                f"max_adapters must be a whole number of at least 2, not {max_adapters!r}: a new step is loaded while"
                " the old one is still served."
            )
        if isinstance(idle_timeout_s, bool) or not isinstance(idle_timeout_s, int | float) or not idle_timeout_s > 0:
            raise ValueError(
                f"idle_timeout_s must be a number of seconds above 0, math.inf for never, not {idle_timeout_s!r}."
            )
        self._registry = installed_plugins()
        for given, card in (
            (inference_engine, self._registry.inference_engine),
            (training_engine, self._registry.training_engine),
        ):
            if given is not None:
                card(given)
        self._inference_engine, self._training_engine = inference_engine, training_engine
        self._path = backend_path(path)
        self._max_adapters = max_adapters
        self._show = show_progress
        self._servers = choose_servers(
            inference_engine=inference_engine,
            inference_python=inference_python,
            inference_replicas=inference_replicas,
            inference_url=inference_url,
            inference_api_key=inference_api_key,
        )
        self._pythons = EnginePythons(inference=inference_python, training=training_python, auto_install=auto_install)
        self._client = ControlClient(
            self._path, in_process=in_process, idle_timeout_s=idle_timeout_s, show=show_progress
        )
        self._registered: dict[ModelKey, int] = {}
        self._choice: EngineChoice | None = None
        self._warnings = StepWarnings()
        self._has_gpu = bool(accelerators())
        self._capabilities = self._declare(ModelSettings())

    def __repr__(self) -> str:
        return f"LocalBackend(path={str(self._path)!r})"

    @property
    def path(self) -> Path:
        """Where models, checkpoints and logs are."""
        return self._path

    @property
    def capabilities(self) -> frozenset[BackendCapability]:
        """What it declares for a model without GPU lists of its own; see `capabilities_for`."""
        return self._capabilities

    def capabilities_for(self, model: PolicyModel) -> frozenset[BackendCapability]:
        """What it declares for this model: CONCURRENT_INFERENCE depends on whether training and inference share a
        GPU.
        """
        return self._declare(read_settings(model.internal_config))

    async def register(self, model: PolicyModel) -> Registration:
        """Serve the model at its latest whole checkpoint, or at step 0, and load what trains it. A second call changes
        nothing.

        Raises BaseModelNotFound, AdapterMismatch for an adapter folder that doesn't fit its base, PathInUse,
        ProcessFailed with the end of an engine's log.
        """
        key = ModelKey(model.project, model.name)
        choice = self._engines()
        request = await registration_request(
            self._registry,
            model,
            choice,
            self._pythons,
            self._servers,
            max_adapters=self._max_adapters,
            session=self._client.session,
        )
        with Waiting(f"Registering {key}", enabled=self._show) as waiting:
            answer = await self._client.follow("register", request, waiting.show)
        self._registered[key] = int(answer["step"])
        if answer["pending"] is not None:
            try:
                await self._publish_pending(model)
            except Exception as error:
                warnings.warn(
                    f"{key}: step {answer['pending']} was saved but not published, and it still can't be: {error} Step"
                    f" {answer['step']} is served.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return Registration(
            inference_base_url=answer["inference_base_url"],
            inference_api_key=answer["inference_api_key"],
            base_path=self._path,
            served_steps=self._max_adapters,
        )

    async def unregister(self, model: PolicyModel) -> None:
        """Serve a model no more, for any client; requests under way end first, its files stay. Registering it again
        goes on where it was.

        Raises CheckpointInUse while a step of it is leased or being trained.
        """
        key = self._require_registered(model)
        await self._client.call("unregister", OfModel(**await self._of(model)))
        del self._registered[key]

    async def train(
        self,
        model: PolicyModel,
        trajectory_groups: Sequence[TrajectoryGroup],
        *,
        learning_rate: float = 5e-6,
        loss_fn: Literal["cispo", "ppo"] = "cispo",
        normalize_advantages: bool = True,
        kl_penalty_coef: float = 0.0,
        kl_penalty_reference_step: int | None = None,
        kl_ref_adapter_path: str | Path | None = None,
        epsilon: float | None = None,
        epsilon_high: float | None = None,
        advantage_balance: float = 0.0,
        scale_rewards: bool = True,
        importance_sampling_level: Literal["token", "sequence", "average", "geometric_average"] = "token",
        max_negative_advantage_importance_sampling_weight: float | None = None,
        mask_prob_ratio: bool = False,
        kimi_k2_tau: float | None = None,
        precalculate_logprobs: bool = False,
        allow_training_without_logprobs: bool = False,
        altered_sampling: Literal["train", "refuse"] = "train",
        plot_tensors: bool = False,
        truncated_importance_sampling: float | None = None,
        packed_sequence_length: int | None = None,
        grad_accumulation_sequences: int | None = None,
        num_trajectories_learning_rate_multiplier_power: float = 0.0,
        save_checkpoint: bool = True,
        verbose: bool = False,
        **unknown: Any,
    ) -> LocalTrainResult:
        """Train one step on the groups and publish it: new requests for the model's name go to it when this returns.

        Logs nothing; `model.log` does. A step with nothing to train on carries the checkpoint on to the next step.
        `art_engine_kit.train_options.TrainOptions` documents the arguments. Raises UnknownArgument for any other,
        InvalidTrajectory, ValueError when a limit leaves out every trajectory, ModelBusy while the model is being
        trained, TrainingFailed, PublicationFailed; after each the step before is still served. Cancelling it stops the
        step; one that was saved already is kept beside its place as `NNNN.refused-…`, and never published.
        """
        given = {k: v for k, v in locals().items() if k not in ("self", "model", "trajectory_groups", "unknown")}
        options = TrainOptions.of({**given, **unknown}, where="LocalBackend.train")
        groups = list(trajectory_groups)
        check_groups(groups)
        key = self._require_registered(model)
        longest = read_settings(model.internal_config).adapter.max_seq_length
        limit = SequenceLimit.of(options.packed_sequence_length, longest)
        if left_out := check_lengths(known_lengths(groups) or [], limit):
            warnings.warn(left_out, RuntimeWarning, stacklevel=2)
        result = await self._run(model, groups, options=options, keep=options.save_checkpoint)
        self._warnings.tell(key, result)
        return result

    async def train_sft(
        self,
        model: PolicyModel,
        trajectories: Sequence[Trajectory],
        *,
        learning_rate: float | Sequence[float] = 5e-5,
        batch_size: int | Literal["auto"] = "auto",
        packed_sequence_length: int | None = None,
        save_checkpoint: bool = True,
        **unknown: Any,
    ) -> LocalTrainResult:
        """Train one step on the replies of these conversations and publish it, as `train` does; inference goes on or
        pauses as it does there.

        A batch of `batch_size` trajectories ("auto": 2) is one optimizer step: Σ −log π of its reply tokens ÷ their
        number. `learning_rate` is one rate, or one for each batch. Weight decay is 0 and the norm's limit 1 unless
        `trainer_args` says otherwise; the optimizer starts anew after a step of RL. Which tokens are replies is read
        from the chat template. Logs nothing; `model.train_sft` does. Raises as `train`, ValueError for a number of
        rates that isn't the batches', UnsupportedCapability.
        """
        given = {k: v for k, v in locals().items() if k not in ("self", "model", "trajectories", "unknown")}
        where = "LocalBackend.train_sft"
        options = SftOptions.of({**given, **unknown}, where=where)
        groups = [TrajectoryGroup(trajectories)]
        check_groups(groups)
        supervised = options.supervised(len(groups[0]), where=where)
        self._require_registered(model)
        require(
            BackendCapability.SFT,
            self.capabilities_for(model),
            plugin=self.name,
            instead='Use a training engine that declares it, such as LocalBackend(training_engine="torch").',
        )
        return await self._run(
            model,
            groups,
            options=options.train_options(),
            supervised=supervised,
            keep=options.save_checkpoint,
        )

    async def get_step(self, model: PolicyModel) -> int:
        """The latest published step."""
        step = int((await self._steps(model))["routed"])
        self._registered[ModelKey(model.project, model.name)] = step
        return step

    async def list_steps(self, model: PolicyModel) -> list[int]:
        """Every step whose checkpoint is whole and on disk, oldest first."""
        return list((await self._steps(model))["steps"])

    def inference_name(self, model: PolicyModel, step: int | None = None) -> str:
        """`name@step`: of `step`, or of the latest step that this client has seen published."""
        if step is None:
            step = self._registered.get(ModelKey(model.project, model.name))
        return inference_name(model.name, step)

    @asynccontextmanager
    async def lease(self, model: PolicyModel, step: int | None = None) -> AsyncIterator[str]:
        """Hold a step (None: the routed one) under its own name, `name@step`, which this gives. A client that dies lets
        go.

        Raises CheckpointNotFound for a step that isn't there.
        """
        self._require_registered(model)
        session = await self._client.session()
        request = LeaseRequest(session=session, project=model.project, name=model.name, step=step)
        held: dict[str, Any] = {}

        async def hold() -> None:
            held.update(await self._client.call("lease", request))

        try:
            # Cancelled in the middle it would be held, and nobody would know by which name to let it go.
            await to_the_end(hold())
            yield inference_name(model.name, held["step"])
        finally:
            # A host that is gone holds nothing any more.
            with suppress(BackendUnreachable):
                if held:
                    await to_the_end(self._client.call("end_lease", LeaseEnd(session=session, lease=held["lease"])))

    async def delete_checkpoints(self, model: PolicyModel, steps: Sequence[int]) -> list[int]:
        """Delete steps and say which were; unknown ones are passed over. Raises CheckpointInUse, and deletes nothing,
        when one of them is served, leased or being trained from.
        """
        key = self._require_registered(model)
        request = StepsRequest(**await self._of(model), steps=list(steps))
        deleted = [int(step) for step in (await self._client.call("delete", request))["deleted"]]
        await tell_deleted(self._registry, model, ModelFolder.under(self._path, key), deleted)
        return deleted

    async def fork_checkpoint(
        self,
        model: PolicyModel,
        from_model: str,
        *,
        from_project: str | None = None,
        not_after_step: int | None = None,
    ) -> int:
        """Start `model` from the latest checkpoint of another (not after a step), optimizer state included; gives the
        step.

        Works before registration too. Raises CheckpointNotFound, or CheckpointError when `model` has come that far
        itself. Once it has begun it is done: a cancellation is raised when it is.
        """
        request = ForkRequest(
            **await self._of(model), from_model=from_model, from_project=from_project, not_after_step=not_after_step
        )

        async def fork() -> int:
            step = int((await self._client.call("fork", request))["step"])
            if ModelKey(model.project, model.name) in self._registered:
                await self._publish_pending(model)
            return step

        # Cancelled in the middle it would leave a copy that isn't served, and that no second fork takes for its own.
        return await to_the_end(fork())

    async def pull_checkpoint(
        self,
        model: PolicyModel,
        *,
        step: int | Literal["latest"] | None = None,
        local_path: Path | str | None = None,
    ) -> Path:
        """The PEFT folder of a step (None and "latest": the routed one): copied to `local_path`, which must be new or
        empty, or without it the folder where the backend keeps it. Raises CheckpointNotFound.
        """
        key = self._require_registered(model)
        there = await self._steps(model)
        wanted = int(there["routed"]) if step in (None, "latest") else int(step)
        if wanted in there["steps"]:
            folder: Path | None = ModelFolder.under(self._path, key).checkpoint(wanted).path
        else:
            folder = await resolve_checkpoint(self._registry, model, wanted)
        if folder is None:
            steps = ", ".join(map(str, there["steps"])) or "none"
            raise CheckpointNotFound(f"{key} has no whole checkpoint of step {wanted}; there: {steps}.")
        if local_path is None:
            return folder
        return await asyncio.to_thread(copy_adapter, folder, Path(local_path))

    async def _experimental_fork_checkpoint(
        self,
        model: PolicyModel,
        from_model: str,
        from_project: str | None = None,
        not_after_step: int | None = None,
    ) -> int:
        """The published name of `fork_checkpoint`."""
        return await self.fork_checkpoint(model, from_model, from_project=from_project, not_after_step=not_after_step)

    async def _experimental_pull_model_checkpoint(
        self,
        model: PolicyModel,
        *,
        step: int | Literal["latest"] | None = None,
        local_path: Path | str | None = None,
    ) -> Path:
        """The published name of `pull_checkpoint`."""
        return await self.pull_checkpoint(model, step=step, local_path=local_path)

    async def close(self) -> None:
        """Let go of everything this client holds; with in_process=True the engines stop. A second call does nothing."""
        self._registered.clear()
        await self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._registered.clear()
        self._client.close_now()

    async def _run(self, model: PolicyModel, groups: list[TrajectoryGroup], **given: Any) -> LocalTrainResult:
        step = await self._step(model, groups=groups, show=self._show, **given)
        try:
            return await run_step(self._registry, self, model, groups, step, step=await step.begin())
        finally:
            await to_the_end(step.let_go())

    async def _publish_pending(self, model: PolicyModel) -> None:
        """Publish what a client saved but did not live to publish, or what was forked."""
        step = await self._step(model, show=self._show)
        try:
            await step.begin()
        finally:
            await to_the_end(step.let_go())

    async def _step(self, model: PolicyModel, **given: Any) -> HostStep:
        key = ModelKey(model.project, model.name)

        def published(step: int) -> None:
            self._registered[key] = step

        of_model, folder = await self._of(model), ModelFolder.under(self._path, key)
        return HostStep(self._client, self._registry, model, of_model, folder, on_published=published, **given)

    async def _steps(self, model: PolicyModel) -> dict[str, Any]:
        self._require_registered(model)
        return await self._client.call("steps", OfModel(**await self._of(model)))

    async def _of(self, model: PolicyModel) -> dict[str, str]:
        return {"session": await self._client.session(), "project": model.project, "name": model.name}

    def _require_registered(self, model: PolicyModel) -> ModelKey:
        key = ModelKey(model.project, model.name)
        if key not in self._registered:
            raise NotRegistered(
                f"{key} is not registered with this backend; call `await model.register(backend)` first."
            )
        return key

    def _engines(self) -> EngineChoice:
        if self._choice is None:
            self._choice = choose_engines(
                self._registry, inference=self._inference_engine, training=self._training_engine, has_gpu=self._has_gpu
            )
            if self._choice.reason and self._show:
                print(
                    f"LocalBackend uses {self._choice.reason}. To choose: LocalBackend(inference_engine=...,"
                    " training_engine=...)",
                    file=sys.stderr,
                )
        return self._choice

    def _declare(self, settings: ModelSettings) -> frozenset[BackendCapability]:
        """What depends on the engines: whether both work at once, and what training them can do."""
        try:
            choice = choose_engines(
                self._registry, inference=self._inference_engine, training=self._training_engine, has_gpu=self._has_gpu
            )
        except PluginError:
            return _ALWAYS
        declared = engine_for(self._registry.inference_engine(choice.inference)).capabilities
        found = set(_ALWAYS)
        if works_at_once(settings, declared, has_gpu=self._has_gpu, attached=bool(self._servers.urls)):
            found.add(BackendCapability.CONCURRENT_INFERENCE)
        trains = set() if choice.training is None else self._registry.training_engine(choice.training).capabilities
        if TrainingCapability.SFT in trains:
            found.add(BackendCapability.SFT)
        return frozenset(found)
