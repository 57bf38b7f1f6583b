"""The backend example."""
