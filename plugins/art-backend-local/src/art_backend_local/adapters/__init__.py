"""A model's first adapter, and copies of later ones. Files only."""
