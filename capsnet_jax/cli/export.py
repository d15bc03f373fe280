"""The command `capsnet export`: save a trained model as one file that runs without this package."""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.export import deserialize
from jaxtyping import Float

from capsnet_jax.errors import UsageError
from capsnet_jax.interchange.stablehlo import encode_and_decode, to_stablehlo
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.routing import get_routing
from capsnet_jax.runs.folder import Run, load_run

Outputs = Mapping[str, Float[np.ndarray, "..."]]

TOLERANCE = 1e-5  # of the largest value; the largest error measured is 2e-6
NUM_IMAGES = 17  # enough that the model, with which the file is compared, uses fused routing and Fourier transforms


@dataclass(frozen=True)
class Export:
    """Save a trained model as one file that runs without this package.

    Input: images [b height width channels], float32 in [0, 1], for any batch size b.
    Output: poses [b classes dim] and activations [b classes] of the class capsules and,
    with a decoder, reconstructions [b height width channels] from the most active capsule.
    The file is run once on random images, and kept only if it agrees with the model."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run, or name of a pretrained model."""
    format: Literal["stablehlo", "onnx"] = "stablehlo"
    """stablehlo for jax.export.deserialize; onnx for onnxruntime (pip install 'capsnet-jax[onnx]')."""
    output: Annotated[
        Path | None, tyro.conf.arg(help_behavior_hint="(default: model.FORMAT in the run folder, or NAME.FORMAT)")
    ] = None
    """File to write; its name ends in .stablehlo or .onnx."""
    overwrite: bool = False
    """Replace the file if it exists."""
    best: bool = False
    """Export the weights that were best on validation images instead of the last ones."""
    trust_code: bool = False
    """Import the routing that the run names, if it is not of this package. That runs code."""

    def run(self) -> None:
        run, model = load_run(self.run_dir, best=self.best, trust_code=self.trust_code)
        # Nothing is written into the package, where the folder of a pretrained model is.
        name = f"{self.run_dir / 'model' if self.run_dir.is_dir() else self.run_dir}.{self.format}"
        path = self.output or Path(name)
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
            raise UsageError(f"The output {path} {what}; expected the name of a file.")
        if path.suffix != f".{self.format}":
            raise UsageError(f"The output is {path}; expected a name that ends in .{self.format}.")
        if path.exists() and not self.overwrite:
            raise UsageError(f"The output {path} exists already; expected a new name, or --overwrite.")
        unchecked = path.with_name(f"{path.name}.partial")
        try:
            if self.format == "onnx":
                write_onnx(run, model, unchecked)
            else:
                unchecked.write_bytes(to_stablehlo(model))
            error = error_of_file(unchecked, self.format, model)
            if not error <= TOLERANCE:
                raise UsageError(
                    f"The file {path} was not kept, as it differs from the model by {error:.1e} of the largest value; "
                    f"expected {TOLERANCE:.0e} at most."
                )
            unchecked.replace(path)
        finally:
            unchecked.unlink(missing_ok=True)
        size = path.stat().st_size / 1e6
        print(
            f"{path}: {size:.1f} MB, differs from the model by {error:.1e} of the largest value "
            f"(on {NUM_IMAGES} random images)."
        )


def write_onnx(run: Run, model: CapsNet, path: Path) -> None:
    """Write the PyTorch twin, with the weights of the model, as an ONNX file.

    Raises:
        UsageError: a package is not installed, the routing has no PyTorch twin, or ONNX cannot express it.
    """
    for package in ("torch", "onnxscript"):
        import_for_onnx(package)
    import torch  # not at the top, because it is optional

    import capsnet_torch
    from capsnet_torch.onnx import NotInOnnxError
    from capsnet_torch.onnx import write_onnx as write_twin
    from capsnet_torch.routing import ROUTINGS

    routing = get_routing(run.config.model.routing).name
    if routing not in ROUTINGS:
        raise UsageError(
            f"Routing {routing} has no twin in PyTorch, from which ONNX is written; expected {', '.join(ROUTINGS)}."
        )
    twin = capsnet_torch.CapsNet.from_config(vars(run.config.model))
    twin.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(model).items()})
    try:
        write_twin(twin, run.image_shape, path)
    except NotInOnnxError as error:
        raise UsageError(f"The model of routing {routing} cannot be written as ONNX: {error}") from error


def error_of_file(path: Path, format: str, model: CapsNet) -> float:
    """Compute the `largest_error` of an exported file on seeded random images.

    Args:
        path: the exported file.
        format: "stablehlo" or "onnx".
        model: the model that was exported.

    Raises:
        UsageError: onnxruntime is needed and not installed.
    """
    images = np.random.default_rng(0).random((NUM_IMAGES, *model.config.image_shape), np.float32)
    actual = run_onnx(path, images) if format == "onnx" else run_stablehlo(path, images)
    # Reconstruct from the class that the file chose: with two almost equal activations, rounding decides.
    labels = actual["activations"].argmax(axis=1)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(partial(encode_and_decode, model))(images, labels)
    return largest_error(actual, jax.device_get(expected))


def run_stablehlo(path: Path, images: Float[np.ndarray, "b height width channels"]) -> Outputs:
    """Run a StableHLO file on images."""
    return jax.device_get(deserialize(bytearray(path.read_bytes())).call(images))


def run_onnx(path: Path, images: Float[np.ndarray, "b height width channels"]) -> Outputs:
    """Run an ONNX file on images, with onnxruntime on CPU.

    Raises:
        UsageError: onnxruntime is not installed.
    """
    session = import_for_onnx("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def largest_error(actual: Outputs, expected: Outputs) -> float:
    """Compute the largest error of any output, relative to the largest expected value of that output.

    Returns:
        The error; infinite if an output is missing, has another shape or dtype, or is not finite on either side.
    """
    if actual.keys() != expected.keys():
        return math.inf
    errors = []
    for name, values in expected.items():
        same_kind = (actual[name].shape, actual[name].dtype) == (values.shape, values.dtype)
        if not (same_kind and np.isfinite(actual[name]).all() and np.isfinite(values).all()):
            return math.inf
        error, scale = float(np.abs(actual[name] - values).max()), float(np.abs(values).max())
        errors.append(error / scale if scale > 0 else math.inf if error > 0 else 0.0)
    return max(errors)


def import_for_onnx(package: str) -> Any:
    """Import a package that exporting to ONNX needs.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"--format onnx needs {package}, which is not installed: pip install 'capsnet-jax[onnx]'."
        ) from error
