"""What a training engine's description must be, without starting anything."""

from __future__ import annotations

from dataclasses import replace

import pytest

from art_core import TrainingCapability, TrainingEngine, TrainingLaunch
from art_core.errors import UnknownArgument

from .plans import check_devices, check_interpreter, check_plan_is_pure, check_secret, words_of
from .requirements import MUST, check
from .training_engine_suite import TrainingEngineSuite


class TrainingPlanChecks(TrainingEngineSuite):
    """The checks of `TrainingEngineConformance` on the launch plan."""

    @check("TRN-001", MUST, "The engine has a plain name and declares members of TrainingCapability, always the same.")
    def test_identity(self, engine: TrainingEngine) -> None:
        assert engine.name
        assert engine.name == engine.name.strip().lower()
        assert isinstance(engine.capabilities, frozenset)
        assert all(isinstance(c, TrainingCapability) for c in engine.capabilities)
        assert engine.capabilities == engine.capabilities
        assert isinstance(engine, TrainingEngine), "it lacks members of the TrainingEngine protocol"

    @check("TRN-002", MUST, "The worker's token travels in the plan's secret_env only, and no repr shows it.")
    def test_plan_holds_no_secret(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        check_secret(engine.launch(launch), launch.token)

    @check("TRN-003", MUST, "The plan names the host, the port and the folder of weights.")
    def test_plan_names_its_address(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        words = words_of(engine.launch(launch))
        for wanted in (launch.host, str(launch.port), str(launch.base_model)):
            assert any(wanted in word for word in words), f"{wanted!r} is nowhere in the command or the environment"

    @check("TRN-004", MUST, "An init argument that does not exist is refused with UnknownArgument, which names it.")
    def test_unknown_argument(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        with pytest.raises(UnknownArgument) as refusal:
            engine.launch(replace(launch, init_args={"xq_no_such_argument": 1}))
        assert refusal.value.name == "xq_no_such_argument"

    @check("TRN-005", MUST, "The same configuration gives the same plan, and making it changes nothing outside.")
    def test_plan_is_pure(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        check_plan_is_pure(lambda: engine.launch(launch))

    @check("TRN-006", MUST, "The plan runs the interpreter it was given, or a script beside it.")
    def test_plan_uses_interpreter(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        python = "/opt/engine-7c1/bin/python"
        check_interpreter(engine.launch(replace(launch, python=python)), python)

    @check("TRN-007", MUST, "The plan shows the worker the devices it was given and no others.")
    def test_plan_assigns_devices(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        check_devices(lambda devices: engine.launch(replace(launch, devices=devices)))
