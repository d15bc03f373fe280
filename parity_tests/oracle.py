"""A third implementation: the equations in NumPy float64, one number at a time, without einsum or broadcasting."""

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

Values = NDArray[np.float64]


def norm(vector: Values) -> float:
    """Euclidean norm."""
    return math.hypot(*vector)


def squash(vector: Values) -> Values:
    """Sabour et al. (2017), eq. 1."""
    length = norm(vector)
    return np.array([length**2 / (1 + length**2) * value / length for value in vector])


def sigmoid(value: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-value))


def dynamic(
    votes: Values,
    num_iterations: int,
    *,
    leaky: bool = False,
    prior_logits: Values | None = None,
    capsule_bias: Values | None = None,
) -> tuple[Values, Values]:
    """Sabour et al. (2017), procedure 1, for one example: poses `[o h]` and couplings `[i o]`."""
    inputs, outputs, size = votes.shape
    logits = np.zeros((inputs, outputs)) if prior_logits is None else prior_logits.copy()
    couplings = np.zeros((inputs, outputs))
    poses = np.zeros((outputs, size))
    for _ in range(num_iterations):
        for i in range(inputs):
            total = sum(math.exp(logits[i, o]) for o in range(outputs))
            if leaky:
                total += math.exp(0)
            for o in range(outputs):
                couplings[i, o] = math.exp(logits[i, o]) / total
        for o in range(outputs):
            weighted = [sum(couplings[i, o] * votes[i, o, h] for i in range(inputs)) for h in range(size)]
            if capsule_bias is not None:
                weighted = [weighted[h] + capsule_bias[o, h] for h in range(size)]
            poses[o] = squash(np.array(weighted))
        for i in range(inputs):
            for o in range(outputs):
                logits[i, o] += sum(votes[i, o, h] * poses[o, h] for h in range(size))
    return poses, couplings


def em(
    votes: Values,
    activations: Values,
    num_iterations: int,
    *,
    beta_u: Values,
    beta_a: Values,
    inverse_temperature: float,
    annealing: float = 0.95,
    min_variance: float = 0.01,
    epsilon: float = 1e-7,
) -> tuple[Values, Values, Values]:
    """Hinton et al. (2018), procedure 1, for one example: poses `[o h]`, activations `[o]` and couplings `[i o]`.

    With votes `[p i o h]`, the parents of each input capsule are the output capsules at all positions p.
    """
    *positions, inputs, outputs, size = votes.shape
    parents = list(np.ndindex(*positions, outputs))
    couplings = np.full((*positions, inputs, outputs), 1 / len(parents))
    means, variances = np.zeros((2, *positions, outputs, size))
    active = np.zeros((*positions, outputs))
    for iteration in range(num_iterations):
        if iteration > 0:  # E step
            for i in range(inputs):
                joint = []
                for *p, o in parents:
                    density = 1.0
                    for h in range(size):
                        variance = variances[*p, o, h]
                        exponent = -((votes[*p, i, o, h] - means[*p, o, h]) ** 2) / (2 * variance)
                        density *= math.exp(exponent) / math.sqrt(2 * math.pi * variance)
                    joint.append(active[*p, o] * density)
                for n, (*p, o) in enumerate(parents):
                    couplings[*p, i, o] = joint[n] / sum(joint)
        for *p, o in parents:  # M step
            assigned = [activations[*p, i] * couplings[*p, i, o] for i in range(inputs)]
            mass = sum(assigned)
            cost = 0.0
            for h in range(size):
                mean = sum(assigned[i] * votes[*p, i, o, h] for i in range(inputs)) / (mass + epsilon)
                squares = sum(assigned[i] * (votes[*p, i, o, h] - mean) ** 2 for i in range(inputs))
                means[*p, o, h], variances[*p, o, h] = mean, squares / (mass + epsilon) + min_variance
                cost += (beta_u[o] + math.log(math.sqrt(variances[*p, o, h]))) * mass
            temperature = inverse_temperature * (1 - annealing ** (iteration + 1))
            active[*p, o] = sigmoid(temperature * (beta_a[o] - cost / (inputs / outputs)))
    return means, active, couplings


def variational(
    votes: Values,
    activations: Values,
    num_iterations: int,
    *,
    gain: Values,
    beta: Values,
    alpha0: float = 1.0,
    kappa0: float = 1.0,
    psi0: float = 10.0,
    epsilon: float = 1e-7,
    norm_epsilon: float = 1e-5,
) -> tuple[Values, Values, Values]:
    """Ribeiro et al. (2020), algorithm 1, for one example: poses `[o h]`, activations `[o]`, couplings `[i o]`.

    With votes `[p i o h]`, the parents of each input capsule are the output capsules at all positions p.
    """
    *positions, inputs, outputs, size = votes.shape
    parents = list(np.ndindex(*positions, outputs))
    couplings = np.full((*positions, inputs, outputs), 1 / outputs)
    means, precisions = np.zeros((2, *positions, outputs, size))
    mass, log_share, log_determinant, certainty, active = np.zeros((5, *positions, outputs))
    for iteration in range(num_iterations):
        if iteration > 0:  # variational E step
            for i in range(inputs):
                joint = []
                for *p, o in parents:
                    distance = 0.0
                    for h in range(size):
                        distance += precisions[*p, o, h] * (votes[*p, i, o, h] - means[*p, o, h]) ** 2
                    expected = size / (kappa0 + mass[*p, o]) + (size + 1 + mass[*p, o]) * distance
                    joint.append(math.exp(log_share[*p, o]) * math.sqrt(math.exp(log_determinant[*p, o] - expected)))
                for n, (*p, o) in enumerate(parents):
                    couplings[*p, i, o] = joint[n] / sum(joint)
        for *p, o in parents:  # variational M step
            assigned = [activations[*p, i] * couplings[*p, i, o] for i in range(inputs)]
            mass[*p, o] = total = sum(assigned)
            determinant = 2.0**size
            for h in range(size):
                center = sum(assigned[i] * votes[*p, i, o, h] for i in range(inputs)) / (total + epsilon)
                scatter = sum(assigned[i] * (votes[*p, i, o, h] - center) ** 2 for i in range(inputs))
                shrinkage = kappa0 * total * center**2 / (kappa0 + total)
                precisions[*p, o, h] = 1 / (psi0 + scatter + shrinkage)
                determinant *= precisions[*p, o, h]
                means[*p, o, h] = total * center / (kappa0 + total)
            log_determinant[*p, o] = math.log(determinant)
            for d in range(size):
                log_determinant[*p, o] += float(digamma((size + 1 + total - d) / 2))
        for *p, o in parents:
            everything = sum(alpha0 + mass[*p, k] for k in range(outputs))
            log_share[*p, o] = float(digamma(alpha0 + mass[*p, o])) - float(digamma(everything))
    for *p, o in parents:
        entropy = (size * math.log(2 * math.pi * math.e) - log_determinant[*p, o]) / 2
        certainty[*p, o] = -math.exp(log_share[*p, o]) * entropy
    for *p, o in parents:
        mean = sum(certainty[*p, k] for k in range(outputs)) / outputs
        variance = sum((certainty[*p, k] - mean) ** 2 for k in range(outputs)) / outputs
        active[*p, o] = sigmoid(gain[o] * (certainty[*p, o] - mean) / math.sqrt(variance + norm_epsilon) + beta[o])
    return means, active, couplings


def margin_loss(activations: Values, labels: Collection[int]) -> float:
    """Sabour et al. (2017), eq. 4, for one example of these labels."""
    loss = 0.0
    for o, activation in enumerate(activations):
        if o in labels:
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
