"""The torch server on SmolLM2: its samples are those of the weights to the third decimal."""

from __future__ import annotations

import pytest

from art_conformance.served_weights import ServedWeights
from art_core import InferenceEngine
from art_engine_torch.inference_engine import TorchInferenceEngine


class TestTorchServes(ServedWeights):
    mean_limit = 1e-3
    outside_limit = 1e-3

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> InferenceEngine:
        return TorchInferenceEngine()
