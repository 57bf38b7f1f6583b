"""`InferenceEngineConformance`: everything an inference engine must do, its dialect first, then its running server."""

from __future__ import annotations

from .live_engine_checks import LiveEngineChecks


class InferenceEngineConformance(LiveEngineChecks):
    """Give the fixture `engine` (scope="class"): an instance of the engine.

    An engine with an environment of its own also gives `engine_python`; `engine_args` are passed through.
    """
