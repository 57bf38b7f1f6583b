"""The inference engine example."""
