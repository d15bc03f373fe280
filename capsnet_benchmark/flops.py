"""How much the model has to compute, by the direct algorithm."""

import math
from itertools import pairwise

from capsnet_jax.config import ModelConfig
from capsnet_jax.ops import positions_after


def training_flops(config: ModelConfig) -> int:
    """Floating-point operations of a training step for each image.

    Of each layer forward, and twice that backward: for the gradients by its weights and by what it sees. The latter is
    not needed of the lowest convolution, which sees the image. An algorithm with fewer multiplications than the direct
    one, such as a convolution by Fourier transforms, can be faster than these operations could be done at all.

    Raises:
        UsageError: the images are smaller than what the convolutions need.
    """
    forward = forward_flops(config)
    return 3 * sum(forward) - forward[0]


def forward_flops(config: ModelConfig) -> list[int]:
    """Floating-point operations of each layer for an image, from the lowest convolution: twice its multiplications.

    A convolution has positions x kernel area x channels in x channels out of them; a vote as many as its pose
    transformation has; a dense layer as many as weights. Routing, biases and all functions of one number are left out;
    they are less than a hundredth of the reference model's 0.40 GFLOP.

    Raises:
        UsageError: the images are smaller than what the convolutions need.
    """
    height, width, channels = config.image_shape
    primary_channels = config.primary_groups * (config.primary_dim + (config.primary_activation == "sigmoid"))
    convolutions = [
        *config.stem_convolutions,
        (primary_channels, config.primary_kernel, config.primary_stride),
    ]
    _ = config.primary_grid  # refuses images that are too small
    grid = height, width
    multiplications = []
    for number, (out, kernel, stride) in enumerate(convolutions, 1):
        grid = positions_after(grid, (kernel, kernel), stride)
        seen = 1 if config.primary_depthwise and number == len(convolutions) else channels
        multiplications.append(math.prod(grid) * kernel**2 * seen * out)
        channels = out

    groups, dim = config.primary_groups, config.primary_dim
    rows = math.isqrt(dim) if config.matrix_poses else 1  # of a pose, which is transformed row by row
    for out, out_dim, kernel, stride in config.conv_capsules:
        grid = positions_after(grid, (kernel, kernel), stride)
        multiplications.append(math.prod(grid) * kernel**2 * groups * out * dim * out_dim // rows)
        groups, dim = out, out_dim
    capsules = math.prod(grid) * groups
    for out, out_dim in (*config.hidden_capsules, (config.num_classes, config.class_dim)):
        multiplications.append(capsules * out * dim * out_dim // rows)
        capsules, dim = out, out_dim

    if config.decoder_hidden is not None:
        widths = (config.num_classes * config.class_dim, *config.decoder_hidden, math.prod(config.image_shape))
        multiplications += [below * above for below, above in pairwise(widths)]
    return [2 * number for number in multiplications]
