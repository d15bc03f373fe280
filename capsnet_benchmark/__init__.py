"""Measure time and memory of the JAX model and the PyTorch model, in separate processes that take turns."""
