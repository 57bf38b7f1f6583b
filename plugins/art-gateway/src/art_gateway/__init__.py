"""The OpenAI-compatible endpoint that users talk to, in front of whatever engines a backend runs.

`create_app(routes, api_key=...)` is the ASGI application; `Gateway` the same for a host that mounts it in its own.
"""

from .app import Gateway, create_app
from .limits import SERVER_OPTIONS, GatewayLimits
from .open_files import Listener, raise_file_limit, requests_at_once
from .routes import Route, Routes, RouteUnavailable, ServedModel

__all__ = [
    "SERVER_OPTIONS",
    "Gateway",
    "GatewayLimits",
    "Listener",
    "Route",
    "RouteUnavailable",
    "Routes",
    "ServedModel",
    "create_app",
    "raise_file_limit",
    "requests_at_once",
]
