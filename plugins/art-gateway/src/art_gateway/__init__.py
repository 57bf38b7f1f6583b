"""The OpenAI-compatible endpoint that users talk to, in front of whatever engines a backend runs.

`create_app(routes, api_key=...)` is the ASGI application; `Gateway` the same for a host that mounts it in its own.
"""

from .routes import Route, Routes, RouteUnavailable, ServedModel

__all__ = ["Route", "RouteUnavailable", "Routes", "ServedModel"]
