"""A backend whose steps are numbers and whose training takes as long as a test says; what is simulated is training."""

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import art
from art_core import BackendCapability, LocalTrainResult, Registration, check_groups, inference_name
from art_core.errors import CheckpointInUse, CheckpointNotFound

EVERYTHING = frozenset(
    {BackendCapability.CONCURRENT_INFERENCE, BackendCapability.LEASES, BackendCapability.DELETE_CHECKPOINTS}
)


class SimulatedBackend:
    """Keeps every batch that it trained, as the scenario ids of its groups with the version that each began with."""

    name = "simulated"

    def __init__(
        self, path: Path, *, step: int = 0, train_s: float = 0.0, capabilities=EVERYTHING, served_steps=None
    ) -> None:
        self.path, self.train_s, self.capabilities = path, train_s, capabilities
        self.steps = list(range(step + 1))
        self.leases: Counter[int] = Counter()
        self.most_leases, self.served_steps = 0, served_steps
        self.batches: list[tuple[int, list[tuple[int, int]]]] = []
        self.options: list[dict] = []
        self.asked_too_late: list[int] = []
        self.fail_with: Exception | None = None
        self.die_after_publishing = False

    def capabilities_for(self, model):
        return self.capabilities

    async def register(self, model):
        return Registration(
            inference_base_url="http://127.0.0.1:9/v1",
            inference_api_key="k",
            base_path=self.path,
            served_steps=self.served_steps,
        )

    async def train(self, model, trajectory_groups, **options):
        check_groups(trajectory_groups)
        step = self.steps[-1]
        self.options.append(options)
        await asyncio.sleep(self.train_s)
        if self.fail_with is not None:
            raise self.fail_with
        self.batches.append(
            (step, [(group.metadata["scenario_id"], group[0].initial_policy_version) for group in trajectory_groups])
        )
        self.steps.append(step + 1)
        if self.die_after_publishing:
            raise RuntimeError("died")
        return LocalTrainResult(step=step + 1, metrics={"loss/train": 0.5, "data/step_trainer_tokens": 8.0})

    async def get_step(self, model):
        return self.steps[-1]

    async def list_steps(self, model):
        return list(self.steps)

    def inference_name(self, model, step=None):
        return inference_name(model.name, self.steps[-1] if step is None else step)

    @asynccontextmanager
    async def lease(self, model, step=None):
        if step not in self.steps:
            self.asked_too_late.append(step)
            raise CheckpointNotFound(f"{step}")
        self.leases[step] += 1
        self.most_leases = max(self.most_leases, self.leases[step])
        try:
            yield self.inference_name(model, step)
        finally:
            self.leases[step] -= 1

    async def delete_checkpoints(self, model, steps):
        if any(self.leases[step] or step == self.steps[-1] for step in steps):
            raise CheckpointInUse("leased")
        self.steps = [step for step in self.steps if step not in steps]
        return list(steps)

    def trained(self) -> list[int]:
        """The scenario ids, in the order in which they were trained."""
        return [scenario for _, batch in self.batches for scenario, _ in batch]


@pytest.fixture
def simulated(tmp_path):
    return SimulatedBackend(tmp_path)


@pytest.fixture
async def model(simulated):
    model = art.TrainableModel(name="agent", project="task", base_model="some-base")
    await model.register(simulated)
    return model


@pytest.fixture
def backend_class():
    return SimulatedBackend


@pytest.fixture
def make_scenarios():
    return lambda count: [{"metadata": {"scenario_id": number}} for number in range(count)]
