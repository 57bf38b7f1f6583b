"""LocalBackend with engine torch: a tiny random model trained and served for real."""

import asyncio
import contextlib
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest

import art
from art_backend_local.wire.host_files import read_host
from art_core import History, Trajectory, TrajectoryGroup
from art_core.errors import CheckpointNotFound, InvalidTrajectory, TrainingFailed
from art_tracker_files import read_trajectories

torch = pytest.importorskip("torch")
pytest.importorskip("art_engine_torch")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MESSAGES = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama with 2 layers whose every character is a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(i): i - 29 for i in range(32, 127)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=128, num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tiny):
    return tiny


@pytest.fixture(scope="module")
def torch_backend(tmp_path_factory):
    from art_backend_local import LocalBackend

    options = {"inference_engine": "torch", "training_engine": "torch", "show_progress": False, "max_adapters": 40}
    with LocalBackend(path=tmp_path_factory.mktemp("torch") / "art", in_process=True, **options) as backend:
        yield backend


async def attempt(client, name="m", **sampling):
    answer = await client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=12, **sampling)
    choice = answer.choices[0]
    reward = float((choice.message.content or "").count("a")) + len(choice.message.content or "") / 100
    return Trajectory(messages_and_choices=[*MESSAGES, choice], reward=reward)


async def gather(client, *, groups=2, size=4):
    return [
        TrajectoryGroup(await asyncio.gather(*(attempt(client, seed=100 * g + s) for s in range(size))))
        for g in range(groups)
    ]


def peft_logprobs(base, checkpoint, choice):
    """The logprobs of a choice's tokens by transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, checkpoint).eval()
    ids = torch.tensor([choice.prompt_token_ids + choice.token_ids])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0], -1)
    first = len(choice.prompt_token_ids)
    return [float(logprobs[first - 1 + i, token]) for i, token in enumerate(choice.token_ids)]


async def test_served_logprobs_are_the_trained_adapters_after_each_publish(
    torch_backend, make_policy, client, tiny, checkpoints
):
    policy = make_policy(fp32=True)
    asked = client(await torch_backend.register(policy))
    differences = []
    for step in range(4):
        trajectory = await attempt(asked)
        (choice,) = trajectory.choices()
        assert choice.policy_version == step
        served = [entry.logprob for entry in choice.logprobs.content]
        expected = peft_logprobs(tiny, checkpoints(torch_backend) / f"{step:04d}", choice)
        differences += [abs(a - b) for a, b in zip(served, expected, strict=True)]
        if step:
            old = peft_logprobs(tiny, checkpoints(torch_backend) / f"{step - 1:04d}", choice)
            assert max(abs(a - b) for a, b in zip(old, expected, strict=True)) > 1e-3, "the step changed nothing"
        result = await torch_backend.train(policy, await gather(asked), learning_rate=1e-2)
        assert result.metrics["data/step_num_gradient_steps"] >= 1
    print(f"mean {sum(differences) / len(differences):.2e}, max {max(differences):.2e} of {len(differences)} tokens")
    assert max(differences) < 1e-3


async def test_requests_in_flight_stay_on_their_step_while_the_next_ones_are_published(
    torch_backend, make_policy, client, tiny, checkpoints
):
    policy = make_policy(fp32=True)
    asked = client(await torch_backend.register(policy))
    groups = await gather(asked)
    published, answers = [0], []

    async def keep_asking(max_tokens):
        long = {"max_tokens": max_tokens, "temperature": 1, "extra_body": {"ignore_eos": True}}
        while published[-1] < 3:
            answer = await asked.chat.completions.create(model="m", messages=MESSAGES, **long)
            answers.append((answer.choices[0], published[-1]))

    asking = [asyncio.create_task(keep_asking(max_tokens)) for max_tokens in (300, 400)]
    for _ in range(3):
        published.append((await torch_backend.train(policy, groups, learning_rate=1e-2)).step)
    await asyncio.gather(*asking)
    outlived = [choice for choice, latest in answers if choice.policy_version < latest]
    assert outlived, "no request was in flight while a step was published"
    for choice in outlived:
        served = [entry.logprob for entry in choice.logprobs.content]
        expected = peft_logprobs(tiny, checkpoints(torch_backend) / f"{choice.policy_version:04d}", choice)
        assert max(abs(a - b) for a, b in zip(served, expected, strict=True)) < 1e-3


async def test_the_plain_name_never_answers_from_a_step_that_is_not_published(torch_backend, policy, client):
    asked = client(await torch_backend.register(policy))
    groups = await gather(asked)
    seen, published, done = [], [0], asyncio.Event()

    async def ask():
        while not done.is_set():
            before = published[-1]
            answer = await asked.chat.completions.create(model="m", messages=MESSAGES, max_tokens=2)
            step = int(answer.model.partition("@")[2])
            assert step >= before, "the route went back"
            # Publication ends in the host a moment before this client hears of it.
            assert step <= published[-1] + 1
            seen.append(step)

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    for _ in range(4):
        published.append((await torch_backend.train(policy, groups, learning_rate=1e-3)).step)
    done.set()
    await asyncio.gather(*asking)
    assert len(seen) > 10
    assert seen[-1] in (3, 4)


async def test_killed_engine_and_worker_come_back_with_the_same_policy(
    torch_backend, make_policy, client, tiny, checkpoints
):
    policy = make_policy(fp32=True)
    asked = client(await torch_backend.register(policy)).with_options(max_retries=4)
    groups = await gather(asked)
    await torch_backend.train(policy, groups, learning_rate=1e-2)
    host = psutil.Process(read_host(torch_backend.path).pid)
    begun, killed = asyncio.Event(), asyncio.Event()

    async def keep_gathering():
        while not killed.is_set():
            found = await gather(asked)
            begun.set()
        return found

    rollouts = asyncio.create_task(keep_gathering())
    await begun.wait()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for word in ("art_engine_torch.server", "art_training_kit.worker"):
            for child in host.children(recursive=True):
                # Some end on their own between being listed and being looked at.
                with contextlib.suppress(psutil.Error):
                    if word in child.cmdline():
                        child.kill()
        killed.set()
        await rollouts
        trajectory = await attempt(asked)
    assert any("died and is being restarted" in str(w.message) for w in warned)
    (choice,) = trajectory.choices()
    served = [entry.logprob for entry in choice.logprobs.content]
    expected = peft_logprobs(tiny, checkpoints(torch_backend) / "0001", choice)
    assert choice.policy_version == 1
    assert max(abs(a - b) for a, b in zip(served, expected, strict=True)) < 1e-3
    assert (await torch_backend.train(policy, await rollouts, learning_rate=1e-2)).step == 2


def test_kill_at_random_moments_and_go_on_with_the_same_loss(tiny, tmp_path):
    script = Path(__file__).with_name("kill_at_random.py")
    command = [sys.executable, str(script), str(tiny), str(tmp_path / "work"), "--kills", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.search(r"3 kills, resumed at \[0, \d+, \d+\]", done.stdout)


async def test_a_disk_that_takes_no_more_fails_the_step_and_loses_nothing(
    torch_backend, policy, client, checkpoints, programs
):
    asked = client(await torch_backend.register(policy))
    groups = await gather(asked)
    await torch_backend.train(policy, groups, learning_rate=1e-2)
    # Each setting that a test of this module trains with has a worker of its own.
    workers = programs(read_host(torch_backend.path).pid, "art_training_kit.worker")
    unlimited = [worker.rlimit(psutil.RLIMIT_FSIZE) for worker in workers]
    try:
        # No file of a worker's may grow beyond this, which fails its writing as a full disk does.
        for worker, (_, hard) in zip(workers, unlimited, strict=True):
            worker.rlimit(psutil.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match=r"step 2 of .* could not be saved"):
            await torch_backend.train(policy, groups, learning_rate=1e-2)
    finally:
        for worker, limit in zip(workers, unlimited, strict=True):
            worker.rlimit(psutil.RLIMIT_FSIZE, limit)
    assert sorted(file.name for file in checkpoints(torch_backend).iterdir() if file.is_dir()) == ["0000", "0001"]
    assert (await torch_backend.train(policy, groups, learning_rate=1e-2)).step == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"only root may mount a small file system: {mounted.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(file, *, leave):
    """Fill the disk that `file` is on, but for `leave` bytes."""
    with file.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    os.truncate(file, file.stat().st_size - leave)


async def test_a_full_disk_fails_the_step_and_the_next_one_works_once_there_is_room(small_disk, make_policy, client):
    from art_backend_local import LocalBackend

    policy, path = make_policy(), small_disk / "art"
    options = {"inference_engine": "torch", "training_engine": "torch", "show_progress": False, "in_process": True}
    async with LocalBackend(path=path, **options) as backend:
        asked = client(await backend.register(policy))
        groups = await gather(asked)
        await backend.train(policy, groups, learning_rate=1e-2)
        checkpoints = path / policy.project / "models/m/checkpoints"
        for leave in (0, 100_000):
            fill(small_disk / "filler", leave=leave)
            with pytest.raises(OSError, match=r"disk is full|No space left"):
                await backend.train(policy, groups, learning_rate=1e-2)
            assert sorted(file.name for file in checkpoints.iterdir() if file.is_dir()) == ["0000", "0001"]
            assert (await attempt(asked)).choices()[0].policy_version == 1
            (small_disk / "filler").unlink()
        assert (await backend.train(policy, groups, learning_rate=1e-2)).step == 2
        assert (await attempt(asked)).choices()[0].policy_version == 2


@pytest.mark.parametrize("learning_rate", [1e3, 1e6])
async def test_a_step_that_diverged_says_so_and_blames_no_engine(
    torch_backend, policy, client, checkpoints, learning_rate
):
    asked = client(await torch_backend.register(policy))
    groups = await gather(asked)
    with pytest.raises(TrainingFailed, match="diverged: ") as refused:
        await torch_backend.train(policy, groups, learning_rate=learning_rate)
    assert re.search(rf"learning rate .*{re.escape(f'{learning_rate:g}')}\b", str(refused.value))
    assert "the gradient's norm " in str(refused.value)
    assert "canary" not in str(refused.value)
    assert not list(checkpoints(torch_backend).glob("0001*"))
    assert (await attempt(asked)).choices()[0].policy_version == 0
    assert (await torch_backend.train(policy, groups, learning_rate=1e-3)).step == 1


async def test_a_kl_reference_is_a_step_an_adapter_folder_or_the_base(torch_backend, policy, client):
    asked = client(await torch_backend.register(policy))
    groups = await gather(asked)
    await torch_backend.train(policy, groups, learning_rate=1e-1)
    folder = await torch_backend.pull_checkpoint(policy, step=1)
    metrics = [
        (await torch_backend.train(policy, groups, learning_rate=0.0, kl_penalty_coef=0.1, **reference)).metrics
        for reference in ({"kl_penalty_reference_step": 1}, {"kl_ref_adapter_path": folder}, {})
    ]
    step, adapter, base_alone = (m["loss/kl_policy_ref"] for m in metrics)
    # With learning rate 0 the policy stays at step 1, so only the base model is another policy.
    assert abs(step) < 1e-4
    assert abs(adapter) < 1e-4
    assert abs(base_alone) > 1e-3
    with pytest.raises(CheckpointNotFound, match="kl_penalty_reference_step=77"):
        await torch_backend.train(policy, groups, kl_penalty_coef=0.1, kl_penalty_reference_step=77)


FP32 = {"engine_args": {"dtype": "float32"}, "init_args": {"dtype": "float32"}}


def ordinary_adapter(base, folder, **settings):
    """An adapter that PEFT made and saved, with dropout as most have, whose effect is clear."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": "all-linear"} | settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "r": 16},
        {"rank_pattern": {"q_proj": 9, "down_proj": 2}, "alpha_pattern": {"v_proj": 1, "q_proj": 20}},
        {"target_modules": ["v_proj"], "use_rslora": True},
    ],
    ids=["rsLoRA", "patterns", "v_proj"],
)
async def test_a_start_from_an_ordinary_adapter_is_served_and_trained_as_peft_computes_it(
    torch_backend, make_policy, client, tiny, checkpoints, tmp_path, settings
):
    folder = ordinary_adapter(tiny, tmp_path / "adapter", **settings)
    policy = make_policy(base_model=folder, config=FP32)
    asked = client(await torch_backend.register(policy))
    there = [folder]
    for step in (0, 1, 2):
        (choice,) = (await attempt(asked)).choices()
        assert choice.policy_version == step
        served = [entry.logprob for entry in choice.logprobs.content]
        expected = peft_logprobs(tiny, there[-1], choice)
        assert max(abs(a - b) for a, b in zip(served, expected, strict=True)) < 1e-3
        await torch_backend.train(policy, await gather(asked), learning_rate=1e-2)
        there.append(checkpoints(torch_backend) / f"{step + 1:04d}")


async def test_a_model_with_rslora_is_served_at_its_strength(torch_backend, make_policy, client, tiny, checkpoints):
    policy = make_policy(config=FP32 | {"peft_args": {"use_rslora": True, "r": 16}})
    asked = client(await torch_backend.register(policy))
    for step in (0, 1, 2):
        (choice,) = (await attempt(asked)).choices()
        served = [entry.logprob for entry in choice.logprobs.content]
        expected = peft_logprobs(tiny, checkpoints(torch_backend) / f"{step:04d}", choice)
        assert max(abs(a - b) for a, b in zip(served, expected, strict=True)) < 1e-3
        await torch_backend.train(policy, await gather(asked), learning_rate=1e-2)


async def test_smollm2_is_trained_and_served(torch_backend, make_policy, client, checkpoints):
    from art_core import installed_plugins, resolve_base_model

    name = "smollm2-135m-instruct"
    folder = await resolve_base_model(installed_plugins(), name)
    policy = make_policy("smol", base_model=name)
    asked = client(await torch_backend.register(policy))
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]

    async def one(seed):
        answer = await asked.chat.completions.create(model="smol", messages=question, max_tokens=12, seed=seed)
        choice = answer.choices[0]
        return Trajectory(messages_and_choices=[*question, choice], reward=float(len(choice.message.content or "")))

    group = TrajectoryGroup(await asyncio.gather(*(one(seed) for seed in range(4))))
    result = await torch_backend.train(policy, [group], learning_rate=1e-4)
    assert result.metrics["data/step_num_gradient_steps"] == 1
    (choice,) = (await one(9)).choices()
    assert choice.policy_version == 1
    served = [entry.logprob for entry in choice.logprobs.content]
    expected = await asyncio.to_thread(peft_logprobs, folder, checkpoints(torch_backend, "smol") / "0001", choice)
    differences = [abs(a - b) for a, b in zip(served, expected, strict=True)]
    print(f"mean {sum(differences) / len(differences):.2e}, max {max(differences):.2e}")
    # In bf16 the two differ by their rounding; in fp32 by next to nothing.
    assert sum(differences) / len(differences) < 0.2


SPOILS = {
    "None is not one number": lambda t: setattr(t, "reward", None),
    "reward is nan": lambda t: setattr(t, "reward", math.nan),
    "0.5 points": lambda t: setattr(t, "reward", "0.5 points"),
    "metrics['none']": lambda t: t.metrics.update(none=None),
    "metrics['list']": lambda t: t.metrics.update(list=[1]),
    "metadata['table']": lambda t: t.metadata.update(table={"a": 1}),
    "SystemExit": lambda t: sys.exit(1),
    "a message needs a 'role'": lambda t: t.messages_and_choices.append({"content": "x"}),
    "a trajectory holds": lambda t: t.messages_and_choices.append(["no choice"]),
    "ZeroDivisionError": lambda t: 1 / 0,
}


async def test_of_a_step_with_ten_spoilt_in_ten_ways_the_246_others_are_trained_published_and_logged(
    torch_backend, tiny, project
):
    model = art.TrainableModel(name="spoilt", project=project, base_model=tiny, report_metrics=["tracker-files"])
    await model.register(torch_backend)
    asked = model.openai_client()
    answer = await asked.chat.completions.create(model=model.get_inference_name(), messages=MESSAGES, max_tokens=6, n=8)
    spoilt_at = {25 * i + 3: spoil for i, spoil in enumerate(SPOILS.values())}

    async def rollout(number):
        choice = answer.choices[number % 8].model_copy(deep=True)
        # Powers of two, none of which is the mean of a group, so that each has an advantage.
        trajectory = Trajectory(messages_and_choices=[*MESSAGES, choice], reward=2.0 ** (number % 8))
        trajectory.metadata["number"] = number
        if number in spoilt_at:
            spoilt_at[number](trajectory)
        return trajectory

    groups = await art.gather_trajectory_groups(
        [TrajectoryGroup(rollout(8 * g + i) for i in range(8)) for g in range(32)],
        pbar_desc=None,
        max_exceptions=len(SPOILS),
    )
    result = await torch_backend.train(model, groups, learning_rate=1e-4)
    assert (result.step, await model.get_step()) == (1, 1)
    assert result.metrics["data/step_num_trajectories_trained"] == 246
    await model.log(groups, metrics=result.metrics, step=result.step, split="train")
    (file,) = model._folder().rglob("0001.parquet")
    back = read_trajectories(file)
    kept = {trajectory.metadata["number"] for group in back for trajectory in group}
    assert kept == set(range(256)) - spoilt_at.keys()
    named = [str(error) for group in back for error in group.exceptions]
    assert len(named) == len(SPOILS)
    for words, error in zip(SPOILS, named, strict=True):
        assert words in error


async def test_rollouts_of_another_policy_are_told_of_and_trained(torch_backend, make_policy, client):
    policy = make_policy(fp32=True)
    asked = client(await torch_backend.register(policy))
    groups = await gather(asked)
    result = await torch_backend.train(policy, groups, learning_rate=0.0)
    assert result.metrics["loss/mismatch_mean"] < 1e-3
    assert result.metrics["loss/mismatch_outside"] == 0.0
    for group in groups:
        for trajectory in group:
            for choice in trajectory.choices():
                for entry in choice.logprobs.content:
                    entry.logprob -= 1.0
    with pytest.warns(RuntimeWarning, match=r"step 2 of 'm': .* off by 1\.00 nats .* 100% of the tokens"):
        result = await torch_backend.train(policy, groups, learning_rate=0.0)
    assert result.step == 2


SHORTENS_THE_PAST = (
    "{% for m in messages %}{{ m['role'][0] }}:"
    "{{ m['content'][:3] if m['role'] == 'assistant' else m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


# Ids that are no character would be lost on the way into the next prompt.
ONLY_CHARACTERS = {str(token): -100 for token in (0, 1, 2, *range(98, 128))}


async def agent_of_two(client, seed):
    """Three turns, each cut after six tokens, and a sub-agent beside them."""
    conversations = [Trajectory(messages_and_choices=list(MESSAGES)), History(messages_and_choices=list(MESSAGES))]
    for conversation in conversations:
        for turn in range(3):
            answer = await client.chat.completions.create(
                model="m",
                messages=conversation.messages(),
                max_tokens=6,
                seed=10 * seed + turn,
                logit_bias=ONLY_CHARACTERS,
            )
            conversation.messages_and_choices += [answer.choices[0], {"role": "user", "content": "go on"}]
    trajectory, beside = conversations
    trajectory.additional_histories.append(beside)
    trajectory.reward = float(seed)
    return trajectory


def in_one_row(history):
    asked = [choice.prompt_token_ids for choice in history.choices()]
    whole = [choice.prompt_token_ids + choice.token_ids for choice in history.choices()]
    return all(after[: len(before)] == before for before, after in zip(whole, asked[1:], strict=False))


@pytest.mark.parametrize("template", [None, SHORTENS_THE_PAST], ids=["keeps the past", "shortens it"])
async def test_agents_whose_turns_are_cut_are_trained_on_as_they_were_sampled(
    torch_backend, make_policy, client, template
):
    policy = make_policy(fp32=True)
    if template is not None:
        policy.internal_config["chat_template"] = template
    asked = client(await torch_backend.register(policy))
    groups = [TrajectoryGroup(await asyncio.gather(*(agent_of_two(asked, seed) for seed in range(4))))]
    histories = [history for trajectory in groups[0] for history in trajectory.histories()]
    split = sum(not in_one_row(history) for history in histories)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        results = [await torch_backend.train(policy, groups, learning_rate=0.0) for _ in range(2)]
    for result in results:
        assert result.metrics["data/step_num_histories_several_turns"] == 8
        assert result.metrics["data/step_num_histories_split"] == split
        sampled = [choice.token_ids for history in histories for choice in history.choices()]
        assert result.metrics["data/step_trained_tokens"] == sum(map(len, sampled))
        # The trainer finds for every token, in whatever row, the logprob that it was sampled with.
        assert result.metrics["loss/mismatch_mean"] < 1e-3
        assert result.metrics["loss/mismatch_outside"] == 0.0
    told = [str(warning.message) for warning in heard if "conversations of several turns" in str(warning.message)]
    assert (split, len(told)) == ((0, 0) if template is None else (8, 1)), "told once for a model"


async def test_what_was_drawn_otherwise_than_its_logprobs_say_is_told_once_or_refused(
    torch_backend, make_policy, client
):
    policy = make_policy()
    asked = client(await torch_backend.register(policy))
    group = TrajectoryGroup(
        await asyncio.gather(*(attempt(asked, seed=seed, temperature=0.5 + seed / 2) for seed in range(4)))
    )
    for number, trajectory in enumerate(group):
        trajectory.reward = float(number)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        results = [await torch_backend.train(policy, [group], learning_rate=0.0) for _ in range(2)]
    assert [result.metrics["data/step_num_choices_altered_sampling"] for result in results] == [3.0, 3.0]
    told = [str(warning.message) for warning in heard if "drawn from other probabilities" in str(warning.message)]
    assert len(told) == 1, "told once for a model"
    with pytest.raises(
        InvalidTrajectory, match=r"trajectories\[0\]\.messages_and_choices\[1\] was drawn with temperature"
    ):
        await torch_backend.train(policy, [group], learning_rate=0.0, altered_sampling="refuse")
