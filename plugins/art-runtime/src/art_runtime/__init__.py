"""Runs launch plans on this machine: processes tied to their owner's life, ports that are ours, the machine's devices.

Everything a backend needs to run an engine or a worker as a process; nothing here knows what the process does.
"""

from .devices import Accelerator, accelerators
from .ports import check_port_is_ours, free_port
from .spawning import Child, last_lines, spawn_detached, spawn_tethered
from .supervision import ProcessExit, StartProgress, SupervisedProcess

__all__ = [
    "Accelerator",
    "Child",
    "ProcessExit",
    "StartProgress",
    "SupervisedProcess",
    "accelerators",
    "check_port_is_ours",
    "free_port",
    "last_lines",
    "spawn_detached",
    "spawn_tethered",
]
