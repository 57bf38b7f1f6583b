"""Launch plans and dialect of the fake engines."""

import json
import os
from pathlib import Path

from art_core import EngineCall, InferenceCapability, LaunchPlan, TrainingCapability
from art_core.errors import EngineRefused, UnknownArgument
from art_engine_kit.training_wire import WORKER_TOKEN

SOURCE = str(Path(__file__).parents[1])


def _env():
    path = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path}


class FakeInference:
    name = "fake"
    capabilities = frozenset({InferenceCapability.CONCURRENT_TRAINING, InferenceCapability.PAUSE})

    def launch(self, config):
        for argument in config.engine_args:
            raise UnknownArgument(argument, where="engine_args of the fake engine", known=())
        return LaunchPlan(
            argv=(config.python, "-m", "art_fake_engine.inference_server", str(config.port), str(config.max_adapters)),
            env=_env(),
            secret_env={"FAKE_KEY": config.api_key},
            ready_timeout_s=30,
            stop_timeout_s=2,
        )

    def load_adapter(self, adapter, folder):
        return EngineCall(method="POST", path="/load", json={"name": adapter, "path": str(folder)}, action="load")

    def unload_adapter(self, adapter):
        return EngineCall(method="POST", path="/unload", json={"name": adapter}, action="unload")

    def list_adapters(self):
        return EngineCall(method="GET", path="/adapters", action="list its adapters")

    def read_adapters(self, body):
        return frozenset(json.loads(body))

    def pause(self):
        return EngineCall(method="POST", path="/pause", action="pause")

    def resume(self):
        return EngineCall(method="POST", path="/resume", action="resume")

    def check_answer(self, call, status, body):
        if not 200 <= status < 300:
            raise EngineRefused(self.name, call.action, f"HTTP {status}: {body[:2000].decode(errors='replace')}")

    def prepare_request(self, endpoint, body, adapter):
        return {**body, "model": adapter or "base"}

    def read_response(self, endpoint, body):
        if "token_ids" not in body["choices"][0]:
            raise EngineRefused(self.name, "answer", "no token ids")
        return body

    def read_chunk(self, endpoint, chunk):
        return chunk


class FakeShared(FakeInference):
    name = "fake-shared"
    capabilities = frozenset({InferenceCapability.PAUSE})


class FakeTraining:
    name = "fake"
    capabilities = frozenset({TrainingCapability.EXACT_RESUME})

    def launch(self, config):
        return LaunchPlan(
            argv=(config.python, "-m", "art_fake_engine.training_worker", str(config.port)),
            env=_env(),
            secret_env={WORKER_TOKEN: config.token},
            ready_timeout_s=30,
            stop_timeout_s=2,
        )
