"""Small models to export, and the outputs that an exported file should return."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.presets import PRESETS
from capsnet_jax.routing import ROUTINGS
from tests.conftest import IMAGE_SHAPE, SMALL

BATCH_SIZES = (1, 17)
# Sizes that make a small model of each preset.
PRESET_SIZES = {
    "readable": SMALL,
    "official": SMALL,
    "efficient": {"stem_below": ((5, 3), (6, 2)), "stem_channels": 8, "primary_kernel": 2, "decoder_hidden": (12, 14)}
    | {"primary_groups": 2, "primary_dim": 4, "class_dim": 5},
    "em": {"stem_channels": 6, "stem_kernel": 2, "primary_groups": 2, "conv_capsules": ((3, 16, 2, 1), (2, 16, 2, 1))},
    "digits": SMALL | {"primary_kernel": 2},
}
CASES = {f"preset {name}": vars(PRESETS[name].model) | sizes for name, sizes in PRESET_SIZES.items()}
# Few kernel taps and no decoder, to compile quickly.
TINY = SMALL | {"stem_kernel": 2, "primary_kernel": 2, "decoder_hidden": None, "num_iterations": 2}
TINY |= {"primary_activation": "sigmoid"}
CASES |= {name: TINY | {"routing": name} for name in ROUTINGS}
CASES["fused"] = TINY | {"routing_implementation": "fused", "recompute_routing": True, "standardize_images": True}
# With short votes, its activations are differences of nearly equal numbers. The model itself then differs by 3e-5
# between batches of 1 and 17.
CASES["variational"] |= {"primary_scale": 10.0}


def new_model(seed: int, **options) -> CapsNet:
    """A model with random routing weights, which start from a constant."""
    model = CapsNet(**options | {"image_shape": IMAGE_SHAPE, "num_classes": 10}, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for layer in model.capsule_layers:
        for weight in layer.routing_weights.values():
            weight[...] += jnp.asarray(0.1 * rng.normal(size=weight.shape), jnp.float32)
    return model


def new_images(number: int) -> np.ndarray:
    return np.random.default_rng(7).random((number, *IMAGE_SHAPE), np.float32)


def responses(model: CapsNet, images: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs that an exported file should return, with the most active class found by NumPy."""
    poses, activations = jax.device_get(jax.jit(model.encode)(images))
    expected = {"poses": poses, "activations": activations}
    if model.decoder is not None:
        two_most_active = np.sort(activations)[:, -2:]
        assert (np.diff(two_most_active) > 1e-5 * two_most_active[:, :1]).all()
        expected["reconstructions"] = jax.device_get(jax.jit(model.decode)(poses, activations.argmax(axis=1)))
    return expected
