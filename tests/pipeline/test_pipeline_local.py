"""PipelineTrainer on LocalBackend and its embedded engine, on a CPU: training and answers at once, for real."""

import asyncio

import pytest

import art
from art.local import LocalBackend
from art.pipeline_trainer import PipelineTrainer, make_group_rollout_fn
from art_core.history import read_history


@pytest.mark.slow
async def test_rollouts_are_answered_by_the_step_that_they_hold_while_others_are_trained(tiny_base_model, tmp_path):
    answered = []

    async def attempt(model, scenario, config):
        trajectory = art.Trajectory(messages_and_choices=[{"role": "user", "content": scenario["ask"]}])
        held = model.get_inference_name()
        for turn in range(scenario["turns"]):
            completion = await model.openai_client().chat.completions.create(
                messages=trajectory.messages(), model=model.name, max_tokens=4
            )
            choice = completion.choices[0]
            answered.append((held, f"{model.name}@{choice.policy_version}"))
            trajectory.messages_and_choices.append(choice)
            if turn + 1 < scenario["turns"]:
                trajectory.messages_and_choices.append({"role": "user", "content": "And?"})
        trajectory.reward = float(len(choice.token_ids) + sum(choice.token_ids) % 7)
        return trajectory

    backend = LocalBackend(
        path=tmp_path, in_process=True, inference_engine="torch", training_engine="torch", show_progress=False
    )
    async with backend:
        model = art.TrainableModel(name="agent", project="task", base_model=str(tiny_base_model))
        await model.register(backend)
        scenarios = [{"ask": f"Say {number}.", "turns": 1 + 3 * (number % 4 == 0)} for number in range(24)]
        trainer = PipelineTrainer(
            model, backend, make_group_rollout_fn(attempt, 3), scenarios,
            num_rollout_workers=4, min_batch_size=2, max_batch_size=4, max_steps_off_policy=2, learning_rate=1e-3,
        )  # fmt: skip
        async with asyncio.timeout(200):
            await trainer.train()
        last = await model.get_step()
    rows = [row for row in read_history(tmp_path / "task/models/agent/history.jsonl") if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    assert last >= 3
    assert all(row["train/steps_off_policy"] <= 3 for row in rows)
    assert all(held == by for held, by in answered), "every answer came from the step that its rollout holds"
    assert len({by for _, by in answered}) > 2
