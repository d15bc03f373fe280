"""What is below the capsules: convolutions, with ReLU and batch normalisation."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from capsnet_jax.errors import UsageError
from capsnet_jax.nn.fast.convolution import convolve, depthwise
from capsnet_jax.nn.initializers import TORCH, Initializer, Scheme, new_param
from capsnet_jax.ops import standardize_images

Images = Float[Array, "b height width channels"]
Features = Float[Array, "b out_height out_width features"]


class Convolution(nnx.Module):
    """A convolution without padding, plus a bias.

    Args:
        in_channels: number of channels of the images.
        out_channels: number of channels of the result.
        kernel_size: height and width of the kernel, in pixels.
        stride: step of the kernel, in pixels.
        depthwise: each channel has a filter of its own, and sees no other; needs as many channels out as in.
        kernel_initializer: distribution of the kernel, given the number of inputs of an output.
        bias_initializer: distribution of the bias.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.

    Raises:
        UsageError: the numbers of channels of a depthwise convolution differ.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        depthwise: bool = False,
        kernel_initializer: Callable[[int], Initializer] = TORCH.kernel,
        bias_initializer: Callable[[int], Initializer] = TORCH.bias,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if depthwise and in_channels != out_channels:
            raise UsageError(f"A depthwise convolution has {out_channels} channels for the {in_channels} it sees.")
        self.stride = stride
        self.depthwise = depthwise
        seen = 1 if depthwise else in_channels
        fan_in = seen * kernel_size**2
        shape = (kernel_size, kernel_size, seen, out_channels)
        self.kernel = new_param(kernel_initializer(fan_in), shape, param_dtype, rngs)
        self.bias = new_param(bias_initializer(fan_in), (out_channels,), param_dtype, rngs)

    def __call__(self, images: Images) -> Features:
        product = self.without_bias(images)
        return (product + self.bias[...]).astype(product.dtype)

    def without_bias(self, images: Images) -> Features:
        """The products alone, in the dtype of the kernel."""
        kernel = self.kernel[...]
        return (depthwise if self.depthwise else convolve)(images.astype(kernel.dtype), kernel, self.stride)


class Stem(nnx.Module):
    """Images to features: convolutions, each followed by ReLU and, if wanted, batch normalisation.

    Args:
        in_channels: number of channels of the images.
        convolutions: number of channels, kernel size and stride of each.
        batch_norm: whether features are normalised. In training they then depend on the whole batch; in evaluation
            the running means of training take its place.
        standardize: whether each image is standardised by itself first; see `standardize_images`.
        scheme: distributions of the weights.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        convolutions: Sequence[tuple[int, int, int]],
        *,
        batch_norm: bool = False,
        standardize: bool = False,
        scheme: Scheme = TORCH,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.standardize = standardize
        channels = [in_channels, *(out_channels for out_channels, _, _ in convolutions)]
        self.convolutions = nnx.List(
            [
                Convolution(
                    channels[number],
                    out_channels,
                    kernel_size=kernel_size,
                    stride=stride,
                    kernel_initializer=scheme.stem,
                    bias_initializer=scheme.bias,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                for number, (out_channels, kernel_size, stride) in enumerate(convolutions)
            ]
        )
        dtype = jnp.promote_types(param_dtype, jnp.float32)
        # The constants are Keras', with which Efficient-CapsNet was trained.
        new_norm = partial(nnx.BatchNorm, momentum=0.99, epsilon=1e-3, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.norms = nnx.List([new_norm(out_channels) for out_channels in channels[1:] if batch_norm])
        for norm in self.norms:  # Flax keeps running means in float32 whatever the weights are in
            norm.mean, norm.var = (nnx.BatchStat(stat[...].astype(dtype)) for stat in (norm.mean, norm.var))

    def __call__(self, images: Images) -> Features:
        return self.features(images)[-1]

    def features(self, images: Images) -> list[Features]:
        """What comes of each convolution, in order."""
        features = [standardize_images(images) if self.standardize else images]
        for number, convolution in enumerate(self.convolutions):
            rectified = jax.nn.relu(convolution(features[-1]))
            features.append(self.norms[number](rectified) if self.norms else rectified)
        return features[1:]
