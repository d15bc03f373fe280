"""A third opinion: the equations in NumPy float64, one number at a time, with no einsum and no broadcasting."""

import math

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def norm(vector: Values) -> float:
    """Euclidean norm."""
    return math.hypot(*vector)


def squash(vector: Values) -> Values:
    """Sabour et al. (2017), eq. 1."""
    length = norm(vector)
    return np.array([length**2 / (1 + length**2) * value / length for value in vector])


def dynamic(votes: Values, num_iterations: int) -> tuple[Values, Values]:
    """Sabour et al. (2017), procedure 1, for one example: poses `[o h]` and couplings `[i o]`."""
    inputs, outputs, size = votes.shape
    logits = np.zeros((inputs, outputs))
    couplings = np.zeros((inputs, outputs))
    poses = np.zeros((outputs, size))
    for _ in range(num_iterations):
        for i in range(inputs):
            total = sum(math.exp(logits[i, o]) for o in range(outputs))
            for o in range(outputs):
                couplings[i, o] = math.exp(logits[i, o]) / total
        for o in range(outputs):
            weighted = [sum(couplings[i, o] * votes[i, o, h] for i in range(inputs)) for h in range(size)]
            poses[o] = squash(np.array(weighted))
        for i in range(inputs):
            for o in range(outputs):
                logits[i, o] += sum(votes[i, o, h] * poses[o, h] for h in range(size))
    return poses, couplings


def margin_loss(activations: Values, label: int) -> float:
    """Sabour et al. (2017), eq. 4, for one example."""
    loss = 0.0
    for o, activation in enumerate(activations):
        if o == label:
            loss += max(0.0, 0.9 - activation) ** 2
        else:
            loss += 0.5 * max(0.0, activation - 0.1) ** 2
    return loss


def convolve(image: Values, kernel: Values, bias: Values, stride: int) -> Values:
    """Cross-correlation of `[height width channels]` with `[features channels height width]`, without padding."""
    features, channels, kernel_height, kernel_width = kernel.shape
    height = (image.shape[0] - kernel_height) // stride + 1
    width = (image.shape[1] - kernel_width) // stride + 1
    result = np.zeros((height, width, features))
    for y in range(height):
        for x in range(width):
            for feature in range(features):
                total = bias[feature]
                for channel in range(channels):
                    for row in range(kernel_height):
                        for column in range(kernel_width):
                            pixel = image[y * stride + row, x * stride + column, channel]
                            total += pixel * kernel[feature, channel, row, column]
                result[y, x, feature] = total
    return result


def encode(image: Values, state: dict[str, Values], *, groups: int, stride: int, scale: float) -> Values:
    """Poses of the class capsules of one image, from the state_dict of the reference model."""
    prefix = "encoder.image2primary_capsules"
    features = convolve(image, state[f"{prefix}.0.weight"], state[f"{prefix}.0.bias"], 1)
    features = convolve(np.maximum(features, 0), state[f"{prefix}.2.weight"], state[f"{prefix}.2.bias"], stride)
    capsules = []
    for y in range(features.shape[0]):
        for x in range(features.shape[1]):
            dim = features.shape[2] // groups
            for group in range(groups):
                capsules.append([scale * features[y, x, group * dim + d] for d in range(dim)])
    weight = state["encoder.primary2digit_capsules.input_caps2U.weight"]
    inputs, dim, outputs, size = weight.shape
    votes = np.zeros((inputs, outputs, size))
    for i in range(inputs):
        for o in range(outputs):
            for h in range(size):
                votes[i, o, h] = sum(capsules[i][d] * weight[i, d, o, h] for d in range(dim))
    return dynamic(votes, 3)[0]


def decode(pose: Values, label: int, state: dict[str, Values]) -> Values:
    """Image `[channels height width]` from the capsule of one class."""
    first = state["decoder.0.weight"]
    hidden = [max(0.0, sum(pose[h] * first[label, h, f] for h in range(len(pose)))) for f in range(first.shape[2])]
    weight, bias = state["decoder.2.weight"], state["decoder.2.bias"]
    hidden = [max(0.0, bias[f] + sum(weight[f, k] * hidden[k] for k in range(len(hidden)))) for f in range(len(bias))]
    last = state["decoder.4.weight"]
    image = np.zeros(last.shape[1:])
    for index in np.ndindex(*image.shape):
        image[index] = 1 / (1 + math.exp(-sum(hidden[f] * last[(f, *index)] for f in range(len(hidden)))))
    return image
