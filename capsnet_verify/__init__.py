"""Compare a capsule network in JAX with one in PyTorch, value by value: the package behind `capsnet verify`.

Unlike `capsnet_jax` and `capsnet_torch`, this package imports both frameworks. The "JAX side" of a comparison is a
model of `capsnet_jax`; the "PyTorch side" is its twin, the same model in `capsnet_torch`, or any other module.
"""
