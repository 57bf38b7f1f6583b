"""Trajectories to train on, whose every token and logprob the oracle knows, and the loss that they must give.

The tokens are random, so that nothing depends on a sampler; their old logprobs are those of a policy the caller names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from art_core import Trajectory, TrajectoryGroup

from .oracle import Oracle

PROMPTS: list[list[Any]] = [
    [{"role": "user", "content": "Say something about the city."}],
    [{"role": "system", "content": "Answer with a word."}, {"role": "user", "content": "Is it so? 12"}],
]
REWARDS = (0.0, 1.0, 0.25, 0.5)
CONVERSATIONS = (
    ("Say something about the city.", "It is so."),
    ("Is it so? 12", "The city of the word 12.", "And then?", "A city."),
    ("Answer with a word.", "No, maybe."),
)


def choice(prompt: Sequence[int], ids: Sequence[int], logprobs: Sequence[float], text: str, version: int) -> Any:
    """A sampled choice as the gateway gives it."""
    from openai.types.chat.chat_completion import Choice

    content: list[dict[str, Any]] = [
        {"token": f"token_id:{token}", "bytes": None, "logprob": float(value), "top_logprobs": []}
        for token, value in zip(ids, logprobs, strict=True)
    ]
    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
            "logprobs": {"content": content},
            "token_ids": list(ids),
            "prompt_token_ids": list(prompt),
            "policy_version": version,
        }
    )


def make_groups(
    oracle: Oracle,
    policy: Path | None,
    *,
    tokens: int = 12,
    turns: int = 1,
    seed: int = 0,
    rewards: Sequence[float] = REWARDS,
    text: str | None = None,
    version: int = 0,
    copies: int = 1,
) -> list[TrajectoryGroup]:
    """Groups with one trajectory for each reward; old logprobs are the oracle's for `policy`.

    `turns` sampled answers follow each other in one conversation. `text` replaces what the tokens read as.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(copies):
        for messages in PROMPTS:
            trajectories = [
                _trajectory(oracle, policy, messages, rng, tokens + i, turns, reward, text, version)
                for i, reward in enumerate(rewards)
            ]
            groups.append(TrajectoryGroup(trajectories))
    return groups


def _trajectory(
    oracle: Oracle,
    policy: Path | None,
    messages: list[Any],
    rng: np.random.Generator,
    tokens: int,
    turns: int,
    reward: float,
    text: str | None,
    version: int,
) -> Trajectory:
    items: list[Any] = list(messages)
    prompt = oracle.chat_ids(messages)
    end = list(oracle.tokenizer("<|im_end|>\n", add_special_tokens=False)["input_ids"])
    following = oracle.chat_ids([{"role": "user", "content": "And then?"}])
    for turn in range(turns):
        ids = [int(token) for token in rng.integers(3, 250, tokens)]
        logprobs = oracle.logprobs(prompt, ids, policy).tolist()
        items.append(choice(prompt, ids, logprobs, oracle.text(ids) if text is None else text, version))
        if turn + 1 < turns:
            items.append({"role": "user", "content": "And then?"})
            prompt = [*prompt, *ids, *end, *following]
    return Trajectory(messages_and_choices=items, reward=reward)


def rows_of(trajectory: Trajectory) -> list[tuple[list[int], list[int]]]:
    """Prompt and sampled ids of every choice of a trajectory."""
    return [(list(c.prompt_token_ids), list(c.token_ids)) for c in trajectory.choices()]  # type: ignore[attr-defined]


def sampled_tokens(groups: Sequence[TrajectoryGroup]) -> int:
    """How many tokens were sampled in all."""
    return sum(len(ids) for group in groups for trajectory in group for _, ids in rows_of(trajectory))


def expected_loss(oracle: Oracle, policy: Path | None, groups: Sequence[TrajectoryGroup]) -> float:
    """The CISPO loss of a step taken on policy, in one gradient step.

    A = (r - mean) / (population std + 1e-6); w = 1 / trained tokens of the trajectory, w /= mean(w), A /= mean(|A| w),
    the means over trained tokens; the ratio is 1, so the loss is the mean of -A w log π over trained tokens.
    """
    advantages: list[float] = []
    weights: list[float] = []
    logprobs: list[float] = []
    for group in groups:
        rewards = np.array([trajectory.reward for trajectory in group])
        for trajectory, advantage in zip(group, (rewards - rewards.mean()) / (rewards.std() + 1e-6), strict=True):
            if advantage == 0:
                continue
            said = [v for prompt, ids in rows_of(trajectory) for v in oracle.logprobs(prompt, ids, policy).tolist()]
            advantages += [float(advantage)] * len(said)
            weights += [1 / len(said)] * len(said)
            logprobs += said
    a, w, logp = (_array(values) for values in (advantages, weights, logprobs))
    w /= w.mean()
    a /= np.mean(np.abs(a) * w)
    return float(np.mean(-a * w * logp))


def make_conversations() -> list[TrajectoryGroup]:
    """A group of conversations whose replies nobody sampled; their rewards are nobody's business."""
    return [TrajectoryGroup([Trajectory(messages_and_choices=_said(words), reward=-1.0) for words in CONVERSATIONS])]


def reply_logprobs(oracle: Oracle, policy: Path | None, begin: int = 0, end: int | None = None) -> list[float]:
    """The logprob of every token of every reply in `CONVERSATIONS[begin:end]`, the one that ends its turn included."""
    found: list[float] = []
    for words in CONVERSATIONS[begin:end]:
        messages = _said(words)
        for place in range(1, len(messages), 2):
            reply = messages[place]["content"] + "<|im_end|>"
            ids = list(oracle.tokenizer(reply, add_special_tokens=False)["input_ids"])
            found += oracle.logprobs(oracle.chat_ids(messages[:place]), ids, policy).tolist()
    return found


def _said(words: Sequence[str]) -> list[Any]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(words)]


def gain(oracle: Oracle, before: Path, after: Path, groups: Sequence[TrajectoryGroup]) -> float:
    """How much more the probability of well rewarded tokens rose than that of badly rewarded ones, in nats a token."""
    total, count = 0.0, 0
    for group in groups:
        mean = sum(trajectory.reward for trajectory in group) / len(group)
        for trajectory in group:
            for prompt, ids in rows_of(trajectory):
                change = oracle.logprobs(prompt, ids, after) - oracle.logprobs(prompt, ids, before)
                total += float(np.sign(trajectory.reward - mean) * change.mean())
                count += 1
    return total / count


def shared_tokens(groups: Sequence[TrajectoryGroup]) -> tuple[int, int]:
    """Tokens of all sequences, and the nodes of the tree of their prefixes: what is left when each is computed once."""
    sequences = []
    for group in groups:
        for trajectory in group:
            prompt, ids = rows_of(trajectory)[-1]
            sequences.append((*prompt, *ids))
    nodes = {sequence[:length] for sequence in sequences for length in range(1, len(sequence) + 1)}
    return sum(map(len, sequences)), len(nodes)


def _array(values: list[float]) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)
