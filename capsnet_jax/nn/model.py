"""The capsule network: an encoder of images to capsules, and a decoder of capsules back to an image."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.nn.decoder import Decoder
from capsnet_jax.nn.encoder import Encoder, grid_of_primary_capsules, new_capsule_layers
from capsnet_jax.nn.initializers import SCHEMES
from capsnet_jax.nn.layers import PrimaryCapsules
from capsnet_jax.nn.stem import Stem
from capsnet_jax.ops import Labels, mask_by_label
from capsnet_jax.routing import get_routing


class CapsNet(nnx.Module):
    """A capsule network; the defaults are the reference model, 8.2 million weights on MNIST.

    A new model is in evaluation mode; `model.train()` lets batch normalisation, where there is any, see the batch.

    Args:
        image_shape: height, width and number of channels of the images.
        num_classes: number of classes, each with one capsule.
        stem_below: number of channels and kernel size of convolutions, of stride 1, below the last one of the stem.
        stem_channels: number of channels of the last convolution of the stem.
        stem_kernel: kernel size of that convolution, in pixels.
        stem_stride: stride of that convolution.
        batch_norm: whether there is a batch normalisation after each convolution of the stem.
        primary_groups: number of primary capsules at each position.
        primary_dim: pose size of the primary capsules.
        primary_kernel: kernel size of the primary capsules.
        primary_stride: stride of the primary capsules.
        primary_scale: factor of the primary poses; see `PrimaryCapsules`.
        primary_depthwise: whether each channel of the primary capsules sees one channel of the features.
        primary_squash: "none", "squash" or "exponential"; see `PrimaryCapsules`.
        primary_activation: "norm" or "sigmoid"; see `PrimaryCapsules`.
        conv_capsules: groups, pose size, kernel size and stride of each layer of convolutional capsules.
        matrix_poses: poses above the primary capsules are square matrices; see `ConvCapsules`.
        hidden_capsules: number and pose size of the capsules of each layer between those and the class capsules.
        class_dim: pose size of the class capsules.
        shared_class_transform: a group of capsules has one transformation to the class capsules for all of its
            positions, and the position is added to the votes; see `ConvCapsules`.
        decoder_hidden: widths of the two hidden layers of the decoder; None for no decoder.
        decoder_bias: whether the outer layers of the decoder have a bias.
        initial_weights: "torch" or "official", a name in `initializers.SCHEMES`.
        routing: a name in `ROUTINGS`, `package.module:function`, or the function itself; for all capsule layers. See
            `get_routing`.
        num_iterations: number of routing iterations.
        routing_implementation: "votes", "fused" or "auto"; see `CapsuleLayer`.
        standardize_images: whether each image by itself is given mean 0 and deviation 1 before the first layer; see
            `ops.standardize_images`. Reconstructions are of the images as they are.
        recompute_routing: whether votes and routing are computed again in the backward pass, in place of being kept
            for it: less memory for more time.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.

    Raises:
        UsageError: the images are smaller than what the convolutions need, sizes do not fit, a name or the routing is
            unknown, or the routing returns what it should not.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), section 4; in the variant of
        https://github.com/arogozhnikov/readable_capsnet
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        stem_below: Sequence[tuple[int, int]] = (),
        stem_channels: int = 256,
        stem_kernel: int = 9,
        stem_stride: int = 1,
        batch_norm: bool = False,
        primary_groups: int = 32,
        primary_dim: int = 8,
        primary_kernel: int = 9,
        primary_stride: int = 2,
        primary_scale: float = 0.01,
        primary_depthwise: bool = False,
        primary_squash: str = "none",
        primary_activation: str = "norm",
        conv_capsules: Sequence[tuple[int, int, int, int]] = (),
        matrix_poses: bool = False,
        hidden_capsules: Sequence[tuple[int, int]] = (),
        class_dim: int = 16,
        shared_class_transform: bool = False,
        decoder_hidden: tuple[int, int] | None = (512, 1024),
        decoder_bias: bool = False,
        initial_weights: str = "torch",
        routing: str | Callable[..., Routed] = "dynamic",
        num_iterations: int = 3,
        routing_implementation: str = "auto",
        standardize_images: bool = False,
        recompute_routing: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if initial_weights not in SCHEMES:
            raise UsageError(f"initial_weights is {initial_weights!r}; expected {', '.join(SCHEMES)}.")
        scheme = SCHEMES[initial_weights]
        convolutions = [(channels, kernel, 1) for channels, kernel in stem_below]
        convolutions.append((stem_channels, stem_kernel, stem_stride))
        grid = grid_of_primary_capsules(
            image_shape,
            [(kernel, stride) for _, kernel, stride in convolutions] + [(primary_kernel, primary_stride)],
            [(kernel, stride) for _, _, kernel, stride in conv_capsules],
        )
        stem = Stem(
            image_shape[-1],
            convolutions,
            batch_norm=batch_norm,
            standardize=standardize_images,
            scheme=scheme,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        primary_capsules = PrimaryCapsules(
            stem_channels,
            primary_groups,
            primary_dim,
            kernel_size=primary_kernel,
            stride=primary_stride,
            scale=primary_scale,
            depthwise=primary_depthwise,
            squash=primary_squash,
            activation=primary_activation,
            scheme=scheme,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        capsule_layers = new_capsule_layers(
            grid,
            (primary_groups, primary_dim),
            conv_capsules,
            [*hidden_capsules, (num_classes, class_dim)],
            matrix_poses=matrix_poses,
            shared_class_transform=shared_class_transform,
            implementation=routing_implementation,
            routing=get_routing(routing, num_iterations=num_iterations),
            recompute=recompute_routing,
            initializer=scheme.einsum,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        height, width, channels = image_shape
        self.image_shape = (height, width, channels)
        self.encoder = Encoder(stem, primary_capsules, capsule_layers)
        self.decoder = (
            None
            if decoder_hidden is None
            else Decoder(
                num_classes,
                class_dim,
                decoder_hidden,
                self.image_shape,
                outer_bias=decoder_bias,
                scheme=scheme,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        )
        self.eval()
        # A dry run: what is wrong with a routing is found here, not in the first training step.
        try:
            jax.eval_shape(self.encode, jax.ShapeDtypeStruct((1, *image_shape), param_dtype))
        except UsageError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise UsageError(f"Routing {routing} raises {in_words(error)}.") from error

    def encode(self, images: Float[Array, "b height width channels"]) -> Capsules:
        """The class capsules of images in [0, 1]; the predicted class is the one of the largest activation.

        Raises:
            UsageError: the images are not of the shape that the model was made for.
        """
        if images.shape[1:] != self.image_shape:
            raise UsageError(f"Images are of shape {images.shape[1:]}, and the model was made for {self.image_shape}.")
        return self.encoder(images)

    def decode(self, poses: Float[Array, "b o h"], labels: Labels) -> Float[Array, "b height width channels"]:
        """The images that the capsules of the labels stand for, with pixels in (0, 1).

        Args:
            poses: those of the class capsules.
            labels: class indices, one or several for each image.

        Raises:
            UsageError: the model has no decoder.
        """
        if self.decoder is None:
            raise UsageError("The model has no decoder; decoder_hidden is None.")
        return self.decoder(mask_by_label(poses, labels))
