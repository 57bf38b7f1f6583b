"""Environments of the package `verifiers`, as they are: their tasks are scenarios, an episode is a rollout.

The environment runs its own agents and gives its own rewards; what its agents sample is recorded on the way to the
model and becomes the trajectory. Needs `pip install "art-core[verifiers]"`, and imports it when an environment is made.
Knows no backend and nothing of training.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from importlib import metadata
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

from packaging.version import Version

from art_core import Trajectory
from art_core.errors import ArtError, PluginNotInstalled

from ..model import Model
from ..pinned_step import pinned_name
from .conversations import histories_of

if TYPE_CHECKING:
    import verifiers.v1 as vf

    from .recorder import CompletionRecorder

__all__ = ["EpisodeFailed", "VerifiersEnvironment"]

NEEDED = Version("0.4")
PIP_LINE = "pip install 'art-core[verifiers]'"


class EpisodeFailed(ArtError):
    """An episode ended with an error of its environment, or left nothing that can be trained on."""


class VerifiersEnvironment:
    """An environment of verifiers, held open by `async with` while its rollouts run.

    `environment` is the id of a taskset, such as "gsm8k-v1"; a mapping as verifiers' `[env]` block has it; its
    `EnvConfig`; or an `Env` made already. `sampling` are parameters of every request of its agents, such as
    `{"max_tokens": 256}`. Raises PluginNotInstalled with the pip line when verifiers is missing or too old, and
    whatever verifiers raises for what it can't load.
    """

    def __init__(
        self,
        environment: str | Mapping[str, Any] | vf.EnvConfig | vf.Env[Any],
        *,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self._vf = _verifiers()
        self.env: vf.Env[Any] = _load(self._vf, environment)
        self.sampling = dict(sampling or {})
        self._recorder: CompletionRecorder | None = None
        self._held = AsyncExitStack()

    async def __aenter__(self) -> Self:
        from .recorder import CompletionRecorder

        async with AsyncExitStack() as entering:
            self._recorder = await entering.enter_async_context(CompletionRecorder())
            await entering.enter_async_context(self.env.serving())
            self._held = entering.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._recorder = None
        await self._held.aclose()

    def scenarios(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """One scenario for each task, in the environment's order, at most `limit`; of an endless one, without end.

        Each has the task, and `metadata` with its key as `scenario_id`, which a pipeline writes to the group.
        """
        for task in islice(iter(self.env.taskset), limit):
            yield {"task": task, "metadata": {"scenario_id": task.key}}

    async def rollout(self, model: Model, scenario: Mapping[str, Any], config: Any = None) -> Trajectory:  # noqa: ARG002
        """One episode of an environment that trains one agent once in it. `config` isn't read; a pipeline gives one.

        Raises EpisodeFailed when the episode fails, or gives more trajectories than one: for those, `trajectories`.
        """
        made = await self.trajectories(model, scenario)
        if len(made) != 1:
            agents = ", ".join(str(trajectory.metadata["agent"]) for trajectory in made)
            raise EpisodeFailed(
                f"an episode of {self.env.config.env_id} gave {len(made)} trajectories ({agents}), and a rollout is"
                " one: await trajectories(model, scenario), and put those whose rewards compare into one group."
            )
        return made[0]

    async def trajectories(self, model: Model, scenario: Mapping[str, Any]) -> list[Trajectory]:
        """One episode: a trajectory for each run of an agent that is trained, in the order in which they ended.

        `reward` is the run's own; `metrics` hold the environment's, the parts of the reward as `reward_<name>`, `turns`
        and `truncated`; `metadata` which `agent` ran, the `task`'s key and the `stop_condition`. Conversations beyond
        the first, such as a sub-agent's, are additional histories. Raises EpisodeFailed.
        """
        if self._recorder is None:
            raise RuntimeError("the environment isn't open: run its rollouts in `async with environment:`")
        recorder = self._recorder
        client = model.openai_client()
        context = self._vf.ModelContext(
            # A pipeline says in a context variable which step this rollout holds; requests come from elsewhere.
            model=pinned_name(str(client.base_url), model.name) or model.name,
            client=self._vf.EvalClientConfig(
                base_url=recorder.base_url(client), headers=recorder.headers, api_key_var="ART_NO_KEY"
            ),
            sampling=self._vf.Sampling(**self.sampling),
        )
        sessions: list[str] = []

        def begun(trace: vf.Trace) -> None:
            sessions.append(trace.id)
            recorder.open(trace.id)

        asked = {}
        try:
            (slot,) = self.env.slots(scenario["task"])
            episode = await self.env.run_slot(slot, context, on_trace=begun)
        finally:
            # Those of attempts that the environment itself tried again go too.
            for session in sessions:
                asked[session] = recorder.close(session)
        if not self.env.complete(episode):
            raise EpisodeFailed(_failure(episode))
        made = [
            _trajectory(trace, histories_of(asked[trace.id]))
            for trace in episode.traces
            if trace.ok and trace.agent.trainable and asked.get(trace.id)
        ]
        if not made:
            raise EpisodeFailed(
                f"the episode of task {episode.task.key} asked the model nothing: none of its agents is both trained"
                " and served by the model. An agent with a `client` or a `model` of its own isn't."
            )
        return made


def _verifiers() -> Any:
    try:
        found = Version(metadata.version("verifiers"))
    except metadata.PackageNotFoundError:
        raise PluginNotInstalled(
            f"the package verifiers is not installed, so none of its environments can run. Install it: {PIP_LINE}"
        ) from None
    if found < NEEDED:
        raise PluginNotInstalled(
            f"verifiers {found} is installed; its environments are run from {NEEDED} on, which has another interface."
            f" Install a newer one: {PIP_LINE} --upgrade"
        )
    return importlib.import_module("verifiers.v1")


def _load(vf: Any, environment: Any) -> Any:
    if isinstance(environment, vf.Env):
        return environment
    if isinstance(environment, str):
        environment = {"taskset": {"id": environment}}
    given = environment if isinstance(environment, vf.EnvConfig) else dict(environment)
    return vf.load_environment(vf.resolve_env_config(given))


def _failure(episode: vf.Episode) -> str:
    errors = [*episode.errors, *(error for trace in episode.traces if not trace.ok for error in trace.errors)]
    said = "; ".join(f"{error.type}: {error.message}" for error in errors) or "it doesn't count as complete"
    return f"the episode of task {episode.task.key} in {episode.env.id} failed: {said}"


def _trajectory(trace: vf.Trace, histories: list[Any]) -> Trajectory:
    first, *others = histories
    rewards = {f"reward_{name}": part.score for name, part in trace.rewards.items() if part is not None}
    measured = {name: value for name, value in trace.metrics.items() if value is not None}
    trajectory = Trajectory(
        messages_and_choices=first.messages_and_choices,
        tools=first.tools,
        additional_histories=others,
        reward=trace.reward,
        metrics={**measured, **rewards, "turns": trace.num_turns, "truncated": trace.is_truncated},
        metadata={"agent": trace.agent.name, "task": trace.task.key, "stop_condition": trace.stop_condition},
        start_time=datetime.fromtimestamp(trace.timing.start, UTC),
    )
    return trajectory.finish().stamp_policy_versions()
