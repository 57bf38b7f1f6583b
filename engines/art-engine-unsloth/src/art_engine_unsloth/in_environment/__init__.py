"""What art-training-kit's worker trains in Unsloth's environment: nothing here is imported in the client's."""
