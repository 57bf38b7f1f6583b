"""The host process: models and their checkpoints, steps, leases, and the control API."""
