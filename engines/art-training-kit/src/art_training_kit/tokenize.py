"""From the records of trajectory groups to token rows, with every sampled token exactly as it was sampled.

A choice carries its prompt's ids, its own ids and their logprobs, and the records have put them into rows already;
nothing is tokenized again. Each sampled token is in exactly one row's `trained`. Knows rewards only through
`advantages`, and neither packing nor models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from art_core.errors import InvalidTrajectory
from art_core.trajectories import LARGEST_REWARD, refuse
from art_engine_kit.altered_sampling import ALTERED
from art_engine_kit.group_records import (
    LOGPROB,
    NO_LOGPROBS,
    TOKEN_ID,
    GroupRecord,
    HistoryRecord,
    Sample,
    SampledRow,
    SampledSpan,
    TrajectoryRecord,
    UnreadChoice,
    join_rows,
    logprobs_of,
    samples_of,
)
from art_engine_kit.split_histories import SEVERAL_TURNS, SPLIT

from .advantages import differ, group_advantages
from .chat_template import ChatTemplate
from .rows import TokenizedStep, TokenRow

_MOST = 1e-3  # above 0 by no more than rounding


def tokenize_groups(
    groups: Iterable[GroupRecord],
    *,
    vocabulary_size: int,
    max_length: int,
    scale_rewards: bool = True,
    without_logprobs: ChatTemplate | None = None,
    refuse_altered: bool = False,
) -> TokenizedStep:
    """Tokenize a step's groups, one at a time. Rows longer than `max_length` tokens are left out with their whole
    trajectory, and counted.

    `without_logprobs` is what a choice without ids goes through where that is allowed; None refuses it.
    `refuse_altered` refuses choices that weren't drawn from the policy's own probabilities. Raises InvalidTrajectory,
    naming group, trajectory and choice of each, for what is refused, for rewards that are not finite and for tokens
    that cannot be trained on.
    """
    rows: list[TokenRow] = []
    advantages: list[float] = []
    trained_tokens: list[int] = []
    lengths: list[int] = []
    problems: list[str] = []
    submitted = unequal = zero = no_choice = too_long = exceptions = total = several_turns = split = altered = 0
    for g, group in enumerate(groups):
        submitted += 1
        exceptions += group.exceptions
        total += len(group.trajectories)
        rewards = np.array([trajectory.reward for trajectory in group.trajectories], dtype=np.float64)
        unsound = _unsound_rewards(rewards, f"trajectory_groups[{g}]")
        if unsound:
            problems += unsound
            continue
        unequal += differ(rewards)
        for t, advantage in enumerate(group_advantages(rewards, scale=scale_rewards).tolist()):
            if advantage == 0.0:
                zero += 1
                continue
            where = f"trajectory_groups[{g}].trajectories[{t}]"
            try:
                if refuse_altered:
                    _refuse_altered(group.trajectories[t], where)
                sampled = list(_sampled_rows(group.trajectories[t], where, without_logprobs))
                if not sampled:
                    no_choice += 1
                    continue
                lengths.append(max(len(row.token_ids) for _, row in sampled))
                if lengths[-1] > max_length:
                    too_long += 1
                    continue
                made = [
                    _row(row, len(advantages), vocabulary_size, name, logprobs_needed=without_logprobs is None)
                    for name, row in sampled
                ]
            except InvalidTrajectory as error:
                problems.append(str(error))
                continue
            rows.extend(made)
            altered += sum(len(history.altered) for history in group.trajectories[t].histories)
            turns = _turns_of_each_row(sampled)
            several_turns += sum(sum(of_rows) > 1 for of_rows in turns)
            split += sum(len(of_rows) > 1 for of_rows in turns)
            advantages.append(advantage)
            trained_tokens.append(sum(len(row.trained) for row in made))
    refuse(problems)
    metrics = {
        "data/step_num_scenarios": float(submitted),
        "data/step_num_groups_submitted": float(submitted),
        "data/step_num_groups_trainable": float(unequal),
        "data/step_num_trajectories": float(total + exceptions),
        "data/step_num_trajectories_trained": float(len(advantages)),
        "data/step_num_trajectories_zero_advantage": float(zero),
        "data/step_num_trajectories_without_choice": float(no_choice),
        "data/step_num_trajectories_too_long": float(too_long),
        SEVERAL_TURNS: float(several_turns),
        SPLIT: float(split),
        ALTERED: float(altered),
    }
    return TokenizedStep(rows, np.array(advantages), np.array(trained_tokens, dtype=np.int64), metrics, lengths)


def _unsound_rewards(rewards: npt.NDArray[np.float64], where: str) -> list[str]:
    return [
        f"{where}.trajectories[{t}].reward is {rewards[t]}: a reward must be a finite number of at most"
        f" {LARGEST_REWARD}, since every advantage of its group is computed from it. Set it, or drop the trajectory."
        for t in np.flatnonzero(~(np.abs(rewards) <= LARGEST_REWARD))
    ]


def _sampled_rows(
    trajectory: TrajectoryRecord, where: str, template: ChatTemplate | None
) -> Iterator[tuple[str, SampledRow]]:
    """The rows of a trajectory, each with the name of its history."""
    for h, history in enumerate(trajectory.histories):
        name = where if h == 0 else f"{where}.additional_histories[{h - 1}]"
        for choice in history.unread:
            _refuse_unread(choice, name, template)
        for row in history.rows if template is None else _rows_by_template(history, name, template):
            yield name, row


def _refuse_altered(trajectory: TrajectoryRecord, where: str) -> None:
    for h, history in enumerate(trajectory.histories):
        for choice in history.altered:
            name = where if h == 0 else f"{where}.additional_histories[{h - 1}]"
            raise InvalidTrajectory(
                f"{name}.messages_and_choices[{choice.item}] was drawn with {choice.by}, so from other probabilities"
                " than its logprobs tell, and altered_sampling is 'refuse'. Sample with temperature=1 and no filter,"
                " penalty or structure, or train on it as it is with altered_sampling='train'."
            )


def _turns_of_each_row(sampled: Iterable[tuple[str, SampledRow]]) -> list[list[int]]:
    """For each history, by its name, how many sampled turns each of its rows has."""
    turns: dict[str, list[int]] = {}
    for name, row in sampled:
        turns.setdefault(name, []).append(len(row.spans))
    return list(turns.values())


def _refuse_unread(choice: UnreadChoice, name: str, template: ChatTemplate | None) -> None:
    where = f"{name}.messages_and_choices[{choice.item}]"
    if choice.fault:
        raise InvalidTrajectory(f"{where} {choice.fault}; the engine's answer is damaged.")
    if template is None:
        raise InvalidTrajectory(
            f"{where} carries no token ids ({choice.missing} is missing), so it is not known what was sampled. Use"
            " model.openai_client(), whose gateway adds them, or pass allow_training_without_logprobs=True."
        )


def _rows_by_template(history: HistoryRecord, name: str, template: ChatTemplate) -> list[SampledRow]:
    """The rows of a history in which what came without token ids, assistant messages included, is tokenized, and what
    came without logprobs has NaN for them.
    """
    known = {sample.item: sample for row in history.rows for sample in samples_of(row)}
    missing = {choice.item for choice in history.unread}
    whole = history.read()
    samples = []
    for item, said in enumerate(whole.messages_and_choices):
        if item in known:
            sample = known[item]
        elif item in missing or (isinstance(said, dict) and said["role"] == "assistant"):
            prompt, ids = template.sampled(whole, item, where=name)
            sample = Sample.of(item, prompt, ids, logprobs_of(said) if item in missing else None)
        else:
            continue
        if sample.token_ids:
            unknown = np.full(len(sample.token_ids) // TOKEN_ID.itemsize, np.nan, dtype=LOGPROB).tobytes()
            samples.append(sample._replace(logprobs=sample.logprobs or unknown))
    return join_rows(samples)


def _row(row: SampledRow, trajectory: int, vocabulary_size: int, name: str, *, logprobs_needed: bool) -> TokenRow:
    for span in row.spans:
        if span.start == 0 or span.logprobs != span.length:
            _refuse_span(span, f"{name}.messages_and_choices[{span.item}]")
    ids = row.token_ids
    if int(ids.max()) >= vocabulary_size or int(ids.min()) < 0:
        raise InvalidTrajectory(
            f"{name} holds a token id outside the base model's vocabulary of {vocabulary_size}: it was sampled by"
            " another model."
        )
    with np.errstate(over="ignore"):
        logprobs = row.logprobs.astype(np.float32)
    for bad, what in (
        (np.isnan(logprobs) & logprobs_needed, "not a number"),
        (np.isinf(logprobs) | (logprobs > _MOST), "infinite or above 0"),
    ):
        if bad.any():
            where = f"{name}.messages_and_choices[{_choice_of(row, int(bad.argmax()))}]"
            raise InvalidTrajectory(f"{where} has a logprob that is {what}; the engine's answer is damaged.")
    trained = np.concatenate([np.arange(span.start, span.start + span.length, dtype=np.int32) for span in row.spans])
    return TokenRow(ids, trained, logprobs, trajectory)


def _choice_of(row: SampledRow, logprob: int) -> int:
    """The item that has the row's n-th logprob."""
    ends = np.cumsum([span.logprobs for span in row.spans])
    return row.spans[int(np.searchsorted(ends, logprob, side="right"))].item


def _refuse_span(span: SampledSpan, where: str) -> NoReturn:
    if span.start == 0:
        raise InvalidTrajectory(
            f"{where} has an empty prompt: its first token was sampled after nothing, which no policy can train on."
        )
    if span.logprobs == NO_LOGPROBS:
        raise InvalidTrajectory(
            f"{where} carries no logprobs of its {span.length} sampled tokens, so the importance ratio is unknown. Use"
            " model.openai_client(), whose gateway asks for them, or pass allow_training_without_logprobs=True."
        )
    raise InvalidTrajectory(
        f"{where} has {span.length} sampled token ids and {span.logprobs} logprobs; they must be one for one."
    )
