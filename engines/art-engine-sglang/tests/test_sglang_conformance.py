"""The conformance suite on a real SGLang server, in the environment that art-runtime makes for it."""

from __future__ import annotations

from typing import ClassVar

import pytest

from art_conformance import InferenceEngineConformance
from art_core import InferenceEngine
from art_engine_sglang.inference_engine import SglangInferenceEngine
from art_engine_sglang.plugin import art_register_inference_engines
from art_runtime.environments import python_for


@pytest.mark.slow
@pytest.mark.timeout(1500)
class TestSglang(InferenceEngineConformance):
    known_failures: ClassVar = {"INF-110": "SGLang heeds a seed only in a mode that its CPU path doesn't have."}

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> InferenceEngine:
        return SglangInferenceEngine("cpu")

    @pytest.fixture(scope="class")
    @classmethod
    def engine_python(cls) -> str:
        [spec] = art_register_inference_engines()
        return python_for(spec, flavour="cpu")
