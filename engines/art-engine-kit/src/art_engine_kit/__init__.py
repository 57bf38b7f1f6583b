"""What engines and backends exchange: dialects of servers, formats of files and of what crosses between processes.

The names here are what an inference engine's author needs; the formats of checkpoints, of adapters and of a training
worker's jobs are in the modules of their names. Imports no torch, and nothing of any engine.
"""

from .environment import EnvironmentSpec, Flavour, FlavourSpec, cuda_env
from .openai_server import OpenAIServerEngine
from .server_arguments import ServerArguments, users_arguments

__all__ = [
    "EnvironmentSpec",
    "Flavour",
    "FlavourSpec",
    "OpenAIServerEngine",
    "ServerArguments",
    "cuda_env",
    "users_arguments",
]
