"""What art-backend-example registers. Imported whenever plugins are listed, so it imports nothing heavy."""

from collections.abc import Iterable

from art_core import BackendCapability, BackendSpec, hookimpl

art_api = 1

CAPABILITIES = frozenset({BackendCapability.CHECKPOINTS_ON_DISK, BackendCapability.PUBLICATION_HOOKS})  # yours


@hookimpl
def art_register_backends() -> Iterable[BackendSpec]:
    return [
        BackendSpec(
            name="example",
            factory="art_backend_example.backend:ExampleBackend",
            summary="One process that samples and trains in turn.",  # yours
            capabilities=CAPABILITIES,
        )
    ]
