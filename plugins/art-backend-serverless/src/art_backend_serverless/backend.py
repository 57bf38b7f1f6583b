"""ServerlessBackend: serves and trains models on a machine elsewhere, over HTTP.

This is the client's side: it judges arguments, uploads a step's trajectories, follows the job and tells plugins. No
weights and no engine ever live in this process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self
from weakref import ref

from art_core import (
    BackendCapability,
    ModelKey,
    PolicyModel,
    Registration,
    ServerlessTrainResult,
    Trajectory,
    TrajectoryGroup,
    announce,
    check_groups,
    installed_plugins,
    require,
    run_step,
)
from art_core.errors import (
    CheckpointInUse,
    CheckpointNotFound,
    ModelBusy,
    NotRegistered,
    UnsupportedCapability,
)

from . import checkpoints, downloads, logs, wire
from .address import CLOUD, ApiKey, check_base_url
from .errors import ServiceRefused
from .options import RemoteSftOptions, RemoteTrainOptions, check_conversations
from .progress import JobProgress
from .service import Connection, Patience, Service
from .step import RemoteModel, RemoteStep, send_log, sft_job, training_job

Cap = BackendCapability
_EVERY_SERVICE: Final = frozenset(
    {Cap.CONCURRENT_INFERENCE, Cap.LEASES, Cap.DELETE_CHECKPOINTS, Cap.CHECKPOINTS_AS_ARTIFACTS}
)
_OWN_SERVERS: Final = frozenset({Cap.SFT, Cap.FORK, Cap.PULL})
LOGS_LIMIT_S: Final = 30.0
_OWN_SERVER = "A server of your own does: `art serve`, and ServerlessBackend(base_url=...)."


class ServerlessBackend:
    """Serves and trains models on a machine elsewhere.

    `base_url` is the training service, None W&B's cloud; a server of your own is `art serve`. `api_key` is its key,
    None that of WANDB_API_KEY in the environment, which is read when it is first needed. `patience` says how long it
    tries and waits. May be awaited, which gives the backend itself, and used on several event loops.

    `save_checkpoint` of `train`: every step is stored at the service as an artifact and served from there, whatever it
    says; `delete_checkpoints` removes some. The service serves a step as soon as its job ends, so a plugin that refuses
    it in `art_before_publish_checkpoint` comes too late: its error is raised, and the step is served. A job can't be
    ended from here: whoever stops waiting is told which one may still finish. A lease keeps this client from deleting
    the step, and no other client.
    """

    name = "serverless"

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        *,
        patience: Patience | None = None,
        show_progress: bool = True,
    ) -> None:
        self._registry = installed_plugins()
        address = check_base_url(CLOUD if base_url is None else base_url)
        patience = patience or Patience()
        self._service = Service(address, ApiKey(api_key), patience)
        # What is only logged may not hold up who trains.
        brief = replace(patience, request_s=min(patience.request_s, LOGS_LIMIT_S))
        self._logs_service = Service(address, ApiKey(api_key), brief)
        self._capabilities = _EVERY_SERVICE if address == CLOUD else _EVERY_SERVICE | _OWN_SERVERS
        self._show = show_progress
        self._models: dict[ModelKey, RemoteModel] = {}
        self._latest: dict[ModelKey, int | None] = {}
        self._training: set[ModelKey] = set()
        self._leased: Counter[tuple[ModelKey, int]] = Counter()
        # Weakly, so that the hook keeps no backend alive.
        myself = ref(self)
        logs.sends(self, lambda: None if (backend := myself()) is None else backend.log_trajectories)

    def __repr__(self) -> str:
        return f"ServerlessBackend(base_url={self.base_url!r})"

    @property
    def base_url(self) -> str:
        """The address of the training service."""
        return self._service.base_url

    @property
    def capabilities(self) -> frozenset[BackendCapability]:
        """What it declares: of W&B's cloud what its published calls can do, of another address all that `art serve`
        can. A service that turns out not to be able to refuses in words.
        """
        return self._capabilities

    def capabilities_for(self, model: PolicyModel) -> frozenset[BackendCapability]:  # noqa: ARG002
        """The same for each model."""
        return self._capabilities

    async def register(self, model: PolicyModel) -> Registration:
        """Make the model at the service, or find the one of that name; its latest checkpoint is served. A second call
        changes nothing.

        Raises KeyMissing, BaseModelNotFound, ValueError for settings in `_internal_config`, which the service has no
        place for, and for a model that was made from another base model.
        """
        key = ModelKey(model.project, model.name)
        if model.internal_config:
            raise ValueError(
                f"{key}: the training service takes no _internal_config ({', '.join(sorted(model.internal_config))});"
                " engines are configured where it runs. Leave it out."
            )
        async with self._waiting(f"register {key}", "registering") as connection:
            made = await connection.post(
                wire.MODELS,
                wire.Model,
                doing=f"registering {key}",
                body=wire.CreateModel(
                    entity=model.entity,
                    project=model.project,
                    name=model.name,
                    base_model=model.base_model,
                    return_existing=True,
                ),
                repeat=True,
            )
            if made.base_model.casefold() != model.base_model.casefold():
                raise ValueError(
                    f"{key} is there already, and was made from the base model {made.base_model!r}, not"
                    f" {model.base_model!r}. Give that base_model, or the model another name."
                )
            remote = RemoteModel(key=key, id=made.id, entity=made.entity)
            latest = await checkpoints.latest_step(connection, made.id)
        self._models[key], self._latest[key] = remote, latest
        return Registration(
            inference_base_url=self.base_url,
            inference_api_key=self._service.api_key,
            inference_model_name=remote.artifact_name(),
        )

    async def delete_model(self, model: PolicyModel) -> None:
        """Delete the model at the service, with all of its checkpoints; nothing brings them back."""
        remote = self._registered(model)
        async with self._waiting(f"delete {remote.key}", "deleting") as connection:
            try:
                path = wire.MODEL.format(model_id=remote.id)
                await connection.delete(path, None, doing=f"deleting {remote.key}")
            except ServiceRefused as error:
                if error.status != 404:
                    raise
        del self._models[remote.key], self._latest[remote.key]

    async def train(
        self,
        model: PolicyModel,
        trajectory_groups: Sequence[TrajectoryGroup],
        *,
        learning_rate: float = 5e-6,
        ppo: bool | None = None,
        loss_fn: Literal["cispo", "ppo"] | None = None,
        normalize_advantages: bool | None = None,
        epsilon: float | None = None,
        epsilon_high: float | None = None,
        advantage_balance: float | None = None,
        scale_rewards: bool | None = None,
        importance_sampling_level: Literal["token", "sequence", "average", "geometric_average"] | None = None,
        max_negative_advantage_importance_sampling_weight: float | None = None,
        mask_prob_ratio: bool | None = None,
        kimi_k2_tau: float | None = None,
        precalculate_logprobs: bool | None = None,
        kl_penalty_coef: float | None = None,
        kl_penalty_reference_step: int | None = None,
        allow_training_without_logprobs: bool | None = None,
        altered_sampling: Literal["train", "refuse"] | None = None,
        truncated_importance_sampling: float | None = None,
        packed_sequence_length: int | None = None,
        grad_accumulation_sequences: int | None = None,
        num_trajectories_learning_rate_multiplier_power: float | None = None,
        save_checkpoint: bool = True,
        verbose: bool = False,
        **unknown: Any,
    ) -> ServerlessTrainResult:
        """Train one step on the groups; new requests for the model's name go to it when this returns.

        Logs nothing; `model.log` does. None leaves an argument to the service; those from `kl_penalty_coef` to
        `num_trajectories_learning_rate_multiplier_power` only some services take, W&B's cloud none. `loss_fn` and `ppo`
        are two words for one thing, as are `normalize_advantages` and `scale_rewards`; `verbose` prints the metrics.
        Raises UnknownArgument for what the service doesn't take, before anything is sent; InvalidTrajectory, ModelBusy
        while this client trains the model, TrainingFailed with the service's reason, JobStalled, ServiceUnreachable,
        OutcomeUnknown when the job may have been taken.
        """
        given = {k: v for k, v in locals().items() if k not in ("self", "model", "trajectory_groups", "unknown")}
        options = RemoteTrainOptions.of({**given, **unknown}, where="ServerlessBackend.train")
        groups = list(trajectory_groups)
        check_groups(groups)
        remote = self._registered(model)
        config = await self._config(options)
        message = wire.CreateTrainingJob(model_id=remote.id, trajectory_groups=[], experimental_config=config)

        async def submit(connection: Connection, progress: JobProgress) -> str:
            return await training_job(self._service, connection, progress, message, groups)

        result = await self._run(model, remote, groups, submit)
        if options.verbose:
            print(", ".join(f"{name} {value:g}" for name, value in sorted(result.metrics.items())))
        return result

    async def train_sft(
        self,
        model: PolicyModel,
        trajectories: Sequence[Trajectory],
        *,
        learning_rate: float | Sequence[float] = 5e-5,
        batch_size: int | Literal["auto"] = "auto",
        training_data_url: str | None = None,
        save_checkpoint: bool = True,
        **unknown: Any,
    ) -> ServerlessTrainResult:
        """Train one step on the replies of these conversations; new requests for the model's name go to it.

        They are uploaded as lines of JSON to a server that takes uploads. W&B's cloud takes none: there
        `training_data_url` names an artifact of type "dataset" that holds them as train.jsonl, and `trajectories` is
        empty. A batch of `batch_size` conversations ("auto": 2) is one optimizer step; `learning_rate` is one rate, or
        one for each batch. Raises as `train`, ValueError for trajectories with additional histories, for which a line
        has no place, UnsupportedCapability.
        """
        where = "ServerlessBackend.train_sft"
        given = {"learning_rate": learning_rate, "batch_size": batch_size, "training_data_url": training_data_url}
        options = RemoteSftOptions.of({**given, "save_checkpoint": save_checkpoint, **unknown}, where=where)
        groups = [TrajectoryGroup(trajectories)]
        check_groups(groups)
        url = options.training_data_url
        check_conversations(groups[0], url, where=where)
        config = options.config(None if url else len(groups[0]), where=where)
        remote = self._registered(model)
        if url is None:
            await self._able(Cap.SFT, lambda can: can.uploads, _SFT_INSTEAD)
        message = wire.CreateSftTrainingJob(model_id=remote.id, training_data_url=url or "", config=config)

        async def submit(connection: Connection, progress: JobProgress) -> str:
            return await sft_job(self._service, connection, progress, message, list(groups[0]))

        return await self._run(model, remote, groups, submit)

    async def log_trajectories(
        self, model: PolicyModel, trajectory_groups: Sequence[TrajectoryGroup], split: str
    ) -> None:
        """Send trajectories to the service, as `model.log` does; nothing of them is dropped."""
        await send_log(self._logs_service, self._registered(model), trajectory_groups, split)

    async def get_step(self, model: PolicyModel) -> int:
        """The latest step that the service has a checkpoint of, 0 when it has none."""
        remote = self._registered(model)
        async with self._service.connected() as connection:
            latest = await checkpoints.latest_step(connection, remote.id)
        self._latest[remote.key] = latest
        return latest or 0

    async def list_steps(self, model: PolicyModel) -> list[int]:
        """Every step that the service has a checkpoint of, oldest first."""
        remote = self._registered(model)
        async with self._service.connected() as connection:
            return await checkpoints.list_checkpoints(connection, remote.id)

    def inference_name(self, model: PolicyModel, step: int | None = None) -> str:
        """`wandb-artifact:///entity/project/name:stepN`: of `step`, or of the latest step that this client has seen.
        Without `:stepN`, which is the latest that the service serves, as long as none was seen. Raises NotRegistered.
        """
        remote = self._registered(model)
        return remote.artifact_name(self._latest[remote.key] if step is None else step)

    def model_inference_name(self, model: PolicyModel, step: int | None = None) -> str:
        """The same as `inference_name`."""
        return self.inference_name(model, step)

    @asynccontextmanager
    async def lease(self, model: PolicyModel, step: int | None = None) -> AsyncIterator[str]:
        """Hold a step (None: the latest), which this gives the name of: this client doesn't delete it meanwhile. The
        service serves every step that is kept. Raises CheckpointNotFound for a step that isn't there.
        """
        remote = self._registered(model)
        held = await self.get_step(model) if step is None else step
        if step is not None and step != self._latest[remote.key]:
            there = await self.list_steps(model)
            # The untrained adapter isn't a checkpoint everywhere.
            if step != 0 and step not in there:
                listed = ", ".join(map(str, there)) or "none"
                raise CheckpointNotFound(f"{remote.key} has no checkpoint of step {step}; there: {listed}.")
        self._leased[remote.key, held] += 1
        try:
            yield remote.artifact_name(held if held or self._latest[remote.key] is not None else None)
        finally:
            self._leased[remote.key, held] -= 1

    async def delete_checkpoints(self, model: PolicyModel, steps: Sequence[int]) -> list[int]:
        """Delete steps at the service and say which were; unknown ones are passed over. Raises CheckpointInUse, and
        deletes nothing, when one of them is the latest, which is served, or leased by this client.
        """
        remote = self._registered(model)
        wanted = list(dict.fromkeys(steps))
        async with self._service.connected() as connection:
            there = await checkpoints.list_checkpoints(connection, remote.id)
            for step in wanted:
                why = "served" if there and step == there[-1] else "leased" if self._leased[remote.key, step] else ""
                if why:
                    raise CheckpointInUse(f"step {step} of {remote.key} is {why}; nothing was deleted.")
            deleted = [step for step in wanted if step in there]
            await checkpoints.delete(connection, remote.id, deleted)
        for step in deleted:
            await announce(self._registry, "art_checkpoint_deleted", model=model, checkpoint=remote.checkpoint(step))
        return deleted

    async def fork_checkpoint(
        self,
        model: PolicyModel,
        from_model: str,
        *,
        from_project: str | None = None,
        not_after_step: int | None = None,
    ) -> int:
        """Start `model` from the latest checkpoint of another of the same entity (not after a step); gives the step.
        Raises CheckpointNotFound, UnsupportedCapability.
        """
        remote = self._registered(model)
        await self._able(Cap.FORK, lambda can: can.fork, f"This service has no call for it. {_OWN_SERVER}")
        body = wire.Fork(from_model=from_model, from_project=from_project, not_after_step=not_after_step)
        async with self._waiting(f"fork {remote.key}", f"from {from_model}") as connection:
            path = wire.FORK.format(model_id=remote.id)
            step = (await connection.post(path, wire.Forked, doing=f"forking {from_model}", body=body)).step
        self._latest[remote.key] = step
        return step

    async def pull_checkpoint(
        self,
        model: PolicyModel,
        *,
        step: int | Literal["latest"] | None = None,
        local_path: Path | str | None = None,
    ) -> Path:
        """Copy the PEFT folder of a step (None and "latest": the latest) to `local_path`, which must be new or empty,
        or into the model's own folder; gives where it is. Each file is checked by its hash. Raises CheckpointNotFound,
        UnsupportedCapability.
        """
        remote = self._registered(model)
        await self._able(
            Cap.PULL,
            lambda can: can.pull,
            f"W&B's cloud keeps it as the artifact {remote.artifact_name()}, which wandb.Api().artifact(...) downloads."
            f" {_OWN_SERVER}",
        )
        with JobProgress(f"pull {remote.key}", enabled=self._show, brief=True) as progress:
            async with self._service.connected(progress.note) as connection:
                there = await checkpoints.list_checkpoints(connection, remote.id)
                wanted = (there[-1] if there else 0) if step in (None, "latest") else int(step)
                if wanted not in there:
                    listed = ", ".join(map(str, there)) or "none"
                    raise CheckpointNotFound(f"{remote.key} has no checkpoint of step {wanted}; there: {listed}.")
                own = remote.key.folder(Path(model.base_path)) / "checkpoints" / f"{wanted:04d}"
                target = own if local_path is None else Path(local_path)
                return await downloads.pull(connection, self._service.patience, remote.id, wanted, target, progress)

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
        """Forget the models; no connection outlives a call. A second call does nothing."""
        self._models.clear()
        self._latest.clear()

    def __await__(self) -> Generator[Any, None, Self]:
        async def itself() -> Self:
            return self

        return itself().__await__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._models.clear()
        self._latest.clear()

    async def _run(
        self,
        model: PolicyModel,
        remote: RemoteModel,
        groups: list[TrajectoryGroup],
        submit: Callable[[Connection, JobProgress], Awaitable[str]],
    ) -> ServerlessTrainResult:
        key = remote.key
        if key in self._training:
            raise ModelBusy(f"{key} is being trained by this client; wait for that step.")
        self._training.add(key)
        try:
            async with self._waiting(f"train {key.name}", "asking for the latest step") as connection:
                before = await checkpoints.latest_step(connection, remote.id) or 0

            def published(step: int) -> None:
                self._latest[key] = step

            async def gradient_step(done: int, total: int, metrics: dict[str, float]) -> None:
                told: dict[str, Any] = {"model": model, "step": before + 1, "done": done, "total": total}
                await announce(self._registry, "art_gradient_step", **told, metrics=metrics)

            step = RemoteStep(
                self._service,
                remote,
                before=before,
                submit=submit,
                on_gradient_step=gradient_step,
                on_published=published,
                let_go=lambda: self._training.discard(key),
                show=self._show,
            )
            return await run_step(self._registry, self, model, groups, step, step=before + 1)
        finally:
            self._training.discard(key)

    async def _config(self, options: RemoteTrainOptions) -> wire.ExperimentalConfig:
        taken: Sequence[str] = ()
        if options.own:
            async with self._service.connected() as connection:
                can = await self._service.capabilities(connection)
            taken = () if can is None else can.train_options
        return options.config(taken, where=f"ServerlessBackend.train at {self.base_url}")

    async def _able(
        self, capability: BackendCapability, can: Callable[[wire.Capabilities], bool], instead: str
    ) -> None:
        """Raise UnsupportedCapability unless this service can do it, as far as it says."""
        require(capability, self._capabilities, plugin=self.name, instead=instead)
        async with self._service.connected() as connection:
            said = await self._service.capabilities(connection)
        if said is None or not can(said):
            raise UnsupportedCapability(self.name, str(capability.value), f"{self.base_url} can't do it. {instead}")

    @asynccontextmanager
    async def _waiting(self, what: str, phase: str) -> AsyncIterator[Connection]:
        with JobProgress(what, enabled=self._show, brief=True) as progress:
            async with self._service.connected(progress.note) as connection:
                progress.phase(phase)
                yield connection

    def _registered(self, model: PolicyModel) -> RemoteModel:
        key = ModelKey(model.project, model.name)
        if key not in self._models:
            raise NotRegistered(
                f"{key} is not registered with this backend; call `await model.register(backend)` first."
            )
        return self._models[key]


_SFT_INSTEAD = (
    "W&B's cloud takes training data as an artifact only: log one of type 'dataset' with the conversations as"
    " train.jsonl, lines of {'messages': [...]}, and call train_sft(model, [],"
    f" training_data_url='wandb-artifact:///ENTITY/PROJECT/NAME:v0'). {_OWN_SERVER}"
)
