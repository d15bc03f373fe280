"""A model as a StableHLO program: a file that runs with JAX alone, on any number of images."""

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
    """The model in evaluation mode, its weights inside, for any number of images and for each of `PLATFORMS`.

    The program is the function `encode_and_decode`, and needs no code of this package:

        program = jax.export.deserialize(pathlib.Path("model.stablehlo").read_bytes())
        program.call(images)["activations"]

    Dynamic routing is from votes. Products are in full float32 on all platforms.

    Args:
        model: of any routing.

    Returns:
        What `jax.export.deserialize` reads.

    Raises:
        UsageError: the routing does what no StableHLO program can, such as to call Python.
    """
    model = nnx.clone(model)
    model.eval()
    for layer in model.capsule_layers:
        if isinstance(layer, CapsuleLayer):
            layer.implementation = "votes"  # others depend on the number of images
    images = jax.ShapeDtypeStruct((*symbolic_shape("b"), *model.config.image_shape), jnp.float32)
    frames = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)  # which would name the folders of this machine
    try:
        with jax.default_matmul_precision("highest"):
            return bytes(export(jax.jit(partial(encode_and_decode, model)), platforms=PLATFORMS)(images).serialize())
    except Exception as error:  # a routing of the user's own may do anything
        name = model.capsule_layers[-1].routing.name
        raise UsageError(f"The model of routing {name} cannot be written as StableHLO: {in_words(error)}.") from error
    finally:
        jax.config.update("jax_traceback_in_locations_limit", frames)


def encode_and_decode(
    model: CapsNet, images: Float[Array, "b height width channels"], labels: Int[Array, " b"] | None = None
) -> dict[str, Array]:
    """What an exported model makes of images.

    Args:
        model: in evaluation mode.
        images: with pixels in [0, 1].
        labels: the classes from whose capsules images are reconstructed; by default the most active ones.

    Returns:
        `poses` `[b o h]` and `activations` `[b o]` of the class capsules and, if the model has a decoder,
        `reconstructions` `[b height width channels]`.
    """
    capsules = model.encode(images)
    outputs = {"poses": capsules.poses, "activations": capsules.activations}
    if model.decoder is not None:
        labels = capsules.activations.argmax(axis=1) if labels is None else labels
        outputs["reconstructions"] = model.decode(capsules.poses, labels)
    return outputs
