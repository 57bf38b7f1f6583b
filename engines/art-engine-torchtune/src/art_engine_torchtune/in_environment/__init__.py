"""What art-training-kit's worker trains in torchtune's environment: nothing here is imported in the client's."""
