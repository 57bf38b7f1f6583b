"""A model as it is served and trained: transformers and PEFT. Knows folders and tensors, no plugin and no request."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from art_core import CheckpointRef, ModelKey, TrajectoryGroup
from art_core.errors import AdapterMismatch

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Served:
    """One model: its network with an adapter for every step that was loaded, and the step that is routed.

    A network has one active adapter, so all that uses it passes through one thread; the tokenizer, which isn't safe
    between threads either, is the event loop's.
    """

    key: ModelKey
    folder: Path
    network: Any
    tokenizer: Any
    canary: list[int]
    routed: int = 0
    training: asyncio.Lock = field(default_factory=asyncio.Lock)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    async def work(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self.thread, lambda: function(*args, **kwargs))

    def checkpoint(self, step: int) -> CheckpointRef:
        return CheckpointRef(self.key, step, self.folder / f"step-{step}")

    def saved(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*") if path.suffix == "")

    def has(self, step: int) -> bool:
        """Whether a step's adapter is loaded."""
        return f"s{step}" in self.network.peft_config

    @classmethod
    def open(cls, key: ModelKey, folder: Path, base: Path) -> Self:
        """The model in its folder, with a fresh adapter as step 0 where nothing was saved yet."""
        folder.mkdir(parents=True, exist_ok=True)
        network: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # yours
        network.eval()
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(network, lora, adapter_name="fresh")
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
        served = cls(key, folder, adapted, tokenizer, canary=tokenizer.encode("The city and the weather"))
        if not served.saved():
            served.save(0, "fresh")
        return served

    def forget(self, adapter: str) -> None:
        """PEFT wants another adapter to be active before it deletes one."""
        self.network.set_adapter("fresh")
        self.network.delete_adapter(adapter)

    def logprobs(self, step: int, ids: Sequence[int]) -> torch.Tensor:
        """Of every next token, in float32 [len(ids), vocabulary], under a step's adapter."""
        self.network.set_adapter(f"s{step}")
        with torch.no_grad():
            return torch.log_softmax(self.network(torch.tensor([ids])).logits[0].float(), -1)

    def next_token(self, step: int, ids: Sequence[int], temperature: float) -> tuple[int, float]:
        """A sampled token, and its logprob at temperature 1."""
        table = self.logprobs(step, ids)[-1]
        token = int(torch.multinomial(torch.softmax(table / max(temperature, 1e-4), -1), 1))
        return token, float(table[token])

    def off(self, checkpoint: CheckpointRef) -> float:
        """By how many nats at most a loaded checkpoint's answer differs from what it was when it was saved."""
        canary = json.loads((checkpoint.path / "canary.json").read_text(encoding="utf-8"))
        found = self.logprobs(checkpoint.step, canary["ids"])[-1]
        return float((found - torch.tensor(canary["expected"])).abs().max())

    def load(self, checkpoint: CheckpointRef) -> None:
        try:
            self.network.load_adapter(checkpoint.path, f"s{checkpoint.step}")
        except Exception as error:
            raise AdapterMismatch(f"the adapter in {checkpoint.path} can't be loaded: {error}") from error
        weights = [p for n, p in self.network.named_parameters() if f".s{checkpoint.step}." in n]
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):
            raise AdapterMismatch(f"the adapter in {checkpoint.path} has values that are not finite.")

    def train(self, step: int, groups: Sequence[TrajectoryGroup], learning_rate: float) -> dict[str, float]:
        """One optimizer step from the routed one, saved as `step`; gives the metrics."""
        rows = [
            (choice, advantage)
            for group in groups
            for trajectory, advantage in zip(group, _advantages([t.reward for t in group]), strict=True)
            if advantage
            for choice in trajectory.choices()
        ]
        start = self.checkpoint(self.routed).path
        self.network.load_adapter(start, "trained", is_trainable=True)
        try:
            self.network.set_adapter("trained")
            parameters = [p for n, p in self.network.named_parameters() if ".trained." in n]
            optimizer, losses, norm = torch.optim.AdamW(parameters, lr=learning_rate), [], 0.0
            for choice, advantage in rows:
                found: Any = choice
                prompt, sampled = list(found.prompt_token_ids), list(found.token_ids)
                logits = self.network(torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1].float()
                chosen = torch.log_softmax(logits, -1)[range(len(sampled)), sampled]
                loss: Any = -advantage * chosen.mean() / len(rows)  # yours
                loss.backward()
                losses.append(float(loss.detach()))
            if rows:
                norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
                optimizer.step()
            self.save(step, "trained")
        finally:
            self.forget("trained")
        tokens = sum(len(getattr(choice, "token_ids", ())) for choice, _ in rows)
        counted = {"data/step_num_gradient_steps": float(bool(rows)), "data/step_trainer_tokens": float(tokens)}
        return {"loss/train": sum(losses), "loss/grad_norm": norm, **counted}

    def save(self, step: int, adapter: str) -> None:
        """A folder with the adapter and what it answers, which appears whole or not at all."""
        temporary = self.folder / f".saving-{uuid.uuid4().hex}"
        try:
            self.network.save_pretrained(temporary, selected_adapters=[adapter])
            for file in (temporary / adapter).iterdir():
                file.rename(temporary / file.name)
            (temporary / adapter).rmdir()
            self.network.set_adapter(adapter)
            with torch.no_grad():
                expected = torch.log_softmax(self.network(torch.tensor([self.canary])).logits[0, -1].float(), -1)
            canary = {"ids": self.canary, "expected": expected.tolist()}
            (temporary / "canary.json").write_text(json.dumps(canary), encoding="utf-8")
            os.replace(temporary, self.checkpoint(step).path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _advantages(rewards: Sequence[float]) -> list[float]:
    mean = sum(rewards) / max(1, len(rewards))
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / max(1, len(rewards)))
    return [(reward - mean) / (spread + 1e-6) for reward in rewards]
