"""Export a model to ONNX, with the same inputs and outputs as the StableHLO files of `capsnet_jax`."""

import logging
import warnings
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from capsnet_torch.model import CapsNet


class NotInOnnxError(Exception):
    """The model uses an operation that ONNX lacks."""


class ChannelsLast(nn.Module):
    """The exported module: it takes images `[b height width channels]`, as the JAX model does."""

    def __init__(self, model: CapsNet):
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "b height width channels"]) -> tuple[Tensor, ...]:
        """Return poses, activations and, with a decoder, the reconstruction of the most active class."""
        poses, activations = self.model.encode(rearrange(images, "b height width channels -> b channels height width"))
        if self.model.decoder is None:
            return poses, activations
        decoded = self.model.decode(poses, activations.argmax(dim=1))
        return poses, activations, rearrange(decoded, "b channels height width -> b height width channels")


def write_onnx(model: CapsNet, image_shape: tuple[int, int, int], path: Path) -> None:
    """Write the model in evaluation mode, with its weights, for any batch size.

    The input is `images`; outputs are `poses`, `activations` and, if the model has a decoder, `reconstructions`.

    Args:
        model: a model with float32 weights.
        image_shape: height, width and number of channels of the images.
        path: file to write.

    Raises:
        NotInOnnxError: the model uses an operation that ONNX lacks.
    """
    outputs = ["poses", "activations", "reconstructions"][: 2 if model.decoder is None else 3]
    logging.disable(logging.WARNING)  # PyTorch warns that torchvision is missing, which is not needed
    try:
        with warnings.catch_warnings():
            # PyTorch raises this warning itself when it copies the exported program.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            program = torch.onnx.export(
                ChannelsLast(model).eval(),
                (torch.zeros(2, *image_shape),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("b")},),
                input_names=["images"],
                output_names=outputs,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise NotInOnnxError(f"{str(cause).strip().splitlines()[0].partition('. ')[0]}.") from error
    finally:
        logging.disable(logging.NOTSET)
    assert program is not None  # as dynamo=True returns it
    # Metadata of the nodes would contain paths of Python files on this machine.
    ClearMetadataAndDocStringPass()(program.model)
    program.save(path, external_data=False)
