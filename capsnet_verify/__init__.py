"""Whether a capsule network in JAX and one in PyTorch are the same function: the command `capsnet verify`.

The only package that imports both frameworks; `command` alone does without PyTorch until it runs.
"""
