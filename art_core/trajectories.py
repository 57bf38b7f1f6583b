"""What an attempt is: messages and sampled choices, a reward, and what was measured on the way.

Knows the shapes of a trajectory and how one is written down and read back without losing anything. Knows nothing of
tokens being trained, of backends or of engines. The openai package is imported only when a choice has to be read back.
"""

from __future__ import annotations

import json
import reprlib
import time
import traceback
from collections.abc import Awaitable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypedDict, Unpack, cast, overload

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_serializer, field_validator
from pydantic_core import to_jsonable_python

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


# An advantage takes the squares of rewards, for which those of larger ones leave a float no room.
LARGEST_REWARD = 1e150


def as_number(value: Any, kind: str = "one number") -> float | int | bool:
    """What `float()` takes as one number, as Python's own: a scalar of numpy or torch, a decimal, a text like "0.5"."""
    try:
        one = value.item() if hasattr(value, "item") else value
        number = float(one)
    except OverflowError as error:
        raise ValueError("it is larger than any float") from error
    except Exception as error:
        raise ValueError(f"{reprlib.repr(value)} is not {kind}") from error
    return one if isinstance(one, bool) else int(one) if isinstance(one, Integral) else number


def _as_scalar(value: Any) -> MetadataValue:
    return value if value is None or isinstance(value, str) else as_number(value, "text, one number or None")


def as_json(value: Any) -> Any:
    """A value as those that JSON has, foreign numbers included. Raises TypeError or ValueError for what has no form."""
    plain = partial(to_jsonable_python, fallback=partial(as_number, kind="a value that JSON has a form for"))
    try:
        return plain(value)
    except UnicodeEncodeError:  # a name that holds a lone surrogate
        return json.loads(json.dumps(value, default=lambda v: v.model_dump() if isinstance(v, BaseModel) else plain(v)))


Number: TypeAlias = Annotated[float | int | bool, BeforeValidator(as_number)]
MetadataValue: TypeAlias = Annotated[float | int | str | bool | None, BeforeValidator(_as_scalar)]


def is_choice(item: object) -> bool:
    """True for a sampled choice of the openai package, False for a message dictionary."""
    return not isinstance(item, dict)


def message_of(item: MessageOrChoice) -> Message:
    """The message dictionary that goes into the next request; a choice's absent content becomes an empty string."""
    if isinstance(item, dict):
        return item
    message = item.message.model_dump(exclude_none=True, exclude={"audio", "function_call", "annotations", "refusal"})
    return cast("Message", {"content": "", **message})


def _read_item(item: Any) -> Any:
    if not isinstance(item, dict):
        if not (hasattr(item, "message") and hasattr(item, "model_dump")):
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
        raise ValueError(f"a message needs a 'role'; got a dictionary with the keys {reprlib.repr(list(item))}")
    return item


def _write_item(item: Any) -> Any:
    # Mode "json" would turn a NaN or an infinity in a choice's extra fields into null.
    return item if isinstance(item, dict) else item.model_dump(mode="python", warnings=False)


_AS_MADE = ConfigDict(extra="forbid", defer_build=True, ser_json_inf_nan="constants", validate_assignment=True)


class _Measured(BaseModel):
    """What was measured on the way, and the lines that were kept with it."""

    model_config = _AS_MADE

    metrics: dict[str, Number] = Field(default_factory=dict)
    metadata: dict[str, MetadataValue] = Field(default_factory=dict)
    logs: list[str] = Field(default_factory=list)

    @field_serializer("metrics", "metadata")
    def _write_values(self, values: dict[str, Any]) -> Any:
        return values  # pydantic itself would change names that hold a lone surrogate

    def log(self, message: str) -> None:
        """Keep a line with it."""
        self.logs.append(message)

    def for_logging(self) -> dict[str, Any]:
        """Everything, as values that can be written as JSON; `model_validate` of the same class reads it back."""
        return cast("dict[str, Any]", as_json(self))


class History(BaseModel):
    """One conversation: an agent that runs several, or rewrites its own, has additional ones beside the first."""

    model_config = _AS_MADE

    messages_and_choices: MessagesAndChoices = Field(default_factory=list)
    tools: Tools | None = None

    @field_validator("messages_and_choices", mode="before")
    @classmethod
    def _read_items(cls, items: Any) -> Any:
        if not isinstance(items, Sequence) or isinstance(items, str):
            raise ValueError(f"expected a list of messages and choices, not {type(items).__name__}")
        return [_read_item(item) for item in items]

    @field_serializer("messages_and_choices")
    def _write_items(self, items: MessagesAndChoices) -> list[Any]:
        return [_write_item(item) for item in items]

    def messages(self) -> Messages:
        """The conversation as request messages, each choice as its assistant message.

        Raises InvalidTrajectory for an item that is neither, as a list takes whatever is appended to it.
        """
        for _, problem in unsound_items(self):
            raise InvalidTrajectory(problem)
        return [message_of(item) for item in self.messages_and_choices]

    def choices(self) -> list[Choice]:
        """The sampled choices, in order."""
        return [cast("Choice", item) for item in self.messages_and_choices if is_choice(item)]


class Trajectory(History, _Measured):
    """One attempt at a scenario.

    `reward` is a finite number, at most 1e150 in size. `initial_policy_version` and `final_policy_version` are the
    steps that answered its first and its last request. `metrics` are numbers (averaged in the trackers), `metadata`
    scalars (kept as they are). A number is whatever `float()` takes as one: also a scalar of numpy or torch, or "0.5".
    """

    additional_histories: list[History] = Field(default_factory=list)
    reward: Annotated[float, BeforeValidator(as_number)] = 0.0
    initial_policy_version: int | None = None
    final_policy_version: int | None = None
    start_time: datetime = Field(default_factory=lambda: datetime.now(UTC))

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
        choices = (choice for history in self.histories() for choice in history.choices())
        return {version for c in choices if isinstance(version := getattr(c, "policy_version", None), int)}

    def stamp_policy_versions(self) -> Trajectory:
        """Set the policy versions that are still None from the choices; a version only ever grows."""
        versions = self.policy_versions()
        for field, of in (("initial_policy_version", min), ("final_policy_version", max)):
            if versions and getattr(self, field) is None:
                setattr(self, field, of(versions))
        return self

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


class TrajectoryGroup(_Measured):
    """Attempts at one scenario, whose rewards are compared with each other.

    Given trajectories, the constructor gives a group. Given awaitables, it gives an awaitable of a group, which
    `art.gather_trajectory_groups` runs; an awaitable that raises becomes one of `exceptions`.
    """

    trajectories: list[Trajectory] = Field(default_factory=list)
    exceptions: list[Annotated[RolloutError, BeforeValidator(_read_exception)]] = Field(default_factory=list)

    @overload
    def __new__(
        cls, trajectories: Iterable[Trajectory | BaseException] = ..., **fields: Unpack[_GroupFields]
    ) -> TrajectoryGroup: ...
    @overload
    def __new__(  # type: ignore[misc]
        cls, trajectories: Iterable[Awaitable[Trajectory]], **fields: Unpack[_GroupFields]
    ) -> PendingTrajectoryGroup: ...
    def __new__(cls, trajectories: Any = (), **fields: Any) -> Any:
        items = list(trajectories)
        if any(isinstance(item, Awaitable) for item in items):
            return pending_group(items, **fields)
        group = super().__new__(cls)
        # The iterable may be a generator, which __init__ would find empty.
        object.__setattr__(group, "_given", items)
        return group

    def __init__(self, trajectories: Any = (), **fields: Any) -> None:
        items = self.__dict__.pop("_given", None) or list(trajectories)
        failures = [item for item in items if isinstance(item, BaseException)]
        given = {name: value for name, value in fields.items() if value is not None}
        given["exceptions"] = [*failures, *given.get("exceptions", ())]
        super().__init__(trajectories=[i for i in items if not isinstance(i, BaseException)], **given)

    def __iter__(self) -> Iterator[Trajectory]:  # type: ignore[override]
        return iter(self.trajectories)

    def __len__(self) -> int:
        return len(self.trajectories)

    def __getitem__(self, index: int) -> Trajectory:
        return self.trajectories[index]


def pending_group(attempts: Iterable[Any], **fields: Any) -> PendingTrajectoryGroup:
    """Attempts that have not been run; `fields` are the finished group's metadata, metrics and logs.

    What is wrong with these is said now, not when the attempts have been paid for.
    """
    TrajectoryGroup([], **fields)
    return PendingTrajectoryGroup(list(attempts), read=read_attempt, group_of=partial(TrajectoryGroup, **fields))


def read_attempt(result: Any) -> Trajectory | BaseException:
    """The trajectory that an attempt gave, stamped, or why it gave none that can be learnt from."""
    if isinstance(result, Trajectory):
        problems = [problem for _, _, problem in unsound_values(result)]
        return InvalidTrajectory("; ".join(problems)) if problems else result.stamp_policy_versions()
    if isinstance(result, BaseException):
        return result
    return TypeError(f"a rollout must return a Trajectory, not {type(result).__name__}")


def unsound_items(history: History, where: str = "") -> Iterator[tuple[int, str]]:
    """Make choices of what was appended as a choice's dictionary; gives number and problem of each item that is neither
    a message nor a choice, or that JSON has no form for.
    """
    items = history.messages_and_choices
    for i, item in enumerate(items):
        try:
            items[i] = _read_item(item)
            if isinstance(items[i], dict):
                as_json(items[i])
        except Exception as error:
            yield i, f"{where}item {i} cannot be used: {error}"


def unsound_values(item: Trajectory | TrajectoryGroup, where: str = "trajectory") -> list[tuple[str, Any, str]]:
    """Make Python's own of what was set inside a trajectory or a group, where nothing checks it.

    Gives the field, the name or number in it, and the problem of each value that can't be kept, of a reward that can't
    be learnt from, and of each unsound item, numbered by history and item. `where` is the place that problems name.
    """
    if not isinstance(item, _Measured):
        return [("", None, f"{where} is a {type(item).__name__}, not a Trajectory")]
    problems: list[tuple[str, Any, str]] = []
    for part, read in (("metrics", as_number), ("metadata", _as_scalar), ("logs", str)):
        values = getattr(item, part)
        for name, value in enumerate(values) if isinstance(values, list) else values.items():
            try:
                values[name] = read(value)
                if isinstance(values, dict) and not isinstance(name, str):
                    raise ValueError("its name is no text")
            except Exception as e:
                problems.append((part, name, f"{where}.{part}[{name!r}] cannot be kept: {str(e) or type(e).__name__}"))
    if isinstance(item, TrajectoryGroup):
        item.exceptions[:] = map(_read_exception, item.exceptions)
        return problems
    if not abs(item.reward) <= LARGEST_REWARD:
        wrong = f"{where}.reward is {item.reward}: a reward must be a finite number of at most {LARGEST_REWARD},"
        why = " since every advantage of its group is computed from it. Set it, or drop the trajectory."
        problems.append(("reward", None, wrong + why))
    for h, history in enumerate(item.histories()):
        place = f"{where}: additional_histories[{h - 1}], " if h else f"{where}: "
        problems += [("messages_and_choices", (h, i), problem) for i, problem in unsound_items(history, place)]
    return problems


def check_groups(groups: Sequence[TrajectoryGroup]) -> None:
    """Raise InvalidTrajectory for what no training can mend, naming each by position.

    An empty group and a group whose rewards are all equal are not errors: they hold nothing to train on and are
    counted.
    """
    problems: list[str] = []
    for g, group in enumerate(groups):
        where = f"trajectory_groups[{g}]"
        if not isinstance(group, TrajectoryGroup):
            what = f"a {type(group).__name__}, not a TrajectoryGroup; wrap it as art.TrajectoryGroup([...])."
            if isinstance(group, PendingTrajectoryGroup):
                what = "still pending; await it, or await art.gather_trajectory_groups([...])."
            raise InvalidTrajectory(f"{where} is {what}")
        problems += [problem for _, _, problem in unsound_values(group, where)]
        for t, trajectory in enumerate(group):
            problems += [problem for _, _, problem in unsound_values(trajectory, f"{where}.trajectories[{t}]")]
    refuse(problems)


def refuse(problems: Sequence[str]) -> None:
    """Raise an InvalidTrajectory that names these problems, if there are any."""
    if len(problems) > 1:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        todo = "Mend them, or drop their trajectories: art.gather_trajectory_groups(groups, max_exceptions=...) does."
        problems = [f"{len(problems)} values cannot be trained on:", *problems[:20], *more, todo]
    if problems:
        raise InvalidTrajectory("\n".join(problems))
