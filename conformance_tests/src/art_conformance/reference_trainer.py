"""One step of policy-gradient training as plainly as it can be written: a sequence at a time, one AdamW step.

For tiny models and the reference backend only. Knows tensors and checkpoint folders; knows no backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from art_engine_kit.canary import CANARY, Canary, CanaryPrompt

from .oracle import oracle_for

Row = tuple[list[int], list[int], float]


def train_step(base: Path, start: Path, folder: Path, rows: Sequence[Row], rate: float) -> dict[str, float]:
    """Train the adapter in `start` on (prompt, sampled ids, advantage) rows and write it, with a canary, to `folder`.

    The loss is the mean over sampled tokens of -A log π.
    """
    import torch

    model = oracle_for(base).with_adapter(start, is_trainable=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.1)
    count = sum(len(ids) for _, ids, _ in rows)
    total = 0.0
    for prompt, ids, advantage in rows:
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
        chosen = torch.log_softmax(logits, -1)[range(len(ids)), ids]
        loss: Any = -(advantage * chosen).sum() / count
        loss.backward()
        total += float(loss.detach())
    asked = [[*prompt, *ids[:2]] for prompt, ids, _ in rows[:2]]
    previous = [_next_logprobs(model, ids) for ids in asked]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 0.1))
    optimizer.step()
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    canary = Canary(prompts=[_canary_prompt(model, *prompt) for prompt in zip(asked, previous, strict=True)])
    (folder / CANARY).write_text(canary.model_dump_json(), encoding="utf-8")
    return {
        "loss/train": total,
        "loss/grad_norm": norm,
        "loss/learning_rate": rate,
        "data/step_num_gradient_steps": 1.0,
        "data/step_trainer_tokens": float(sum(len(prompt) + len(ids) for prompt, ids, _ in rows)),
    }


def _canary_prompt(model: Any, ids: list[int], then: Any) -> CanaryPrompt:
    """What the trained model says next after `ids`, where the one before said `then`."""
    now = _next_logprobs(model, ids)
    top = [int(token) for token in now.argsort()[-10:]]
    return CanaryPrompt(
        token_ids=ids,
        expected={token: float(now[token]) for token in top},
        previous={token: float(then[token]) for token in top},
    )


def _next_logprobs(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].float(), -1).numpy()
