"""The inference engine llamacpp for ART."""
