"""LocalBackend with servers of vLLM and SGLang that a user runs, started by the very line that their cards give."""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path

import pytest

from art_backend_local import LocalBackend
from art_conformance.oracle import Oracle, agreement
from art_conformance.tiny_model import write_base_model
from art_core import InferenceLaunch, LaunchPlan, Trajectory, TrajectoryGroup, installed_plugins
from art_core.errors import ServerUnusable
from art_engine_kit.checkpoint_folder import step_folder
from art_runtime import SupervisedProcess, free_port
from art_runtime.environments import engine_for, python_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MESSAGES = [{"role": "user", "content": "hello there"}]
KEY = "the-key-of-the-users-server"
# What a CPU needs beside the card's line, which is written for everybody.
ON_A_CPU = {
    "vllm": "--dtype float32 --kv-cache-memory-bytes 268435456 --max-model-len 512 --enforce-eager",
    "sglang": "--dtype float32 --device cpu --attention-backend torch_native --lora-backend torch_native"
    " --max-total-tokens 8192 --skip-server-warmup --sleep-on-idle",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base_model(tmp_path_factory.mktemp("tiny") / "base")


def users_plan(name: str, base: Path, port: int, *, without_lora: bool = False) -> LaunchPlan:
    """The command on the engine's card, as a user on a CPU would type it."""
    card = installed_plugins().inference_engine(name)
    (line,) = re.findall(r"`(\S+=\S+ (?:vllm serve|python) .*?)`", card.own_server)
    words = shlex.split(line)
    python = Path(python_for(card))
    ours = engine_for(card).launch(
        InferenceLaunch(base_model=base, served_name="x", host="127.0.0.1", port=port, api_key=KEY, python=str(python))
    )
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    words[0] = str(python if words[0] == "python" else python.with_name(words[0]))
    words = [str(base) if word == "MODEL" else word for word in words]
    if words[1:3] == ["-m", "sglang.launch_server"]:
        # SGLang's own module needs stand-ins for what only builds for CUDA define; the plan's script brings them.
        words[1:3] = [ours.argv[1]]
    if without_lora:
        words = words[: words.index("--enable-lora")]
    words += [*shlex.split(ON_A_CPU[name]), "--host", "127.0.0.1", "--port", str(port)]
    # Of our own plan only what makes the build run on a CPU at all.
    kept = {key: ours.env[key] for key in ("PYTHONPATH", "SGLANG_USE_CPU_ENGINE", "OMP_NUM_THREADS") if key in ours.env}
    env = {**kept, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **variables}
    return LaunchPlan(argv=tuple(words), env=env, secret_env=ours.secret_env, ready_timeout_s=600, stop_timeout_s=30)


@pytest.fixture
async def users_server(request, base, tmp_path):
    name, without_lora = request.param
    port = free_port()
    plan = users_plan(name, base, port, without_lora=without_lora)
    server = await SupervisedProcess.start(plan, port=port, log_file=tmp_path / f"{name}.log")
    yield name, server
    await server.stop()


@pytest.mark.parametrize("users_server", [("vllm", False), ("sglang", False)], indirect=True, ids=["vllm", "sglang"])
async def test_steps_are_published_to_a_server_started_by_the_cards_line(
    users_server, base, make_policy, client, tmp_path
):
    name, server = users_server
    # One that servers take as it is, and one that SGLang would serve at a quarter of its strength.
    policies, oracle = (
        [make_policy(), make_policy("rs", config={"peft_args": {"use_rslora": True, "r": 16}})],
        Oracle(base),
    )
    options = {"inference_engine": name, "training_engine": "torch", "show_progress": False, "in_process": True}
    async with LocalBackend(
        path=tmp_path / "art", inference_url=server.base_url, inference_api_key=KEY, **options
    ) as backend:
        for policy in policies:
            asked = client(await backend.register(policy))
            for step in (0, 1, 2):
                answers = await asyncio.gather(
                    *(
                        asked.chat.completions.create(
                            model=policy.name,
                            messages=MESSAGES,
                            max_tokens=8,
                            seed=seed,
                            extra_body={"ignore_eos": True},
                        )
                        for seed in range(4)
                    )
                )
                folder = step_folder(tmp_path / "art" / policy.project / "models" / policy.name / "checkpoints", step)
                for answer in answers:
                    assert answer.model == f"{policy.name}@{step}"
                    choice = answer.choices[0]
                    true = oracle.logprobs(choice.prompt_token_ids, choice.token_ids, folder)
                    assert agreement([entry.logprob for entry in choice.logprobs.content], true).mean < 1e-3
                attempts = [
                    Trajectory(messages_and_choices=[*MESSAGES, answer.choices[0]], reward=float(number % 2))
                    for number, answer in enumerate(answers)
                ]
                await backend.train(policy, [TrajectoryGroup(attempts)], learning_rate=1e-2)
    assert server.running, "a server of the user's is not ours to end"


@pytest.mark.exhaustive
@pytest.mark.parametrize("users_server", [("vllm", True), ("sglang", True)], indirect=True, ids=["vllm", "sglang"])
async def test_a_server_started_without_lora_is_refused_with_the_cards_line(users_server, make_policy, tmp_path):
    name, server = users_server
    options = {"inference_engine": name, "training_engine": "torch", "show_progress": False, "in_process": True}
    with LocalBackend(
        path=tmp_path / "art", inference_url=server.base_url, inference_api_key=KEY, **options
    ) as backend:
        with pytest.raises(ServerUnusable) as failure:
            await backend.register(make_policy())
        assert "it doesn't load an adapter" in str(failure.value)
        assert installed_plugins().inference_engine(name).own_server in str(failure.value)
