"""The training engine example."""
