"""Figure of images above their reconstructions."""

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

Images = Float[np.ndarray, "images height width channels"]


def reconstructions_figure(
    images: Images, reconstructions: Images, labels: Int[np.ndarray, " images"], predictions: Int[np.ndarray, " images"]
) -> Figure:
    """Draw images in a row, and below each its reconstruction from the capsule of the predicted class.

    Args:
        images: Images in [0, 1], with 1 or 3 channels.
        reconstructions: Reconstructions of these images.
        labels: True classes, shown above.
        predictions: Predicted classes, shown below; in red where they differ.
    """
    figure = Figure(figsize=(0.8 * len(images) + 1, 2.3), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, (label, prediction) in enumerate(zip(labels, predictions, strict=True)):
        for axis, image in zip(axes[:, column], (images[column], reconstructions[column]), strict=True):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(str(label), fontsize=9)
        axes[1, column].set_xlabel(str(prediction), fontsize=9, color="black" if prediction == label else "red")
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("capsule", fontsize=9)
    return figure
