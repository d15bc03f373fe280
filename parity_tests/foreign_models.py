"""Capsule networks in PyTorch as other people write them, with other names, axes and outputs.

All take images [b 2 9 8] and are the same function as `MODEL`: 18 primary capsules of size 4, 5 classes of size 6.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capsnet_jax.config import ModelConfig
from capsnet_verify.subjects import Subject, of_model
from capsnet_verify.verification import Verification

MODEL = ModelConfig(
    image_shape=(9, 8, 2),
    num_classes=5,
    stem_channels=12,  # as many as the primary capsules have, so that both biases have the same shape
    stem_kernel=3,
    primary_groups=3,
    primary_dim=4,
    primary_kernel=3,
    primary_scale=1.0,
    primary_squash="squash",
    class_dim=6,
    decoder_hidden=(7, 7),  # a square weight
    decoder_bias=True,
)
SUBJECT: Subject = of_model("a small model", MODEL)
ENCODER = of_model("an encoder", replace(MODEL, decoder_hidden=None))
NORMALIZED = of_model("with batch normalization", replace(MODEL, batch_norm=True, decoder_hidden=None))


def squash(tensor: Tensor, dim: int = -1) -> Tensor:
    squared_norm = (tensor**2).sum(dim=dim, keepdim=True)
    return squared_norm / (1 + squared_norm) * tensor / squared_norm.sqrt()


class Lengths(nn.Module):
    """Capsules in the order (groups height width), a weight of shape [1 i o h d]; returns activations only."""

    softmax_dim = 2
    iterations = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 12, 3)
        self.primary = nn.Conv2d(12, 12, 3, stride=2)
        self.W = nn.Parameter(torch.randn(1, 18, 5, 6, 4))

    def capsules(self, x: Tensor) -> Tensor:
        x = self.primary(F.relu(self.conv1(x)))
        return x.view(x.size(0), 3, 4, 3, 2).permute(0, 1, 3, 4, 2).reshape(x.size(0), 18, 4)

    def forward(self, x: Tensor) -> Tensor:
        u = squash(self.capsules(x))[:, :, None, :, None]
        u_hat = (self.W @ u).squeeze(-1)
        b = torch.zeros(x.size(0), 18, 5, 1)
        for iteration in range(self.iterations):
            c = F.softmax(b, dim=self.softmax_dim)
            v = squash((c * u_hat).sum(dim=1, keepdim=True))
            if iteration < self.iterations - 1:
                b = b + (u_hat * v).sum(dim=-1, keepdim=True)
        return v.squeeze(1).norm(dim=-1)


class LengthsOverInputs(Lengths):
    """The same with a frequent mistake: the softmax is over input capsules."""

    softmax_dim = 1


class OneMoreIteration(Lengths):
    """Another frequent mistake: the number of iterations counts the updates of the logits."""

    iterations = 4


class NeighbouringPixels(Lengths):
    """Another frequent mistake: a view of `[b channels height width]` makes capsules of neighbouring pixels."""

    def capsules(self, x: Tensor) -> Tensor:
        return self.primary(F.relu(self.conv1(x))).view(x.size(0), -1, 4)


class StackedConvolutions(Lengths):
    """A convolution for each component of a pose, whose channels are the groups."""

    def __init__(self) -> None:
        super().__init__()
        del self.primary
        self.primary = nn.ModuleList(nn.Conv2d(12, 3, 3, stride=2) for _ in range(4))

    def capsules(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return torch.stack([convolution(x).view(x.size(0), -1) for convolution in self.primary], dim=-1)


class DigitCaps(nn.Module):
    """Dynamic routing with couplings [b o i]; with `detach`, the couplings are constants for the gradient."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 18, 6, 4))
        self.detach = detach

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.einsum("oihd,bid->boih", self.weight, x)
        for_routing = votes.detach() if self.detach else votes
        logits = votes.new_zeros(votes.shape[:3])
        for _ in range(2):
            outputs = squash(torch.einsum("boi,boih->boh", logits.softmax(dim=1), for_routing))
            logits = logits + torch.einsum("boih,boh->boi", for_routing, outputs)
        return squash(torch.einsum("boi,boih->boh", logits.softmax(dim=1), votes))


class LengthsAndImages(nn.Module):
    """With dropout, and a decoder of nn.Linear that takes one-hot labels; returns (activations, reconstructions)."""

    def __init__(self, detach: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 12, 3)
        self.relu = nn.ReLU(inplace=True)
        self.primary = nn.Conv2d(12, 12, 3, stride=2)
        self.dropout = nn.Dropout(0.5)
        self.digits = DigitCaps(detach)
        self.decoder = nn.Sequential(
            nn.Linear(30, 7), nn.ReLU(inplace=True), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 144), nn.Sigmoid()
        )
        self.temperature = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        channels = self.dropout(self.primary(self.relu(self.conv1(x))))
        capsules = squash(channels.permute(0, 2, 3, 1).reshape(len(x), 18, 4))
        poses = self.digits(capsules)
        length = poses.norm(dim=-1)
        if y is None:
            y = F.one_hot(length.argmax(dim=1), 5).to(x.dtype)
        images = self.decoder((poses * y[:, :, None]).reshape(len(x), -1))
        return length, images.view(-1, 2, 9, 8)


class Everything(LengthsAndImages):
    """Masks by its own largest activation; returns a dict of poses [b o h 1] and flat reconstructions."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        channels = self.primary(self.relu(self.conv1(x)))
        poses = self.digits(squash(channels.permute(0, 2, 3, 1).reshape(len(x), 18, 4)))
        y = F.one_hot(poses.norm(dim=-1).argmax(dim=1), 5).to(x.dtype)
        images = self.decoder((poses * y[:, :, None]).reshape(len(x), -1))
        return {"poses": poses[..., None], "image": images}


def with_detach() -> nn.Module:
    """Right values, wrong gradients."""
    return LengthsAndImages(detach=True)


class Capsules(NamedTuple):
    poses: Tensor


class Normalized(nn.Module):
    """With batch normalization after the ReLU; returns a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 12, 3)
        self.norm = nn.BatchNorm2d(12, eps=1e-3, momentum=0.01)
        self.primary = nn.Conv2d(12, 12, 3, stride=2)
        self.digits = DigitCaps(detach=False)

    def forward(self, x: Tensor) -> Capsules:
        channels = self.primary(self.norm(F.relu(self.conv1(x))))
        return Capsules(self.digits(squash(channels.permute(0, 2, 3, 1).reshape(len(x), 18, 4))))


# The right map of each.
CONVOLUTIONS = """\
[weights]
"conv1.weight" = "encoder.image2primary_capsules.0.weight"
"conv1.bias" = "encoder.image2primary_capsules.0.bias"
"primary.weight" = "encoder.image2primary_capsules.2.weight"
"primary.bias" = "encoder.image2primary_capsules.2.bias"
"""
VOTES = "encoder.primary2digit_capsules.input_caps2U.weight"
LENGTHS = f"""{CONVOLUTIONS}
W = {{ name = "{VOTES}", axes = "1 (g p) o h d -> (p g) d o h", sizes = {{ g = 3 }} }}
[outputs]
activations = {{}}
[values]
conv1 = {{ name = "stem 0", relu = true }}
"""
STACKED = LENGTHS.replace(
    '"primary.weight" = "encoder.image2primary_capsules.2.weight"',
    '"primary.*.weight" = { name = "encoder.image2primary_capsules.2.weight", axes = "d g c y x -> (g d) c y x" }',
).replace(
    '"primary.bias" = "encoder.image2primary_capsules.2.bias"',
    '"primary.*.bias" = { name = "encoder.image2primary_capsules.2.bias", axes = "d g -> (g d)" }',
)
DECODER = f"""{CONVOLUTIONS}
"digits.weight" = {{ name = "{VOTES}", axes = "o i h d -> i d o h" }}
"decoder.0.weight" = {{ name = "decoder.0.weight", axes = "f (o h) -> o h f" }}
"decoder.0.bias" = {{ name = "decoder.0.bias", axes = "f -> 1 f" }}
"decoder.2.weight" = "decoder.2.weight"
"decoder.2.bias" = "decoder.2.bias"
"decoder.4.weight" = {{ name = "decoder.4.weight", axes = "(c y x) f -> f c y x" }}
"decoder.4.bias" = {{ name = "decoder.4.bias", axes = "(c y x) -> 1 c y x" }}
"""
LENGTHS_AND_IMAGES = f"""labels = "one-hot"
{DECODER}
[outputs]
activations = 0
reconstructions = 1
[values]
relu = "stem 0"
digits = "poses 0"
"""
EVERYTHING = f"""{DECODER}
[outputs]
poses = {{ from = "poses", axes = "b o h 1 -> b o h" }}
reconstructions = {{ from = "image", axes = "b (c y x) -> b c y x" }}
"""
NORM = f"""{CONVOLUTIONS.replace("capsules.2", "capsules.3")}
"norm.weight" = "encoder.image2primary_capsules.2.weight"
"norm.bias" = "encoder.image2primary_capsules.2.bias"
"norm.running_mean" = "encoder.image2primary_capsules.2.running_mean"
"norm.running_var" = "encoder.image2primary_capsules.2.running_var"
"digits.weight" = {{ name = "{VOTES}", axes = "o i h d -> i d o h" }}
[outputs]
poses = "poses"
"""

ENCODER_GRADIENTS = [
    f"gradient {VOTES}",
    "gradient encoder.image2primary_capsules.2.bias",
    "gradient encoder.image2primary_capsules.2.weight",
    "gradient encoder.image2primary_capsules.0.bias",
    "gradient encoder.image2primary_capsules.0.weight",
]
DECODER_GRADIENTS = [f"gradient decoder.{number}.{kind}" for number in (4, 2, 0) for kind in ("bias", "weight")]


def names_of(verification: Verification) -> list[str]:
    return [check.name for check in verification.checks]
