"""Inference servers and training workers: started or the user's, watched, brought back, given adapters."""
