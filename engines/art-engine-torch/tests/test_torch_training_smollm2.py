"""SmolLM2 itself: real multi-turn trajectories, packed against one at a time, and the worker as a process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai.types.chat.chat_completion import Choice
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from art_core.trajectories import Trajectory, TrajectoryGroup
from art_engine_kit.checkpoint_folder import read_manifest, saving
from art_engine_kit.event_stream import ALIVE
from art_engine_kit.group_records import record_of
from art_engine_kit.groups_file import write_groups
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import WORKER_TOKEN, JobEnded, TrainJob, read_event
from art_engine_torch.base_model import resolve_base_model
from art_engine_torch.training.policy import load_policy
from art_training_kit.advantages import balance_step
from art_training_kit.losses import Entries, policy_loss
from art_training_kit.packing import pack_rows
from art_training_kit.policy import PolicyRequest
from art_training_kit.row_tensors import RowTensors
from art_training_kit.tokenize import tokenize_groups

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUESTIONS = ["Name a colour.", "Give me a short word that rhymes with day."]


@pytest.fixture(scope="module")
def base() -> Path:
    folder = resolve_base_model("smollm2-135m-instruct")
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def sampled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TrajectoryGroup], Path]:
    """Two groups of four two-turn conversations, sampled with stock PEFT, and the checkpoints folder of its adapter."""
    checkpoints = tmp_path_factory.mktemp("model") / "checkpoints"
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    with saving(checkpoints / "0000", step=0, base_model=str(base), engine="torch") as folder:
        model.save_pretrained(folder)

    def answer(messages: list[Any]) -> list[Choice]:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(
            input_ids=ids, do_sample=True, top_k=0, max_new_tokens=12, num_return_sequences=1,
            output_logits=True, return_dict_in_generate=True, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        new = out.sequences[0, ids.shape[1] :].tolist()
        logprobs = [float(torch.log_softmax(step[0], -1)[token]) for step, token in zip(out.logits, new, strict=True)]
        pairs = zip(new, logprobs, strict=True)
        content = [{"token": tokenizer.decode([i]), "logprob": x, "top_logprobs": []} for i, x in pairs]
        text = tokenizer.decode(new, skip_special_tokens=True)
        return Choice.model_validate(
            {
                "finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": text},
                "logprobs": {"content": content}, "token_ids": new, "prompt_token_ids": ids[0].tolist(),
            }
        )  # fmt: skip

    groups = []
    for question in QUESTIONS:
        trajectories = []
        for i in range(4):
            one = Trajectory(messages_and_choices=[{"role": "user", "content": question}], reward=float(i))
            one.messages_and_choices.append(answer(one.messages()))
            one.messages_and_choices.append({"role": "user", "content": "Another one, please."})
            one.messages_and_choices.append(answer(one.messages()))
            trajectories.append(one)
        groups.append(TrajectoryGroup(trajectories))
    return groups, checkpoints


def test_packed_loss_and_gradients_on_real_trajectories(
    base: Path, sampled: tuple[list[TrajectoryGroup], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    groups, checkpoints = sampled
    policy = load_policy(PolicyRequest(base, dtype="float32"))
    policy.load_adapter(checkpoints / "0000")
    step = tokenize_groups(map(record_of, groups), vocabulary_size=policy.vocabulary_size, max_length=2048)
    advantages, weights = balance_step(step.advantages, step.trained_tokens, 0.0)
    (packed,) = pack_rows(step.rows, 4096)
    tensors, options = RowTensors.of(packed, advantages, weights, policy.device), TrainOptions()
    parameters = list(policy.adapter_parameters().values())
    ours, *_ = tensors.loss(policy, options)
    mine = torch.autograd.grad(ours.loss, parameters)
    drift = (tensors.logprobs(policy)[0].detach() - tensors.entries.old_logprobs).abs()

    stock = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
    )
    stock.load_adapter(checkpoints / "0000", adapter_name="default", is_trainable=True)
    by_name = dict(stock.named_parameters())
    theirs = [by_name[name] for name in policy.adapter_parameters()]
    plain = 0.0
    for row in step.rows:
        ids, at = torch.from_numpy(row.token_ids).long(), torch.from_numpy(row.trained).long()
        new = torch.log_softmax(stock(ids[None]).logits[0], -1)[at - 1, ids[at]]
        n, t = len(at), row.trajectory
        entries = Entries(
            torch.from_numpy(row.old_logprobs), torch.full((n,), float(advantages[t])),
            torch.full((n,), float(weights[t])), torch.zeros(n, dtype=torch.long),
        )  # fmt: skip
        loss = policy_loss(new, entries, options).loss / ours.count
        loss.backward()
        plain += float(loss.detach())
    expected = [parameter.grad for parameter in theirs]
    difference = abs(float(ours.loss.detach()) / ours.count - plain)
    slope = max(float((a / ours.count - b).abs().max()) for a, b in zip(mine, expected, strict=True))
    size = max(float(b.abs().max()) for b in expected)
    with capsys.disabled():
        print(
            f"\n{step.num_tokens} tokens in {len(packed)}: |Δ loss| {difference:.1e}, max |Δ gradient| {slope:.1e} of"
            f" {size:.1e}; trainer against sampler: mean |Δ logprob| {drift.mean():.1e}, max {drift.max():.1e}"
        )
    assert len(packed) < 0.75 * step.num_tokens
    assert difference < 1e-5
    assert slope < 1e-3 * size
    assert float(drift.max()) < 1e-3


@pytest.fixture
def worker(base: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "art_training_kit.worker",
        "--policy",
        "art_engine_torch.training.policy:load_policy",
    ]
    command += ["--base-model", str(base), "--port", str(port), "--dtype", "float32"]
    log = (tmp_path / "worker.log").open("wb")
    process = subprocess.Popen(command, env=os.environ | {WORKER_TOKEN: "secret"}, stdout=log, stderr=log)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer secret"}, timeout=300)
    try:
        for _ in range(600):
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx.ConnectError:
                assert process.poll() is None, (tmp_path / "worker.log").read_text()
            time.sleep(0.2)
        yield process, client
    finally:
        client.close()
        process.kill()
        process.wait()
        log.close()


def test_the_worker_process_trains_leaves_politely_and_another_resumes(
    sampled: tuple[list[TrajectoryGroup], Path], worker: tuple[subprocess.Popen[bytes], httpx.Client], tmp_path: Path
) -> None:
    groups, checkpoints = sampled
    process, client = worker
    file = tmp_path / "groups.json"
    write_groups(file, groups)
    for step in (1, 2):
        job = TrainJob(
            model="project/agent", step=step, start=checkpoints / f"{step - 1:04d}",
            destination=checkpoints / f"{step:04d}", groups_file=file, options=TrainOptions(learning_rate=1e-3),
        )  # fmt: skip
        answer = client.post("/jobs", content=job.model_dump_json()).text.splitlines()
        events = [read_event(line) for line in answer if line.encode() != ALIVE]
        assert isinstance(events[-1], JobEnded), events[-1]
        assert events[-1].metrics["data/step_num_gradient_steps"] == 1
        assert read_manifest(checkpoints / f"{step:04d}", hashes=True).step == step
    # On the same data the sampled answers with a positive advantage must have become likelier: the ratio has moved.
    assert events[-1].metrics["loss/kl_div"] > 1e-4
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, -signal.SIGTERM)
