"""Doors into the mechanisms for code that already exists: PyTorch's layers and functions, and model libraries."""
