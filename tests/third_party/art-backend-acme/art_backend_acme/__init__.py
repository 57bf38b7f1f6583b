"""Acme's backend, for ART to find."""

from art_core import BackendCapability, BackendSpec, hookimpl

art_api = 1


@hookimpl
def art_register_backends():
    return [
        BackendSpec(
            name="acme",
            factory="art_backend_acme.backend:AcmeBackend",
            summary="One process that samples and trains in turn.",
            capabilities=frozenset({BackendCapability.CHECKPOINTS_ON_DISK}),
        )
    ]
