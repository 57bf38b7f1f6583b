"""`TrainingEngineConformance`: everything a training engine must do, its launch plan first, then its running worker."""

from __future__ import annotations

from .training_fault_checks import TrainingFaultChecks
from .training_job_checks import TrainingJobChecks
from .training_plan_checks import TrainingPlanChecks


# pytest runs the checks of the last base first: the one that stops the worker comes at the end.
class TrainingEngineConformance(TrainingFaultChecks, TrainingJobChecks, TrainingPlanChecks):
    """Give the fixture `engine` (scope="class"): an instance of the training engine.

    Its worker runs with the interpreter that the installed card of its name leads to.
    """
