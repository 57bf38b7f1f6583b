"""A small real policy (embedding, two attention layers, low-rank adapters) and trajectories as the gateway returns
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai.types.chat.chat_completion import Choice
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from art_core.trajectories import History, Trajectory, TrajectoryGroup
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, saving
from art_engine_kit.groups_file import write_groups
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import AdapterOptions, KlReference, TrainJob
from art_training_kit.packing import PackedRow
from art_training_kit.tree_attention import plan_attention, tree_attention

VOCABULARY, HIDDEN, HEADS, KV_HEADS, LAYERS, RANK = 97, 32, 4, 2, 2, 3
LORA = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q", "k", "v"]}


class SmallPolicy:
    """Implements art_training_kit.policy.Policy in plain torch, fp32, on the CPU."""

    engine, base_model, device, max_length, vocabulary_size = (
        "small",
        "small-base",
        torch.device("cpu"),
        256,
        VOCABULARY,
    )
    tokenizer: Any = None
    sharded = False

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)

        def frozen(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

        head = HIDDEN // HEADS
        self._embed, self._place = frozen(VOCABULARY, HIDDEN) * 4, frozen(self.max_length, HIDDEN) * 2
        self._layers = [
            {"q": frozen(HIDDEN, HIDDEN), "k": frozen(KV_HEADS * head, HIDDEN), "v": frozen(KV_HEADS * head, HIDDEN)}
            for _ in range(LAYERS)
        ]
        self.output_weight = frozen(VOCABULARY, HIDDEN)
        self._adapters: dict[str, dict[str, nn.Parameter]] = {}
        self._active: str | None = None
        self.loads = 0
        self.squash: Callable[[Tensor], Tensor] = torch.tanh

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return self._adapters["trained"]

    def hidden_states(self, row: PackedRow) -> Tensor:
        plan = plan_attention(row, self.device)
        x = self._embed[torch.from_numpy(row.token_ids)] + self._place[torch.from_numpy(row.position_ids)]
        for layer, weights in enumerate(self._layers):
            q, k, v = (self._project(x, weights[name], f"{layer}.{name}") for name in ("q", "k", "v"))
            split = [y.view(len(row), -1, HIDDEN // HEADS).transpose(0, 1)[None] for y in (q, k, v)]
            out = tree_attention(split[0], split[1], split[2], plan, 0.5)
            x = x + self.squash(out[0].transpose(0, 1).reshape(len(row), HIDDEN))
        return x

    def _project(self, x: Tensor, weight: Tensor, name: str) -> Tensor:
        y = x @ weight.T
        if self._active is None:
            return y
        adapter = self._adapters[self._active]
        return y + (x @ adapter[f"{name}.A"].T) @ adapter[f"{name}.B"].T

    def attention_mask_bytes(self, _tokens: int, /) -> int:
        return 0

    def load_adapter(self, folder: Path) -> None:
        self.loads += 1
        self._adapters["trained"] = {k: nn.Parameter(v) for k, v in sorted(load_file(folder / ADAPTER_WEIGHTS).items())}
        self._active = "trained"

    def save_adapter(self, folder: Path) -> None:
        save_file({k: v.detach() for k, v in self.adapter_parameters().items()}, folder / ADAPTER_WEIGHTS)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(LORA))

    @contextmanager
    def reference(self, folder: Path | None) -> Iterator[None]:
        if folder is not None:
            self._adapters["reference"] = {k: nn.Parameter(v) for k, v in load_file(folder / ADAPTER_WEIGHTS).items()}
        self._active = None if folder is None else "reference"
        try:
            yield
        finally:
            self._active = "trained"


def first_checkpoint(checkpoints: Path) -> Path:
    """Step 0: an identity adapter (B = 0)."""
    generator = torch.Generator().manual_seed(3)
    head = HIDDEN // HEADS
    state = {}
    for layer in range(LAYERS):
        for name, wide in (("q", HIDDEN), ("k", KV_HEADS * head), ("v", KV_HEADS * head)):
            state[f"{layer}.{name}.A"] = torch.randn(RANK, HIDDEN, generator=generator) * 0.3
            state[f"{layer}.{name}.B"] = torch.zeros(wide, RANK)
    with saving(checkpoints / "0000", step=0, base_model="small-base", engine="small") as folder:
        save_file(state, folder / ADAPTER_WEIGHTS)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(LORA))
    return checkpoints / "0000"


def choice(prompt: list[int], ids: list[int], logprob: float | None = -4.5, **missing: None) -> Choice:
    """A choice as the gateway returns it; pass `token_ids=None` and the like to leave a field out."""
    content = [{"token": "t", "logprob": logprob, "top_logprobs": []} for _ in ids]
    fields: dict[str, Any] = {
        "finish_reason": "stop",
        "index": 0,
        "message": {"role": "assistant", "content": "said"},
        "logprobs": None if logprob is None else {"content": content},
        "token_ids": ids,
        "prompt_token_ids": prompt,
        "policy_version": 0,
    }
    return Choice.model_validate({k: v for k, v in fields.items() if k not in missing})


def conversation(rng: np.random.Generator, prompt: list[int], reward: float, turns: int = 2) -> Trajectory:
    """Several turns, each prompt beginning with all that came before."""
    messages: list[Any] = [{"role": "user", "content": "asked"}]
    for _ in range(turns):
        ids = rng.integers(1, VOCABULARY, int(rng.integers(2, 7))).tolist()
        messages += [choice(prompt, ids, float(-rng.uniform(3, 6))), {"role": "user", "content": "more"}]
        prompt = prompt + ids + rng.integers(1, VOCABULARY, int(rng.integers(1, 5))).tolist()
    return Trajectory(messages_and_choices=messages, reward=reward)


def groups_of(seed: int = 0, groups: int = 3, size: int = 4, turns: int = 2) -> list[TrajectoryGroup]:
    """Groups whose trajectories share their prompt, and all of them its beginning."""
    rng = np.random.default_rng(seed)
    system = rng.integers(1, VOCABULARY, 6).tolist()
    made = []
    for _ in range(groups):
        prompt = system + rng.integers(1, VOCABULARY, 10).tolist()
        made.append(
            TrajectoryGroup([conversation(rng, prompt, float(rng.integers(0, 3)) + i, turns) for i in range(size)])
        )
    return made


@pytest.fixture
def make_choice() -> Callable[..., Choice]:
    return choice


@pytest.fixture
def make_groups() -> Callable[..., list[TrajectoryGroup]]:
    return groups_of


@pytest.fixture
def make_history() -> Callable[..., History]:
    return lambda *items: History(messages_and_choices=list(items))


@pytest.fixture
def small_policy() -> Callable[[], SmallPolicy]:
    return SmallPolicy


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A model's checkpoints folder that holds step 0."""
    folder = tmp_path / "project" / "models" / "agent" / "checkpoints"
    folder.mkdir(parents=True)
    first_checkpoint(folder)
    return folder


@pytest.fixture
def job(checkpoints: Path, make_groups: Callable[..., Any]) -> Callable[..., TrainJob]:
    """Make the job of a step; keyword arguments are train options."""

    def make(
        step: int = 1, groups: Any = None, adapter: Any = None, reference: KlReference | None = None, **options: Any
    ) -> TrainJob:
        file = checkpoints.parent / f"groups-{step}.json"
        write_groups(file, make_groups(step) if groups is None else groups)
        return TrainJob(
            model="project/agent", step=step,
            start=checkpoints / f"{step - 1:04d}", destination=checkpoints / f"{step:04d}",
            groups_file=file, reference=reference, adapter=AdapterOptions(**(adapter or {})),
            options=TrainOptions(**({"learning_rate": 1e-2} | options)),
        )  # fmt: skip

    return make
