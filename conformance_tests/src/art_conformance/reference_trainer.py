"""One step of policy-gradient training as plainly as it can be written: a sequence at a time, one AdamW step.

For tiny models and the reference backend only. Knows tensors and checkpoint folders; knows no backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from art_engine_kit.canary import CANARY, Canary, CanaryPrompt

from .oracle import Oracle

Row = tuple[list[int], list[int], float]


def train_step(base: Path, start: Path, folder: Path, rows: Sequence[Row], rate: float) -> dict[str, float]:
    """Train the adapter in `start` on (prompt, sampled ids, advantage) rows and write it, with a canary, to `folder`.

    The loss is the mean over sampled tokens of -A log π.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model: Any = PeftModel.from_pretrained(
        loader.from_pretrained(base, dtype=torch.float32), start, is_trainable=True
    ).eval()
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
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 0.1))
    optimizer.step()
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / CANARY).write_text(_canary(base, start, folder, rows).model_dump_json(), encoding="utf-8")
    return {
        "loss/train": total,
        "loss/grad_norm": norm,
        "loss/learning_rate": rate,
        "data/step_num_gradient_steps": 1.0,
        "data/step_trainer_tokens": float(sum(len(prompt) + len(ids) for prompt, ids, _ in rows)),
    }


def _canary(base: Path, start: Path, folder: Path, rows: Sequence[Row]) -> Canary:
    oracle, prompts = Oracle(base), []
    for prompt, ids, _ in rows[:2]:
        asked = [*prompt, *ids[:2]]
        now, then = oracle.next_logprobs(asked, folder)[-1], oracle.next_logprobs(asked, start)[-1]
        top = [int(token) for token in now.argsort()[-10:]]
        prompts.append(
            CanaryPrompt(
                token_ids=asked,
                expected={token: float(now[token]) for token in top},
                previous={token: float(then[token]) for token in top},
            )
        )
    return Canary(prompts=prompts)
