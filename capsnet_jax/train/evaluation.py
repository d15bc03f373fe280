"""Evaluation of a model on labelled images; each image counts exactly once for any batch size and number of devices."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from capsnet_jax.compilation import compiler_options
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.losses import reconstruction_loss
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.ops import to_unit_range
from capsnet_jax.train.sharding import along, on_all

EVALUATION_BATCH = 250  # images; it divides the 10,000 test images of most data sets, and its patches fit in 1 GB
NORMAL_QUANTILE = 1.959963984540054  # of the standard normal distribution at 0.975

Images = Shaped[np.ndarray, "images height width channels"]
Labels = Int[np.ndarray, "images *k"]


class Evaluation(NamedTuple):
    """Accuracy, per-class precision and recall, and mean activations on a set of images.

    Attributes:
        num_correct: number of images whose k most active classes are exactly their k labels.
        num_images: number of images.
        counts: number of images of each class.
        precision: for each class, the fraction of its predictions that are right; None if it is never predicted.
        recall: for each class, the fraction of its images for which it is predicted; None if it has no images.
        confusion: number of images of a class (row) for which a class (column) is predicted; None for several labels.
        right_activation: mean activation of the capsules of the labels.
        runner_up_activation: mean activation of the most active other capsule; None if there are no others.
        reconstruction_error: mean squared error of pixels in [0, 1], reconstructed from the capsules of the labels;
            None if the model has no decoder or reconstruction was not asked for.
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
        """Fraction of images that are classified correctly."""
        return self.num_correct / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval of the accuracy, for other images drawn from the same distribution.

        It covers only the choice of test images, and not how the accuracy varies with the seed.

        References:
            Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
        """
        n, wrong = self.num_images, self.num_images - self.num_correct
        centre = (self.num_correct + NORMAL_QUANTILE**2 / 2) / (n + NORMAL_QUANTILE**2)
        variance = self.num_correct * wrong / n + NORMAL_QUANTILE**2 / 4
        half = NORMAL_QUANTILE * math.sqrt(variance) / (n + NORMAL_QUANTILE**2)
        return max(centre - half, 0.0), min(centre + half, 1.0)


class Predictions(NamedTuple):
    """What `predict` returns.

    Attributes:
        activations: activations of the class capsules.
        reconstruction_errors: mean squared error of the pixels in [0, 1] of each image, reconstructed from the capsules
            of its labels; None without labels or without a decoder.
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
    """Evaluate a model on labelled images.

    Batch normalization uses its running statistics, whether or not the model is in training mode.

    Args:
        model: the model.
        images: uint8, or float32 in [0, 1], as in a `Dataset`.
        labels: class indices `[images]`, or `[images k]` for k different classes in each image.
        batch_size: number of images in a batch. The last batch is padded with images that do not count.
        reconstruct: whether to compute the reconstruction error as well.
        mesh: devices that share each batch and hold the weights; None for one device.

    Returns:
        Accuracy, confidence interval, precision, recall and confusions; see `Evaluation`.

    Raises:
        UsageError: the images do not have the shape that the model was made for.

    Examples:
        >>> from flax import nnx
        >>> from capsnet_jax import CapsNet, evaluate, load_dataset
        >>> digits = load_dataset("digits")
        >>> model = CapsNet(
        ...     (8, 8, 1), 10, stem_channels=8, stem_kernel=3, primary_groups=2, primary_kernel=3, rngs=nnx.Rngs(0)
        ... )
        >>> evaluation = evaluate(model, digits.test_images, digits.test_labels)
        >>> evaluation.num_images, sum(evaluation.counts)
        (355, 355)
        >>> low, high = evaluation.interval
        >>> 0 <= low < evaluation.accuracy < high <= 1
        True
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
    """Compute the activations of the class capsules of images, batch by batch.

    Batch normalization uses its running statistics, whether or not the model is in training mode.

    Args:
        model: the model.
        images: uint8, or floats in [0, 1], as in a `Dataset`.
        labels: class indices `[images]` or `[images k]`, to reconstruct each image from the capsules of its classes.
        batch_size: number of images in a batch. The last batch is padded.
        mesh: devices that share each batch and hold the weights; None for one device.

    Returns:
        The activations `[images classes]`, of which the largest is that of the predicted class, and the reconstruction
        errors `[images]`; None without labels or without a decoder.

    Raises:
        UsageError: there are no images, their pixels are out of range, or they do not have the shape that the model was
            made for.

    Examples:
        >>> from flax import nnx
        >>> from capsnet_jax import CapsNet, load_dataset, predict
        >>> images = load_dataset("digits").test_images
        >>> model = CapsNet(
        ...     (8, 8, 1), 10, stem_channels=8, stem_kernel=3, primary_groups=2, primary_kernel=3, rngs=nnx.Rngs(0)
        ... )
        >>> activations = predict(model, images).activations
        >>> activations.shape, activations.argmax(axis=1).shape  # predicted classes
        ((355, 10), (355,))
    """
    if len(images) == 0:
        raise UsageError("There are no images; expected one or more.")
    if images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= 1):  # also refuses NaN
        raise UsageError(f"The images are from {images.min()} to {images.max()}; expected uint8, or floats in [0, 1].")
    return Predictions(*in_batches(_predict_batch, model, (images, labels), batch_size, mesh))


def score(predictions: Predictions, labels: Labels) -> Evaluation:
    """Compare predictions with the labels of their images, one or k different ones for each image."""
    activations, errors = predictions
    num_images, num_classes = activations.shape
    labels = rearrange(labels, "images ... -> images (...)")
    k = labels.shape[1]
    answers = most_active(activations, k)
    right, wrong = right_and_wrong(activations, labels)
    true, predicted = (np.eye(num_classes, dtype=bool)[classes].any(axis=1) for classes in (labels, answers))
    hits, counts, num_predicted = (reduce(each, "images o -> o", "sum") for each in (true & predicted, true, predicted))
    confusion = None
    if k == 1:
        pairs = np.bincount(labels[:, 0] * num_classes + answers[:, 0], minlength=num_classes**2)
        confusion = tuple(map(tuple, pairs.reshape(num_classes, num_classes).tolist()))
    return Evaluation(
        num_correct=int((true == predicted).all(axis=1).sum()),
        num_images=num_images,
        counts=tuple(counts.tolist()),
        precision=_fractions(hits, num_predicted),
        recall=_fractions(hits, counts),
        confusion=confusion,
        right_activation=float(right.mean(dtype=float)),
        runner_up_activation=float(wrong.mean(dtype=float)) if wrong.size else None,
        reconstruction_error=None if errors is None else float(errors.mean(dtype=float)),
    )


def most_active(activations: Float[np.ndarray, "images o"], k: int) -> Int[np.ndarray, "images k"]:
    """Find the classes of the k most active capsules, in descending order; ties go to the lower class index."""
    return np.asarray(jax.lax.top_k(activations, k)[1])


def right_and_wrong(
    activations: Float[np.ndarray, "images o"], labels: Int[np.ndarray, "images k"]
) -> tuple[Float[np.ndarray, "images k"], Float[np.ndarray, " wrong"]]:
    """Return the activations of the labels of each image, and the largest other one; none if there are no others."""
    right = np.take_along_axis(activations, labels, axis=1)
    others = activations.copy()
    np.put_along_axis(others, labels, -math.inf, axis=1)
    wrong = others.max(axis=1)
    return right, wrong if labels.shape[1] < activations.shape[1] else wrong[:0]


def final_line(evaluation: Evaluation) -> str:
    """Format accuracy and error, as the last line that `train` and `evaluate` print."""
    accuracy = evaluation.accuracy
    return f"test accuracy {accuracy:.4f} on {evaluation.num_images} images (error {100 * (1 - accuracy):.2f} %)"


def coupling_entropy(couplings: Float[Array, "*batch i o"]) -> Float[Array, "*batch i"]:
    r"""Compute the normalized entropy of the couplings of each input capsule.

    $$-\frac{1}{\ln O} \sum_o p_o \ln p_o, \quad p_o = \frac{c_o}{\sum_k c_k}$$

    Args:
        couplings: negative couplings, which a learned prior can produce, count as 0.

    Returns:
        1 if an input capsule is coupled to all output capsules equally, or to none, and 0 if it is coupled to only one.
    """
    couplings = jnp.maximum(couplings, 0)
    total = couplings.sum(axis=-1, keepdims=True)
    num_outputs = couplings.shape[-1]
    shares = jnp.where(total > 0, couplings / jnp.where(total > 0, total, 1), 1 / num_outputs)
    return jax.scipy.special.entr(shares).sum(axis=-1) / math.log(max(num_outputs, 2))


def mean_coupling_entropy(model: CapsNet, images: Images, *, batch_size: int = EVALUATION_BATCH) -> float:
    """Average `coupling_entropy` over the input capsules of the last capsule layer and over the images."""
    return float(in_batches(_coupling_entropies, model, (images,), batch_size).mean(dtype=float))


def in_batches(
    function: Callable[..., Any],
    model: CapsNet,
    data: tuple[Any, ...],
    batch_size: int = EVALUATION_BATCH,
    mesh: Mesh | None = None,
) -> Any:
    """Apply a function of model and data to all images, batch by batch.

    Args:
        function: function at the top of a module, of the model in evaluation mode and the data of a batch; it returns
            arrays with a row for each image.
        model: the model.
        data: images, and possibly labels.
        batch_size: number of images in a batch. The last batch is padded.
        mesh: devices that share each batch and hold the weights; None for one device.
    """
    graphdef, state = nnx.split(model)
    compiled = _compiled(function, graphdef, mesh)
    num_images, num_devices = len(data[0]), 1 if mesh is None else mesh.size
    batch_size = math.ceil(min(batch_size, num_images) / num_devices) * num_devices  # equal shares for all devices
    results = []
    for start in range(0, num_images, batch_size):
        batch = np.minimum(np.arange(start, start + batch_size), num_images - 1)  # padded with the last image
        results.append(compiled(state, *jax.tree.map(lambda array: array[batch], data)))  # noqa: B023
    # Results are fetched after the loop, so that the device does not wait for the host between batches.
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:num_images], *jax.device_get(results))


def _predict_batch(model: CapsNet, images: Array, labels: Array | None) -> tuple[Array, Array | None]:
    capsules = model.encode(images)
    if labels is None or model.decoder is None:
        return capsules.activations, None
    return capsules.activations, reconstruction_loss(model.decode(capsules.poses, labels), images)


def _coupling_entropies(model: CapsNet, images: Array) -> Float[Array, " b"]:
    return reduce(coupling_entropy(model.route(images)[-1].couplings), "b ... -> b", "mean")


@lru_cache(maxsize=8)
def _compiled(function: Callable[..., Any], graphdef: nnx.GraphDef, mesh: Mesh | None) -> Callable[..., Any]:
    """Compile a function of a model in evaluation mode, once for all weights of a model.

    The devices of a mesh share the batch. Each gets all results, so that every process can read them.
    """

    @partial(jax.jit, compiler_options=compiler_options())
    def of_batch(state: nnx.State, *data: Any) -> Any:
        images, *labels = data if mesh is None else jax.lax.with_sharding_constraint(data, along(mesh, 0))
        model = nnx.merge(graphdef, state)
        model.eval()
        results = function(model, to_unit_range(images), *labels)
        return results if mesh is None else jax.lax.with_sharding_constraint(results, on_all(mesh))

    return of_batch


def _fractions(parts: Int[np.ndarray, " o"], wholes: Int[np.ndarray, " o"]) -> tuple[float | None, ...]:
    return tuple(part / whole if whole else None for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True))
