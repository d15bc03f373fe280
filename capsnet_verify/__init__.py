"""Compare a capsule network in JAX with one in PyTorch, value by value: the package behind `capsnet verify`.

Unlike `capsnet_jax` and `capsnet_torch`, this package imports both frameworks. The "JAX side" of a comparison is a
model of `capsnet_jax`; the "PyTorch side" is its twin, the same model in `capsnet_torch`, or any other module.

Examples:
    >>> from capsnet_verify import Settings, of_routing, sentence, verify
    >>> verification = verify(of_routing("uniform"), Settings(steps=0, batch_size=3))
    >>> sentence(verification)  # doctest: +ELLIPSIS
    'JAX and PyTorch agree in all 24 checks of routing uniform: values within ...'

- `of_routing`, `of_preset`, `of_model`, `of_files`: what is verified. It is a small model with a routing, registered or
  your own; a preset; a model of any sizes; or trained weights.
- `Settings`: precision, number of training steps, the routing of the PyTorch side and so on.
- `verify` returns a `Verification`: all checks, and the likely cause of the first difference. `describe` formats it as
  a table, `sentence` as one sentence.
"""

from capsnet_verify.report import describe, sentence
from capsnet_verify.subjects import Settings, Subject, of_files, of_model, of_preset, of_routing
from capsnet_verify.verification import Verification, verify

__all__ = [
    "Settings",
    "Subject",
    "Verification",
    "describe",
    "of_files",
    "of_model",
    "of_preset",
    "of_routing",
    "sentence",
    "verify",
]
