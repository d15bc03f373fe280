"""Data sets from an .npz file of four arrays."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from capsnet_jax.data.dataset import Dataset, make_dataset
from capsnet_jax.errors import UsageError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: Path, *, test_only: bool = False) -> Dataset:
    """Load images `x_train`, `x_test` and labels `y_train`, `y_test` from a file written by `numpy.savez`.

    Images are `[images height width]` or `[images height width channels]`, in uint8 or as floats in [0, 1]. Labels are
    integers or strings `[images]`, or `[images k]` for k classes in each image. The classes are the sorted labels of
    both splits.

    Args:
        path: the file.
        test_only: whether to read `x_test` and `y_test` only; there are no training images then.

    Raises:
        UsageError: the file is damaged, contains pickled objects or lacks an array, or an array is not as above; the
            message names file and array.
    """
    if path.suffix != ".npz":
        raise UsageError(f"{path} is neither a folder of images nor an .npz file.")
    names = ARRAYS[2:] if test_only else ARRAYS
    arrays = _read_arrays(path, names)
    if test_only:
        arrays = [array[:0] for array in arrays] + arrays
    x_train, y_train, x_test, y_test = arrays
    x_train, x_test = (images[..., None] if images.ndim == 3 else images for images in (x_train, x_test))
    y_train, y_test = (labels[:, 0] if labels.shape[1:] == (1,) else labels for labels in (y_train, y_test))
    for name, labels in (("y_train", y_train), ("y_test", y_test)):
        if labels.dtype.kind not in "iuU" or (labels.dtype.kind == "U") != (y_train.dtype.kind == "U"):
            raise UsageError(
                f"The labels {name} in {path} are {labels.dtype}; expected integers or strings, the same in both."
            )
    if y_train.dtype.kind != "U":
        y_train, y_test = y_train.astype(np.int64), y_test.astype(np.int64)
    classes = np.unique(np.concatenate([y_train.ravel(), y_test.ravel()]))
    if len(classes) < 2:
        raise UsageError(
            f"The labels {' and '.join(names[1::2])} in {path} are all {classes.tolist()}; expected two classes or "
            "more."
        )
    y_train, y_test = (np.asarray(np.searchsorted(classes, labels)) for labels in (y_train, y_test))
    return make_dataset(
        *(x_train, y_train, x_test, y_test),
        num_classes=len(classes),
        class_names=[str(label) for label in classes],
        described=[f"{'images' if name[0] == 'x' else 'labels'} {name} in {path}" for name in ARRAYS],
    )


def _read_arrays(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    arrays: list[np.ndarray] = []
    name = "the list of arrays"
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                raise UsageError(f"{path} is truncated, or not an .npz file; write it again with numpy.savez.")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                for name in names:
                    if name not in file:
                        found = ", ".join(file) or "nothing"
                        raise UsageError(f"{path} lacks the array {name}; expected {', '.join(names)}, found {found}.")
                    arrays.append(file[name])
    except UsageError:
        raise
    except Exception as error:  # zip, deflate and npy readers raise many kinds of errors for damaged files
        raise UsageError(f"{path} cannot be read, at {name} ({error}); write it again with numpy.savez.") from error
    return arrays
