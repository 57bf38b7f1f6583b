"""The inference engine transformers for ART."""
