"""What a model gets right and wrong: errors by class, how sure its capsules are, and how well it reconstructs."""

import math
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from capsnet_jax.nn.losses import reconstruction_loss
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.ops import to_unit_range
from capsnet_jax.train.evaluation import EVALUATION_BATCH

Z95 = 1.959963984540054  # standard deviations that 95 % of a normal distribution are within
Labels = Int[np.ndarray, "images *k"]


class Responses(NamedTuple):
    """What a model makes of images.

    Attributes:
        activations: of the class capsules.
        reconstruction_errors: mean squared error over the pixels and channels of each image, which lie in [0, 1], as
            reconstructed from the capsules of the labels; None without labels, or for a model without a decoder.
    """

    activations: Float[np.ndarray, "images o"]
    reconstruction_errors: Float[np.ndarray, " images"] | None


class Assessment(NamedTuple):
    """Right and wrong answers, and how sure they are; None is what there is not.

    Attributes:
        num_correct: images whose most active capsules are exactly those of the labels.
        num_images: all images.
        counts: for each class, how many images have it.
        precision: for each class, the share of right ones among the images that it is predicted for.
        recall: for each class, the share of images that it is predicted for among those that have it.
        confusion: how many images of a class (row) are taken for a class (column); None if images have several labels.
        right_activation: of the capsules of the labels, mean.
        runner_up_activation: of the most active one of all other capsules, mean over the images.
        reconstruction_error: mean squared error of a pixel in [0, 1], from the capsules of the labels.
    """

    num_correct: int
    num_images: int
    counts: tuple[int, ...]
    precision: tuple[float | None, ...]
    recall: tuple[float | None, ...]
    confusion: Int[np.ndarray, "o o"] | None
    right_activation: float
    runner_up_activation: float | None
    reconstruction_error: float | None

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_correct / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        """Where the accuracy is, to 95 %, on images drawn as these were; see `wilson_interval`."""
        return wilson_interval(self.num_correct, self.num_images)


def assess(
    model: CapsNet,
    images: Shaped[np.ndarray, "images height width channels"],
    labels: Labels,
    *,
    batch_size: int = EVALUATION_BATCH,
) -> Assessment:
    """Answers of a model on all images, each counted exactly once, against the labels.

    Args:
        model: a trained model.
        images: as in a `Dataset`.
        labels: class indices; one for each image, or k different ones `[images k]`.
        batch_size: images in one program call.

    Raises:
        UsageError: the images are not of the shape that the model was made for.
    """
    return judge(respond(model, images, labels, batch_size=batch_size), labels)


def respond(
    model: CapsNet,
    images: Shaped[np.ndarray, "images height width channels"],
    labels: Labels | None = None,
    *,
    batch_size: int = EVALUATION_BATCH,
) -> Responses:
    """Activations of the class capsules for all images, and errors of reconstructions where labels are given.

    Args:
        model: a trained model.
        images: as in a `Dataset`.
        labels: class indices; one for each image, or k different ones.
        batch_size: images in one program call; the last batch is padded with images whose results are dropped.

    Raises:
        UsageError: the images are not of the shape that the model was made for.
    """
    graphdef, state = nnx.split(model)
    batch_size = min(batch_size, len(images))
    parts = []
    for start in range(0, len(images), batch_size):
        batch = np.minimum(np.arange(start, start + batch_size), len(images) - 1)
        of_batch = None if labels is None else labels[batch]
        parts.append(jax.device_get(_respond(graphdef, state, images[batch], of_batch)))
    activations, errors = zip(*parts, strict=True)
    return Responses(
        np.concatenate(activations)[: len(images)],
        None if errors[0] is None else np.concatenate(errors)[: len(images)],
    )


@partial(jax.jit, static_argnums=0)
def _respond(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    images: Shaped[Array, "b height width channels"],
    labels: Int[Array, "b *k"] | None,
) -> tuple[Float[Array, "b o"], Float[Array, " b"] | None]:
    model = nnx.merge(graphdef, state)
    model.eval()
    images = to_unit_range(images)
    capsules = model.encode(images)
    if labels is None or model.decoder is None:
        return capsules.activations, None
    return capsules.activations, reconstruction_loss(model.decode(capsules.poses, labels), images)


def judge(responses: Responses, labels: Labels) -> Assessment:
    """Responses against the labels of their images, one or k different ones for each."""
    activations, errors = responses
    num_images, num_classes = activations.shape
    labels = rearrange(labels, "images ... -> images (...)")
    k = labels.shape[1]
    predictions = most_active(activations, k)
    true, predicted = (_as_sets(classes, num_classes) for classes in (labels, predictions))
    hits = reduce(true & predicted, "images o -> o", "sum")
    counts, num_predicted = (reduce(sets, "images o -> o", "sum") for sets in (true, predicted))
    confusion = None
    if k == 1:
        confusion = np.zeros((num_classes, num_classes), int)
        np.add.at(confusion, (labels[:, 0], predictions[:, 0]), 1)
    runner_up = np.where(true, -math.inf, activations).max(axis=1).mean(dtype=float) if k < num_classes else None
    return Assessment(
        num_correct=int((true == predicted).all(axis=1).sum()),
        num_images=num_images,
        counts=tuple(counts.tolist()),
        precision=_shares(hits, num_predicted),
        recall=_shares(hits, counts),
        confusion=confusion,
        right_activation=float(activations[true].mean(dtype=float)),
        runner_up_activation=None if runner_up is None else float(runner_up),
        reconstruction_error=None if errors is None else float(errors.mean(dtype=float)),
    )


def most_active(activations: Float[np.ndarray, "images o"], k: int) -> Int[np.ndarray, "images k"]:
    """The classes of the k most active capsules, the most active one first; of equal ones the first."""
    return np.asarray(jax.lax.top_k(activations, k)[1])


def wilson_interval(num_correct: int, num_images: int, *, z: float = Z95) -> tuple[float, float]:
    r"""Where the accuracy is on all images of which these are a random sample.

    $$\frac{1}{1 + z^2/n} \left(\hat p + \frac{z^2}{2n} \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4 n^2}}
    \right)$$

    It never leaves [0, 1], and is not empty where all answers are right. It knows of test images only: it does not tell
    how much another seed would change.

    Args:
        num_correct: $n \hat p$, right answers.
        num_images: $n$, all answers.
        z: half its width in standard errors; by default that of 95 %.

    References:
        Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927), J. Am. Stat. Assoc. 22,
        p. 209-212.
    """
    share = num_correct / num_images
    centre = share + z**2 / (2 * num_images)
    half = z * math.sqrt(share * (1 - share) / num_images + z**2 / (4 * num_images**2))
    scale = 1 + z**2 / num_images
    # At no or all right answers the end is 0 or 1 but for rounding.
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def _as_sets(classes: Int[np.ndarray, "images k"], num_classes: int) -> Bool[np.ndarray, "images o"]:
    """Whether each class is among those of each image."""
    sets = np.zeros((len(classes), num_classes), bool)
    np.put_along_axis(sets, classes, True, axis=1)
    return sets


def _shares(parts: Int[np.ndarray, " o"], wholes: Int[np.ndarray, " o"]) -> tuple[float | None, ...]:
    return tuple(part / whole if whole else None for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True))
