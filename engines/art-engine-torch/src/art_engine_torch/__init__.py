"""Engine torch, the embedded default for inference and training, on transformers and PEFT.

Importing it loads neither.
"""
