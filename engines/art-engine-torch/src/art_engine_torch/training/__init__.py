"""What art-training-kit's worker trains: a transformers model with a PEFT adapter."""
