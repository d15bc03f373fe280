"""Evaluation of a model on labelled images, each counted exactly once, whatever the batch size and the devices."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from capsnet_jax.nn.losses import reconstruction_loss
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.ops import to_unit_range
from capsnet_jax.train.sharding import along, on_all

EVALUATION_BATCH = 250  # images; it divides the 10,000 test images of most sets, and its patches fit in 1 GB
Z95 = 1.959963984540054  # standard deviations that 95 % of a normal distribution are within

Images = Shaped[np.ndarray, "images height width channels"]
Labels = Int[np.ndarray, "images *k"]


class Evaluation(NamedTuple):
    """Accuracy, precision and recall by class, and how active the right and the wrong capsules are.

    Attributes:
        num_correct: images whose most active capsules are exactly those of the labels.
        num_images: all images.
        counts: for each class, how many images have it.
        precision: for each class, the share of right ones among the images that it is predicted for; None if there are
            none.
        recall: for each class, the share of images that it is predicted for among those that have it; None if there
            are none.
        confusion: how many images of a class (row) are taken for a class (column); None if images have several labels.
        right_activation: mean activation of the capsules of the labels.
        runner_up_activation: mean activation of the most active one of all other capsules; None if there are none.
        reconstruction_error: mean squared error of a pixel in [0, 1], reconstructed from the capsules of the labels;
            None for a model without a decoder, or if it was not asked for.
    """

    num_correct: int
    num_images: int
    counts: tuple[int, ...]
    precision: tuple[float | None, ...]
    recall: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    right_activation: float
    runner_up_activation: float | None
    reconstruction_error: float | None

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_correct / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy on images drawn as these were; see `wilson_interval`."""
        return wilson_interval(self.num_correct, self.num_images)


class Predictions(NamedTuple):
    """The outputs of a model for images.

    Attributes:
        activations: of the class capsules.
        reconstruction_errors: mean squared error over the pixels and channels of each image, which lie in [0, 1], as
            reconstructed from the capsules of the labels; None without labels, or for a model without a decoder.
    """

    activations: Float[np.ndarray, "images o"]
    reconstruction_errors: Float[np.ndarray, " images"] | None


def evaluate(
    model: CapsNet,
    images: Images,
    labels: Labels,
    *,
    batch_size: int = EVALUATION_BATCH,
    reconstruct: bool = True,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Evaluate a model on all images.

    Args:
        model: the weights; running means of batch normalization are used, whatever the mode of the model.
        images: as in a `Dataset`.
        labels: class indices; one for each image, or k different ones `[images k]`.
        batch_size: images in one call of the compiled program; the last batch is padded with images that do not count.
        reconstruct: whether the error of reconstructions is computed, too.
        mesh: the devices that share each batch and hold the weights; None for one device.

    Raises:
        UsageError: the images are not of the shape that the model was made for.
    """
    predictions = predict(model, images, labels if reconstruct else None, batch_size=batch_size, mesh=mesh)
    return score(predictions, labels)


def predict(
    model: CapsNet,
    images: Images,
    labels: Labels | None = None,
    *,
    batch_size: int = EVALUATION_BATCH,
    mesh: Mesh | None = None,
) -> Predictions:
    """Compute the activations of the class capsules, and the errors of reconstructions where labels are given.

    Arguments are those of `evaluate`.

    Raises:
        UsageError: the images are not of the shape that the model was made for.
    """
    return Predictions(*_in_batches(_predict_batch, model, images, labels, batch_size=batch_size, mesh=mesh))


def score(predictions: Predictions, labels: Labels) -> Evaluation:
    """Compare predictions with the labels of their images, one or k different ones for each."""
    activations, errors = predictions
    num_images, num_classes = activations.shape
    labels = rearrange(labels, "images ... -> images (...)")
    k = labels.shape[1]
    answers = most_active(activations, k)
    true, predicted = (_as_sets(classes, num_classes) for classes in (labels, answers))
    hits = reduce(true & predicted, "images o -> o", "sum")
    counts, num_predicted = (reduce(sets, "images o -> o", "sum") for sets in (true, predicted))
    confusion = None
    if k == 1:
        confusion = np.zeros((num_classes, num_classes), int)
        np.add.at(confusion, (labels[:, 0], answers[:, 0]), 1)
    runner_up = np.where(true, -math.inf, activations).max(axis=1).mean(dtype=float) if k < num_classes else None
    return Evaluation(
        num_correct=int((true == predicted).all(axis=1).sum()),
        num_images=num_images,
        counts=tuple(counts.tolist()),
        precision=_shares(hits, num_predicted),
        recall=_shares(hits, counts),
        confusion=None if confusion is None else tuple(map(tuple, confusion.tolist())),
        right_activation=float(activations[true].mean(dtype=float)),
        runner_up_activation=None if runner_up is None else float(runner_up),
        reconstruction_error=None if errors is None else float(errors.mean(dtype=float)),
    )


def most_active(activations: Float[np.ndarray, "images o"], k: int) -> Int[np.ndarray, "images k"]:
    """Find the classes of the k most active capsules, the most active one first; of equal ones the first."""
    return np.asarray(jax.lax.top_k(activations, k)[1])


def final_line(evaluation: Evaluation) -> str:
    """The last line that `train` and `evaluate` print: accuracy and error."""
    accuracy = evaluation.accuracy
    return f"test accuracy {accuracy:.4f} on {evaluation.num_images} images (error {100 * (1 - accuracy):.2f} %)"


def wilson_interval(num_correct: int, num_images: int, *, z: float = Z95) -> tuple[float, float]:
    r"""Compute the confidence interval of an accuracy, of which these images are a random sample.

    $$\frac{1}{1 + z^2/n} \left(\hat p + \frac{z^2}{2n} \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4 n^2}}
    \right)$$

    It never leaves [0, 1], and is not empty where all answers are right. It accounts for the choice of test images
    only: it does not tell how much another seed would change.

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


def coupling_entropy(couplings: Float[Array, "*batch i o"]) -> Float[Array, "*batch i"]:
    r"""Compute the entropy of the couplings of each input capsule: 1 if all outputs get the same, 0 if one gets all.

    $$-\frac{1}{\ln O} \sum_o p_o \ln p_o, \quad p_o = \frac{c_o}{\sum_k c_k}$$

    Args:
        couplings: negative ones, which a learned prior can make, count as 0. An input capsule without any has no
            preference, and counts as coupled evenly.
    """
    couplings = jnp.maximum(couplings, 0)
    total = couplings.sum(axis=-1, keepdims=True)
    num_outputs = couplings.shape[-1]
    shares = jnp.where(total > 0, couplings / jnp.where(total > 0, total, 1), 1 / num_outputs)
    return jax.scipy.special.entr(shares).sum(axis=-1) / math.log(max(num_outputs, 2))


def mean_coupling_entropy(model: CapsNet, images: Images, *, batch_size: int = EVALUATION_BATCH) -> float:
    """Average `coupling_entropy` in the last capsule layer over its input capsules and the images."""
    return float(_in_batches(_coupling_entropies, model, images, None, batch_size=batch_size).mean(dtype=float))


def _predict_batch(
    model: CapsNet, images: Float[Array, "b height width channels"], labels: Int[Array, "b *k"] | None
) -> tuple[Float[Array, "b o"], Float[Array, " b"] | None]:
    capsules = model.encode(images)
    if labels is None or model.decoder is None:
        return capsules.activations, None
    return capsules.activations, reconstruction_loss(model.decode(capsules.poses, labels), images)


def _coupling_entropies(
    model: CapsNet, images: Float[Array, "b height width channels"], labels: None
) -> Float[Array, " b"]:
    return reduce(coupling_entropy(model.route(images)[-1].couplings), "b ... -> b", "mean")


def _in_batches(
    function: Callable[..., Any],
    model: CapsNet,
    images: Images,
    labels: Labels | None,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
) -> Any:
    """Apply a compiled function of model, images in [0, 1] and labels to all images, batch by batch."""
    graphdef, state = nnx.split(model)
    compiled = _compiled(function, graphdef, mesh)
    num_images, num_devices = len(images), 1 if mesh is None else mesh.size
    batch_size = math.ceil(min(batch_size, num_images) / num_devices) * num_devices  # every device gets the same share
    results = []
    for start in range(0, num_images, batch_size):
        batch = np.minimum(np.arange(start, start + batch_size), num_images - 1)  # padded with the last image
        results.append(compiled(state, images[batch], None if labels is None else labels[batch]))
    # Fetched in the end, so that the device need not wait for the host between two batches.
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:num_images], *jax.device_get(results))


@lru_cache(maxsize=8)
def _compiled(function: Callable[..., Any], graphdef: nnx.GraphDef, mesh: Mesh | None) -> Callable[..., Any]:
    """Compile a function of a model in evaluation mode, once for all weights that a model of this definition can have.

    With a mesh its devices share the batch, and each gets the results for the whole of it, so that every process can
    read them.
    """

    @jax.jit
    def of_batch(state: nnx.State, images: Array, labels: Array | None) -> Any:
        if mesh is not None:
            images, labels = jax.lax.with_sharding_constraint((images, labels), along(mesh, 0))
        model = nnx.merge(graphdef, state)
        model.eval()
        results = function(model, to_unit_range(images), labels)
        return results if mesh is None else jax.lax.with_sharding_constraint(results, on_all(mesh))

    return of_batch


def _as_sets(classes: Int[np.ndarray, "images k"], num_classes: int) -> Bool[np.ndarray, "images o"]:
    """Whether each class is among those of each image."""
    sets = np.zeros((len(classes), num_classes), bool)
    np.put_along_axis(sets, classes, True, axis=1)
    return sets


def _shares(parts: Int[np.ndarray, " o"], wholes: Int[np.ndarray, " o"]) -> tuple[float | None, ...]:
    return tuple(part / whole if whole else None for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True))
