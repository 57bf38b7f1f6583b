"""What an attempt is: messages and sampled choices, a reward, and what was measured on the way.

Knows the shapes of a trajectory and how one is written down and read back without losing anything. Knows nothing of
tokens being trained, of backends or of engines. The openai package is imported only when a choice has to be read back.
"""

from __future__ import annotations

import math
import reprlib
import time
import traceback
from collections.abc import Awaitable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypedDict, Unpack, cast, overload

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    field_validator,
)

from .errors import InvalidTrajectory
from .pending_group import PendingTrajectoryGroup

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
    from openai.types.chat.chat_completion import Choice

    Message: TypeAlias = ChatCompletionMessageParam
    Tool: TypeAlias = ChatCompletionToolParam
    MessageOrChoice: TypeAlias = ChatCompletionMessageParam | Choice
else:
    Message = Tool = MessageOrChoice = Any

Messages: TypeAlias = list[Message]
MessagesAndChoices: TypeAlias = list[MessageOrChoice]
Tools: TypeAlias = list[Tool]


def _as_number(value: Any) -> float | int | bool:
    """What `float()` takes as one number, as Python's own: a scalar of numpy or torch, a fraction, a decimal."""
    try:
        number = float(value)
    except Exception as error:
        raise ValueError(f"{reprlib.repr(value)} is not one number") from error
    return value if isinstance(value, bool) else int(value) if isinstance(value, Integral) else number


def _as_scalar(value: Any) -> MetadataValue:
    return value if value is None or isinstance(value, str) else _as_number(value)


Number: TypeAlias = Annotated[float | int | bool, BeforeValidator(_as_number)]
MetadataValue: TypeAlias = Annotated[float | int | str | bool | None, BeforeValidator(_as_scalar)]


def is_choice(item: object) -> bool:
    """True for a sampled choice of the openai package, False for a message dictionary."""
    return not isinstance(item, dict)


def message_of(item: MessageOrChoice) -> Message:
    """The message dictionary that goes into the next request; a choice's absent content becomes an empty string."""
    if isinstance(item, dict):
        return item
    message = item.message.model_dump(exclude_none=True, exclude={"audio", "function_call", "annotations", "refusal"})
    message.setdefault("content", "")
    if message["content"] is None:
        message["content"] = ""
    return cast("Message", message)


def _read_item(item: Any) -> Any:
    if not isinstance(item, dict):
        if not hasattr(item, "message"):
            raise ValueError(
                "a trajectory holds message dictionaries and the choices of a chat completion, not"
                f" {type(item).__name__}; append `chat_completion.choices[0]`"
            )
        return item
    if "finish_reason" in item and "message" in item:
        from openai.types.chat.chat_completion import Choice

        try:
            return Choice.model_validate(item)
        except ValidationError:
            # An engine may have finish reasons of its own; the openai client takes them in, so they must come back.
            if not isinstance(item["message"], dict):
                raise
            return Choice.construct(**item)
    if "role" not in item:
        raise ValueError(f"a message needs a 'role'; got a dictionary with the keys {sorted(item)}")
    return item


def _write_item(item: Any) -> Any:
    # Mode "json" would turn a NaN or an infinity in a choice's extra fields into null.
    return item if isinstance(item, dict) else item.model_dump(mode="python", warnings=False)


class History(BaseModel):
    """One conversation: an agent that runs several, or rewrites its own, has additional ones beside the first."""

    model_config = ConfigDict(extra="forbid", defer_build=True, ser_json_inf_nan="constants", validate_assignment=True)

    messages_and_choices: MessagesAndChoices = Field(default_factory=list)
    tools: Tools | None = None

    @field_validator("messages_and_choices", mode="before")
    @classmethod
    def _read_items(cls, items: Any) -> Any:
        if not isinstance(items, Sequence) or isinstance(items, str):
            raise ValueError(f"expected a list of messages and choices, not {type(items).__name__}")
        return [_read_item(item) for item in items]

    @field_serializer("messages_and_choices", mode="wrap")
    def _write_items(self, items: MessagesAndChoices, _: SerializerFunctionWrapHandler) -> list[Any]:
        return [_write_item(item) for item in items]

    def messages(self) -> Messages:
        """The conversation as request messages, each choice as its assistant message."""
        return [message_of(item) for item in self.messages_and_choices]

    def choices(self) -> list[Choice]:
        """The sampled choices, in order."""
        return [cast("Choice", item) for item in self.messages_and_choices if is_choice(item)]


class Trajectory(History):
    """One attempt at a scenario.

    `reward` is a finite number. `initial_policy_version` and `final_policy_version` are the steps that answered its
    first and its last request. `metrics` are numbers (averaged in the trackers), `metadata` scalars (kept as they are).
    """

    additional_histories: list[History] = Field(default_factory=list)
    reward: Annotated[float, BeforeValidator(_as_number)] = 0.0
    initial_policy_version: int | None = None
    final_policy_version: int | None = None
    metrics: dict[str, Number] = Field(default_factory=dict)
    metadata: dict[str, MetadataValue] = Field(default_factory=dict)
    logs: list[str] = Field(default_factory=list)
    start_time: datetime = Field(default_factory=lambda: datetime.now(UTC))

    def log(self, message: str) -> None:
        """Keep a line with this trajectory."""
        self.logs.append(message)

    def finish(self) -> Trajectory:
        """Set `metrics["duration"]`, in seconds since the start."""
        self.metrics["duration"] = (datetime.now(UTC) - self.start_time).total_seconds()
        return self

    @contextmanager
    def track_duration(self, name: str) -> Generator[None]:
        """Add the seconds spent in the block to `metrics["{name}_duration"]`."""
        start = time.monotonic()
        try:
            yield
        finally:
            metric = f"{name}_duration"
            self.metrics[metric] = self.metrics.get(metric, 0.0) + time.monotonic() - start

    def histories(self) -> list[History]:
        """This trajectory's own conversation and its additional ones; each is trained on as a row of its own."""
        return [self, *self.additional_histories]

    def policy_versions(self) -> set[int]:
        """The steps that sampled this trajectory's tokens, read from its choices."""
        versions = (getattr(choice, "policy_version", None) for h in self.histories() for choice in h.choices())
        return {version for version in versions if isinstance(version, int)}

    def stamp_policy_versions(self) -> Trajectory:
        """Set the policy versions that are still None from the choices; a version only ever grows."""
        if (self.initial_policy_version is None or self.final_policy_version is None) and (
            versions := self.policy_versions()
        ):
            if self.initial_policy_version is None:
                self.initial_policy_version = min(versions)
            if self.final_policy_version is None:
                self.final_policy_version = max(versions)
        return self

    def for_logging(self) -> dict[str, Any]:
        """Everything, as values that can be written as JSON; `Trajectory.model_validate` reads it back."""
        return self.model_dump(mode="json")

    def __str__(self) -> str:
        return f"Trajectory(reward={self.reward}, {len(self.messages_and_choices)} messages, metrics={self.metrics})"


class RolloutError(BaseModel):
    """An exception that ended a rollout, kept as text so that it survives being written down."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    type: str
    message: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException) -> RolloutError:
        """Keep the type's name, the message and the traceback."""
        # As str() gives it, and in words where str() itself raises.
        message = str(traceback.TracebackException(type(error), error, None))
        return cls(type=type(error).__name__, message=message, traceback="".join(traceback.format_exception(error)))

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


def _read_exception(error: Any) -> Any:
    return RolloutError.of(error) if isinstance(error, BaseException) else error


class _GroupFields(TypedDict, total=False):
    exceptions: Iterable[BaseException | RolloutError]
    metadata: dict[str, MetadataValue] | None
    metrics: dict[str, Number] | None
    logs: list[str] | None


class TrajectoryGroup(BaseModel):
    """Attempts at one scenario, whose rewards are compared with each other.

    Given trajectories, the constructor gives a group. Given awaitables, it gives an awaitable of a group, which
    `art.gather_trajectory_groups` runs; an awaitable that raises becomes one of `exceptions`.
    """

    model_config = ConfigDict(extra="forbid", defer_build=True, ser_json_inf_nan="constants", validate_assignment=True)

    trajectories: list[Trajectory] = Field(default_factory=list)
    exceptions: list[RolloutError] = Field(default_factory=list)
    metadata: dict[str, MetadataValue] = Field(default_factory=dict)
    metrics: dict[str, Number] = Field(default_factory=dict)
    logs: list[str] = Field(default_factory=list)

    if TYPE_CHECKING:

        @overload
        def __new__(
            cls, trajectories: Iterable[Trajectory | BaseException] = ..., **fields: Unpack[_GroupFields]
        ) -> TrajectoryGroup: ...
        @overload
        def __new__(  # type: ignore[misc]
            cls, trajectories: Iterable[Awaitable[Trajectory]], **fields: Unpack[_GroupFields]
        ) -> PendingTrajectoryGroup: ...
        def __new__(cls, trajectories: Any = (), **fields: Any) -> Any: ...
        def __init__(self, trajectories: Any = (), **fields: Any) -> None: ...

    else:

        def __new__(cls, trajectories: Any = (), **fields: Any) -> Any:
            items = list(trajectories)
            if any(isinstance(item, Awaitable) for item in items):
                return pending_group(items, **fields)
            group = super().__new__(cls)
            # The iterable may be a generator, which __init__ would find empty.
            object.__setattr__(group, "_given", items)
            return group

        def __init__(self, trajectories: Any = (), **fields: Any) -> None:
            items = self.__dict__.pop("_given", None)
            items = list(trajectories) if items is None else items
            failures = [_read_exception(item) for item in items if isinstance(item, BaseException)]
            failures += [_read_exception(error) for error in fields.pop("exceptions", None) or ()]
            given = {name: value for name, value in fields.items() if value is not None}
            super().__init__(
                trajectories=[item for item in items if not isinstance(item, BaseException)],
                exceptions=failures,
                **given,
            )

    def __iter__(self) -> Iterator[Trajectory]:  # type: ignore[override]
        return iter(self.trajectories)

    def __len__(self) -> int:
        return len(self.trajectories)

    def __getitem__(self, index: int) -> Trajectory:
        return self.trajectories[index]

    def log(self, message: str) -> None:
        """Keep a line with this group."""
        self.logs.append(message)

    def for_logging(self) -> dict[str, Any]:
        """Everything, as values that can be written as JSON; `TrajectoryGroup.model_validate` reads it back."""
        return self.model_dump(mode="json")


def pending_group(attempts: Iterable[Any], **fields: Any) -> PendingTrajectoryGroup:
    """Attempts that have not been run; `fields` are the finished group's metadata, metrics and logs."""
    return PendingTrajectoryGroup(
        list(attempts), read=read_attempt, group_of=lambda results: TrajectoryGroup(results, **fields)
    )


def read_attempt(result: Any) -> Trajectory | BaseException:
    """The trajectory that an attempt gave, stamped, or why it gave none that can be learnt from."""
    if isinstance(result, Trajectory):
        problems = unsound_values(result)
        return InvalidTrajectory(problems[0][2]) if problems else result.stamp_policy_versions()
    if isinstance(result, BaseException):
        return result
    return TypeError(f"a rollout must return a Trajectory, not {type(result).__name__}")


def unsound_values(item: Trajectory | TrajectoryGroup) -> list[tuple[str, Any, str]]:
    """Make Python's own numbers of what was set inside `metrics` and `metadata`, where nothing checks it.

    Gives the field, the name in it and what is wrong of each value that can't be kept, and of a reward that isn't
    finite.
    """
    problems: list[tuple[str, Any, str]] = []
    for field, read in (("metrics", _as_number), ("metadata", _as_scalar)):
        values = getattr(item, field)
        for name, value in values.items():
            try:
                values[name] = read(value)
            except ValueError as error:
                problems.append((field, name, f"{field}[{name!r}] cannot be kept: {error}"))
    if isinstance(item, Trajectory) and not math.isfinite(item.reward):
        wrong = f"reward is {item.reward}: a reward must be a finite number, since every advantage of its group is"
        problems.append(("reward", None, f"{wrong} computed from it. Set it, or drop the trajectory."))
    return problems


def check_groups(groups: Sequence[TrajectoryGroup]) -> None:
    """Raise InvalidTrajectory for what no training can mend, naming it by position.

    An empty group and a group whose rewards are all equal are not errors: they hold nothing to train on and are
    counted.
    """
    for g, group in enumerate(groups):
        if isinstance(group, PendingTrajectoryGroup):
            raise InvalidTrajectory(
                f"trajectory_groups[{g}] is still pending; await it, or await art.gather_trajectory_groups([...])."
            )
        if not isinstance(group, TrajectoryGroup):
            raise InvalidTrajectory(
                f"trajectory_groups[{g}] is a {type(group).__name__}, not a TrajectoryGroup;"
                " wrap it as art.TrajectoryGroup([...])."
            )
        for _, _, problem in unsound_values(group):
            raise InvalidTrajectory(f"trajectory_groups[{g}].{problem}")
        for t, trajectory in enumerate(group):
            for _, _, problem in unsound_values(trajectory):
                raise InvalidTrajectory(f"trajectory_groups[{g}].trajectories[{t}].{problem}")
            for history in trajectory.histories():
                for i, item in enumerate(history.messages_and_choices):
                    try:
                        _read_item(item)  # a list takes anything that is appended to it
                    except ValueError as error:
                        raise InvalidTrajectory(
                            f"trajectory_groups[{g}].trajectories[{t}]: item {i} cannot be used: {error}"
                        ) from error
