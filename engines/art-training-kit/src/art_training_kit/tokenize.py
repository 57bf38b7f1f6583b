"""From trajectory groups to token rows, with every sampled token exactly as it was sampled.

A choice carries its prompt's ids, its own ids and their logprobs; nothing is tokenized again. A choice whose prompt
begins with all of an earlier row continues that row, so a conversation is one row; where the template wrote the past
differently, the choice begins a row of its own. Either way each sampled token is in exactly one row's `trained`.
Knows rewards only through `advantages`, and neither packing nor models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from art_core.errors import InvalidTrajectory
from art_core.trajectories import History, Trajectory, TrajectoryGroup, check_groups

from .advantages import group_advantages
from .chat_template import ChatTemplate
from .rows import TokenizedStep, TokenRow

_NAN = math.nan


@dataclass(slots=True)
class _Draft:
    """A row being put together: ids, and (start, logprobs) of each sampled span."""

    ids: list[int]
    spans: list[tuple[int, list[float]]] = field(default_factory=list)


def tokenize_groups(
    groups: Sequence[TrajectoryGroup],
    *,
    vocabulary_size: int,
    max_length: int,
    scale_rewards: bool = True,
    without_logprobs: ChatTemplate | None = None,
) -> TokenizedStep:
    """Tokenize a step's groups. Rows longer than `max_length` tokens are left out with their whole trajectory, and
    counted.

    `without_logprobs` is what a choice without ids goes through where that is allowed; None refuses it. Raises
    InvalidTrajectory, naming group, trajectory and choice, for rewards that are not finite and for tokens that cannot
    be trained on.
    """
    check_groups(groups)
    rows: list[TokenRow] = []
    advantages: list[float] = []
    trained_tokens: list[int] = []
    unequal = zero = no_choice = too_long = exceptions = total = 0
    for g, group in enumerate(groups):
        exceptions += len(group.exceptions)
        total += len(group)
        rewards = np.array([trajectory.reward for trajectory in group], dtype=np.float64)
        unequal += bool(len(rewards) and rewards.min() != rewards.max())
        for t, advantage in enumerate(group_advantages(rewards, scale=scale_rewards).tolist()):
            if advantage == 0.0:
                zero += 1
                continue
            drafts = list(_drafts(group[t], f"trajectory_groups[{g}].trajectories[{t}]", without_logprobs))
            if not drafts:
                no_choice += 1
                continue
            if max(len(draft.ids) for draft in drafts) > max_length:
                too_long += 1
                continue
            made = [
                _row(draft, len(advantages), vocabulary_size, f"trajectory_groups[{g}].trajectories[{t}]")
                for draft in drafts
            ]
            rows.extend(made)
            advantages.append(advantage)
            trained_tokens.append(sum(len(row.trained) for row in made))
    metrics = {
        "data/step_num_scenarios": float(len(groups)),
        "data/step_num_groups_submitted": float(len(groups)),
        "data/step_num_groups_trainable": float(unequal),
        "data/step_num_trajectories": float(total + exceptions),
        "data/step_num_trajectories_trained": float(len(advantages)),
        "data/step_num_trajectories_zero_advantage": float(zero),
        "data/step_num_trajectories_without_choice": float(no_choice),
        "data/step_num_trajectories_too_long": float(too_long),
    }
    return TokenizedStep(rows, np.array(advantages), np.array(trained_tokens, dtype=np.int64), metrics)


def _drafts(trajectory: Trajectory, where: str, template: ChatTemplate | None) -> Iterator[_Draft]:
    for h, history in enumerate(trajectory.histories()):
        name = where if h == 0 else f"{where}.additional_histories[{h - 1}]"
        drafts: list[_Draft] = []
        for index, item in enumerate(history.messages_and_choices):
            sampled = _sampled(history, index, item, f"{name}.messages_and_choices[{index}]", template)
            if sampled is None:
                continue
            prompt, ids, logprobs = sampled
            draft = next((d for d in reversed(drafts) if prompt[: len(d.ids)] == d.ids), None)
            if draft is None:
                draft = _Draft([])
                drafts.append(draft)
            draft.ids = prompt + ids
            draft.spans.append((len(prompt), logprobs))
        yield from drafts


def _sampled(
    history: History, index: int, item: Any, where: str, template: ChatTemplate | None
) -> tuple[list[int], list[int], list[float]] | None:
    """Prompt ids, sampled ids and their logprobs; None for what nothing was sampled in."""
    if not _is_choice(item):
        if template is None or item["role"] != "assistant":
            return None
        said = template.sampled(history, index, where=where)
        return (*said, [_NAN] * len(said[1])) if said[1] else None
    ids: list[int] | None = _field(item, "token_ids")
    prompt: list[int] | None = _field(item, "prompt_token_ids")
    if ids is None or prompt is None:
        if template is None:
            missing = "token_ids" if ids is None else "prompt_token_ids"
            raise InvalidTrajectory(
                f"{where} carries no token ids ({missing} is missing), so it is not known what was sampled. Use"
                " model.openai_client(), whose gateway adds them, or pass allow_training_without_logprobs=True."
            )
        prompt, ids = template.sampled(history, index, where=where)
    if not ids:
        return None
    if not prompt:
        raise InvalidTrajectory(
            f"{where} has an empty prompt: its first token was sampled after nothing, which no policy can train on."
        )
    logprobs = _field(item, "logprobs")
    content = logprobs and (_field(logprobs, "content") or _field(logprobs, "refusal"))
    if not content:
        if template is None:
            raise InvalidTrajectory(
                f"{where} carries no logprobs of its {len(ids)} sampled tokens, so the importance ratio is unknown. Use"
                " model.openai_client(), whose gateway asks for them, or pass allow_training_without_logprobs=True."
            )
        return prompt, ids, [_NAN] * len(ids)
    if len(content) != len(ids):
        raise InvalidTrajectory(
            f"{where} has {len(ids)} sampled token ids and {len(content)} logprobs; they must be one for one."
        )
    values = [token["logprob"] for token in content] if isinstance(content[0], dict) else [t.logprob for t in content]
    if template is None and any(value is None or value != value for value in values):
        raise InvalidTrajectory(f"{where} has a logprob that is not a number; the engine's answer is damaged.")
    return prompt, ids, values


def _is_choice(item: Any) -> bool:
    """A choice of the openai package, or one as it stands in a file: reading all back as objects takes seconds."""
    return not isinstance(item, dict) or ("finish_reason" in item and "message" in item)


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, dict) else getattr(item, name, None)


def _row(draft: _Draft, trajectory: int, vocabulary_size: int, where: str) -> TokenRow:
    ids = np.array(draft.ids, dtype=np.int32)
    if int(ids.max()) >= vocabulary_size or int(ids.min()) < 0:
        raise InvalidTrajectory(
            f"{where} holds a token id outside the base model's vocabulary of {vocabulary_size}: it was sampled by"
            " another model."
        )
    logprobs = np.concatenate([np.array(values, dtype=np.float32) for _, values in draft.spans])
    if np.isinf(logprobs).any() or (logprobs > 1e-3).any():
        raise InvalidTrajectory(f"{where} holds a logprob that is infinite or above 0; the engine's answer is damaged.")
    trained = np.concatenate([np.arange(start, start + len(values), dtype=np.int32) for start, values in draft.spans])
    return TokenRow(ids, trained, logprobs, trajectory)
