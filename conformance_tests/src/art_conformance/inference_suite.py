"""`InferenceEngineConformance`: everything an inference engine must do, its dialect first, then its running server."""

from __future__ import annotations

from .sampling_checks import SamplingChecks
from .serving_checks import ServingChecks


# pytest runs the checks of the last base first: the one that stops the server comes at the end.
class InferenceEngineConformance(ServingChecks, SamplingChecks):
    """Give the fixture `engine` (scope="class"): an instance of the engine.

    Its server runs with the interpreter that the installed card of its name leads to; `flavour` chooses another of its
    environments than this machine's, and `engine_args` are passed through.
    """
