"""A model as an ONNX file: the same outputs as the StableHLO program of the JAX model has."""

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
    """The model does what there is no ONNX operator for."""


class ChannelsLast(nn.Module):
    """A model as it is written: of images `[b height width channels]`, as the JAX model is."""

    def __init__(self, model: CapsNet):
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "b height width channels"]) -> tuple[Tensor, ...]:
        """Poses and activations of the class capsules and, with a decoder, the image of the most active one."""
        poses, activations = self.model.encode(rearrange(images, "b height width channels -> b channels height width"))
        if self.model.decoder is None:
            return poses, activations
        decoded = self.model.decode(poses, activations.argmax(dim=1))
        return poses, activations, rearrange(decoded, "b channels height width -> b height width channels")


def write_onnx(model: CapsNet, image_shape: tuple[int, int, int], path: Path) -> None:
    """Writes the model in evaluation mode, its weights inside, for any number of images.

    The input is `images`; outputs are `poses`, `activations` and, if the model has a decoder, `reconstructions`.

    Args:
        model: of float32 weights.
        image_shape: height, width and number of channels of the images.
        path: of the file.

    Raises:
        NotInOnnxError: the model does what there is no ONNX operator for.
    """
    outputs = ["poses", "activations", "reconstructions"][: 2 if model.decoder is None else 3]
    logging.disable(logging.WARNING)  # that torchvision is not there, which nothing here needs
    try:
        with warnings.catch_warnings():
            # PyTorch's own, when it copies the exported program.
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
    # Each node says from which line of which file on this machine it comes.
    ClearMetadataAndDocStringPass()(program.model)
    program.save(path, external_data=False)
