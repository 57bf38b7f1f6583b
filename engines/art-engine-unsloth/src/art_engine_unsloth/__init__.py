"""Unsloth as a training engine of ART. Importing it loads neither Unsloth nor torch."""
