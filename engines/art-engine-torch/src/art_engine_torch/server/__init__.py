"""The inference server: a process of its own, `python -m art_engine_torch.server`."""
