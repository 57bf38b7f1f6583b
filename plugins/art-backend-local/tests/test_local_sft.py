"""Supervised fine-tuning by LocalBackend: on SmolLM2 with engine torch, held against stock transformers and PEFT and
followed by RL; and refused where it can't be.
"""

import asyncio
import os
import re

import pytest

from art_core import BackendCapability, Trajectory, TrajectoryGroup, resolve_base_model
from art_core.errors import UnknownArgument, UnsupportedCapability

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CITIES = ["Paris", "Oslo", "Cairo", "Lima", "Delhi", "Quito", "Rome", "Kyiv", "Doha", "Hanoi"]
WEATHER = ["sun", "rain", "fog", "snow", "wind"]


def chat(index):
    """A chat that calls a tool and answers by what it gave."""
    city, weather = CITIES[index % 10], WEATHER[index // 10]
    call = {"name": "weather", "arguments": f'{{"city": "{city}"}}'}
    return Trajectory(
        messages_and_choices=[
            {"role": "user", "content": f"How is it in {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": "1", "content": weather},
            {"role": "assistant", "content": f"There is {weather} in {city} today."},
        ],
        tools=TOOLS,
    )


class TestOnTheFakeEngines:
    @pytest.mark.slow
    async def test_an_engine_that_does_not_declare_it_is_refused_before_anything_is_trained(self, backend, policy):
        assert BackendCapability.SFT not in backend.capabilities
        await backend.register(policy)
        with pytest.raises(UnsupportedCapability, match=r"training_engine=.torch."):
            await backend.train_sft(policy, [chat(0)])
        assert await backend.list_steps(policy) == [0]

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"learning_rate": [1e-5, 1e-5, 1e-5]}, ValueError, "3 rates, and 4 trajectories make 2 batches of 2"),
            ({"learning_rate": -1.0}, ValueError, "learning_rate"),
            ({"learning_rate": float("nan")}, ValueError, "learning_rate"),
            ({"batch_size": 0}, ValueError, "batch_size"),
            ({"batch_size": "big"}, ValueError, "batch_size"),
            ({"packed_sequence_length": 0}, ValueError, "packed_sequence_length"),
            ({"loss_fn": "ppo"}, UnknownArgument, "LocalBackend.train_sft has no argument 'loss_fn'"),
        ],
    )
    async def test_a_bad_option_is_named_before_anything_starts(
        self, new_backend, tmp_path, policy, options, error, said
    ):
        with pytest.raises(error, match=re.escape(said)):
            await new_backend(tmp_path).train_sft(policy, [chat(i) for i in range(4)], **options)

    @pytest.mark.slow
    async def test_no_trajectories_are_an_error(self, new_backend, tmp_path, policy):
        with pytest.raises(ValueError, match="there are no trajectories to train on"):
            await new_backend(tmp_path).train_sft(policy, [])


def stock(base, adapter, trajectories, rate, batch_size):
    """The mean loss and the adapter after one pass by transformers, PEFT and AdamW, one chat at a time in fp32.

    Which tokens are replies is read from SmolLM2's own markers.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, is_trainable=True
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-6)
    rows = []
    for trajectory in trajectories:
        text = tokenizer.apply_chat_template(trajectory.messages(), tools=TOOLS, tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)]
        assert len(spans) == 2
        replies = [
            at
            for at, (start, end) in enumerate(encoded["offset_mapping"])
            if any(first <= start and end <= last for first, last in spans)
        ]
        rows.append((torch.tensor([encoded["input_ids"]]), replies))
    losses = []
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        count = sum(len(replies) for _, replies in batch)
        losses.append(0.0)
        adamw.zero_grad()
        for ids, replies in batch:
            logits = model(ids).logits[0, [at - 1 for at in replies]]
            part = torch.nn.functional.cross_entropy(logits, ids[0, replies], reduction="sum") / count
            part.backward()
            losses[-1] += float(part.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
    return sum(losses) / len(losses), dict(model.named_parameters())


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestOnSmolLM2:
    @pytest.fixture(scope="class")
    @classmethod
    def torch_backend(cls, tmp_path_factory):
        from art_backend_local import LocalBackend

        options = {"inference_engine": "torch", "training_engine": "torch", "show_progress": False}
        with LocalBackend(path=tmp_path_factory.mktemp("sft") / "art", in_process=True, **options) as backend:
            yield backend

    async def test_chats_with_tools_train_as_by_stock_libraries_and_rl_goes_on_from_there(
        self, torch_backend, make_policy, client, checkpoints
    ):
        from art_core import installed_plugins
        from art_engine_kit.adapter_files import read_adapter

        name = "smollm2-135m-instruct"
        policy = make_policy("smol", base_model=name, fp32=True)
        policy.internal_config["trainer_args"] = {"adam_epsilon": 1e-6}
        assert BackendCapability.SFT in torch_backend.capabilities_for(policy)
        asked = client(await torch_backend.register(policy))
        count, size = (int(number) for number in os.environ.get("SFT_CHATS", "6 3").split())
        chats = [chat(index) for index in range(count)]
        result = await torch_backend.train_sft(policy, chats, learning_rate=2e-4, batch_size=size)
        assert result.step == 1
        assert result.metrics["data/step_num_trajectories"] == count
        assert result.metrics["data/step_num_gradient_steps"] == count // size
        assert result.metrics["loss/learning_rate"] == pytest.approx(2e-4)

        base = await resolve_base_model(installed_plugins(), name)
        folder = checkpoints(torch_backend, "smol")
        expected, weights = await asyncio.to_thread(stock, base, folder / "0000", chats, 2e-4, size)
        print(f"loss {result.metrics['loss/train']:.6f}, by stock libraries {expected:.6f}")
        assert result.metrics["loss/train"] == pytest.approx(expected, abs=1e-4)
        off = max(
            float(
                abs(
                    pair.b.float32() - weights[f"base_model.model.{module}.lora_B.default.weight"].detach().numpy()
                ).max()
            )
            for module, pair in read_adapter(folder / "0001").pairs.items()
        )
        print(f"largest difference of a weight {off:.2e}")
        # AdamW makes a whole step of the smallest gradients.
        assert off < 1e-4

        again = await torch_backend.train_sft(policy, chats[:size], learning_rate=2e-4, batch_size=size)
        assert again.metrics["loss/train"] < expected

        async def attempt(seed):
            question = chats[seed].messages()[:1]
            answer = await asked.chat.completions.create(model="smol", messages=question, max_tokens=8, seed=seed)
            assert answer.choices[0].policy_version == 2
            return Trajectory(messages_and_choices=[*question, answer.choices[0]], reward=float(seed))

        group = TrajectoryGroup([await attempt(seed) for seed in range(3)])
        learnt = await torch_backend.train(policy, [group], learning_rate=1e-5)
        assert (learnt.step, learnt.metrics["data/step_num_gradient_steps"]) == (3, 1)
        last = await torch_backend.train_sft(policy, chats[:2], learning_rate=1e-5)
        assert (last.step, await torch_backend.get_step(policy)) == (4, 4)
