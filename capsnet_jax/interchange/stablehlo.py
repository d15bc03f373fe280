"""Export a model as a StableHLO program, which runs with JAX alone and on any number of images."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.export import export, symbolic_shape
from jaxtyping import Array, Float, Int

from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.nn.layers import CapsuleLayer
from capsnet_jax.nn.model import CapsNet

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(model: CapsNet) -> bytes:
    """Export a model in evaluation mode, with its weights, for any number of images and all `PLATFORMS`.

    The program computes `encode_and_decode`, and does not need this package:

        program = jax.export.deserialize(pathlib.Path("model.stablehlo").read_bytes())
        program.call(images)["activations"]

    Matrix products are in full float32 on all platforms, and dynamic routing stores votes.

    Args:
        model: a model with any routing.

    Returns:
        The serialized program, for `jax.export.deserialize`.

    Raises:
        UsageError: the routing cannot be written as StableHLO, for example because it calls back into Python.
    """
    model = nnx.clone(model)
    model.eval()
    for layer in model.capsule_layers:
        if isinstance(layer, CapsuleLayer):
            layer.implementation = "votes"  # "auto" needs to know the number of images
    images = jax.ShapeDtypeStruct((*symbolic_shape("b"), *model.config.image_shape), jnp.float32)
    frames = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)  # tracebacks name folders of this machine
    try:
        with jax.default_matmul_precision("highest"):
            return bytes(export(jax.jit(partial(encode_and_decode, model)), platforms=PLATFORMS)(images).serialize())
    except Exception as error:  # the user's routing may raise anything
        name = model.capsule_layers[-1].routing.name
        raise UsageError(f"The model of routing {name} cannot be written as StableHLO: {in_words(error)}.") from error
    finally:
        jax.config.update("jax_traceback_in_locations_limit", frames)


def encode_and_decode(
    model: CapsNet, images: Float[Array, "b height width channels"], labels: Int[Array, " b"] | None = None
) -> dict[str, Array]:
    """Compute the outputs of an exported model.

    Args:
        model: a model in evaluation mode.
        images: pixels in [0, 1].
        labels: classes to reconstruct from; by default the predicted classes.

    Returns:
        `poses` `[b o h]` and `activations` `[b o]` of the class capsules and, if the model has a decoder,
        `reconstructions` `[b height width channels]`.
    """
    return {name: array for name, array in model(images, labels)._asdict().items() if array is not None}
