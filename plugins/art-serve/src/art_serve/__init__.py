"""The durable state of a self-hosted training server: keys and jobs. It knows no backend, no HTTP and no wire."""

from .database import open_database
from .job_queue import Job, JobState, LeaseLost, claim, find_job, finish, fix_step, heartbeat, submit
from .keys import ApiKey, create_key, entity_of, list_keys, revoke_key

__all__ = [
    "ApiKey",
    "Job",
    "JobState",
    "LeaseLost",
    "claim",
    "create_key",
    "entity_of",
    "find_job",
    "finish",
    "fix_step",
    "heartbeat",
    "list_keys",
    "open_database",
    "revoke_key",
    "submit",
]
