"""`InferenceEngineConformance`: everything an inference engine must do, its dialect first, then its running server."""

from __future__ import annotations

from .sampling_checks import SamplingChecks
from .serving_checks import ServingChecks


# pytest runs the checks of the last base first: the one that stops the server comes at the end.
class InferenceEngineConformance(ServingChecks, SamplingChecks):
    """Give the fixture `engine` (scope="class"): an instance of the engine.

    An engine with an environment of its own also gives `engine_python`; `engine_args` are passed through.
    """
