"""Error messages for modules and maps that do not fit, and for names that are not modules."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from capsnet_jax.errors import UsageError
from capsnet_verify.foreign import propose, verify_module
from capsnet_verify.foreign_module import load_module
from capsnet_verify.subjects import Settings, of_model
from capsnet_verify.weight_map import read_map
from parity_tests.foreign_models import (
    ENCODER,
    ENCODER_GRADIENTS,
    LENGTHS,
    LENGTHS_AND_IMAGES,
    MODEL,
    NORMALIZED,
    SUBJECT,
    Lengths,
    LengthsAndImages,
    StackedConvolutions,
    names_of,
)


class Raises(Lengths):
    def forward(self, x):
        raise ValueError("no such thing\nand more")


class Ends(Lengths):
    def forward(self, x):
        raise SystemExit(0)


class Integers(Lengths):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(12, dtype=torch.int64))


class Twice(Lengths):
    def forward(self, x):
        self.conv1(x)
        return super().forward(x)


class NeedsTarget(Lengths):
    def forward(self, x, target):
        return super().forward(x) + 0 * target[:, :5]


class StackedAndNeedsTarget(StackedConvolutions):
    def forward(self, x, target):
        return super().forward(x) + 0 * target[:, :5]


class OnCuda(Lengths):
    """As in public code that was written for a GPU."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(self.W.data.cuda())
        self.cuda()
        self.to("cuda")

    def forward(self, x):
        zeros = torch.zeros(5, device=torch.device("cuda:0")).cuda() + torch.zeros(5).to("cuda")
        return super().forward(x.cuda()) + zeros


class Square(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x**2

    @staticmethod
    def backward(context, gradient):
        raise NotImplementedError("no derivative")


class NoDerivative(Lengths):
    def forward(self, x):
        return Square.apply(super().forward(x))


@pytest.mark.parametrize(
    ("build", "old", "new", "message"),
    [
        (Lengths, '"primary.bias" =', '"prim.bias" =', '[weights] "prim.bias" is not in the torch model; it has W, co'),
        (Lengths, "2.bias", "9.bias", "is 'encoder.image2primary_capsules.9.bias'; the JAX model (without a decoder"),
        (Lengths, '"primary.bias" = "encoder.image2primary_capsules.2.bias"', "", "[weights] lacks encoder.image2prim"),
        (Integers, '"primary.bias"', '"count"', '[weights] "count" is not in the torch model; it has W, conv1.weight,'),
        (Lengths, "(p g) d o h", "(p g) o d h", '[weights] "W" is (1, 18, 5, 6, 4) with { axes = "1 (g p) o h d -> (p'),
        (Lengths, "conv1 = {", "conv2 = {", '[values] "conv2" is not in the torch model; it has conv1, primary.'),
        (Lengths, '"stem 0"', '"stem 1"', "[values] \"conv1\" is 'stem 1'; the JAX model (without a decoder, as"),
        (Twice, "", "", '[values] "conv1" ran 2 times in one call; expected a submodule that runs once and returns a'),
        (Lengths, "activations = {}", "activations = 0", "is 0, where forward returns no tensor; expected {}."),
        (Lengths, "activations = {}", "poses = {}", '[outputs] "poses" is (3, 5); expected (3, 5, 6), as poses.'),
        (Lengths, "[weights]", 'labels = "indices"\n[weights]', "called with images (3, 2, 9, 8) and labels (3,), rai"),
        (Raises, "", "", "called with images (3, 2, 9, 8), raises ValueError: no such thing."),
        (NeedsTarget, "", "", "'target'; if that is the label, the map needs labels = \"one-hot\" or labels"),
        (NoDerivative, "", "", "The gradient of the torch model raises NotImplementedError: no derivative."),
    ],
)  # fmt: skip
def test_a_misfit_is_refused_in_a_sentence(verify_foreign, build, old, new, message):
    assert old in LENGTHS
    with pytest.raises(UsageError, match=re.escape(message)):
        verify_foreign(build, LENGTHS.replace(old, new))


def test_reconstructions_are_refused_if_the_jax_model_has_no_decoder(verify_foreign):
    with pytest.raises(UsageError, match=re.escape("[outputs] has reconstructions, and the JAX model has no decoder.")):
        verify_foreign(LengthsAndImages, LENGTHS_AND_IMAGES, NORMALIZED)


def test_a_proposal_without_guesses_can_be_verified(tmp_path):
    module = load_module("parity_tests.foreign_models:Everything")
    path = tmp_path / "map.toml"
    path.write_text(propose(module, ENCODER, Settings()))
    verification = verify_module(module, read_map(path), ENCODER, Settings())
    assert verification.status == 0
    assert names_of(verification) == ["poses", "total loss", *ENCODER_GRADIENTS]
    assert verification.notes[0].startswith("Not in the map, and so not compared by themselves: temperature, decoder.0")


def test_a_model_for_a_gpu_runs_on_the_cpu(verify_foreign):
    assert isinstance(load_module(f"{HERE}:OnCuda"), OnCuda)
    assert verify_foreign(lambda: load_module(f"{HERE}:OnCuda"), LENGTHS).status == 0


def test_a_proposal_says_which_labels_forward_needs_and_what_gives_weights_a_partner():
    without_bias = of_model("a model", replace(MODEL, decoder_bias=False))
    proposed = propose(LengthsAndImages(), without_bias, Settings())
    assert proposed.startswith("# With --set decoder_bias=true, fewer weights have no partner: 1, not 3.\n")
    assert '\n# labels = "one-hot"  # or "indices": how labels follow the images' in proposed
    stacked = propose(StackedAndNeedsTarget(), ENCODER, Settings())
    assert "--set" not in stacked
    assert '\nlabels = "one-hot"  # or "indices": how labels' in stacked
    primary = "encoder.image2primary_capsules.2"
    for name, axes in (("weight", " a b c"), ("bias", "")):
        line = f'"primary.*.{name}" = {{ name = "{primary}.{name}", axes = "d g{axes} -> (g d){axes}" }}'
        assert f'\n# {line}  # a guess: stacked; "g d{axes}" fits as well\n' in stacked
    assert "has no partner" not in stacked.partition("[weights]")[2]


def test_a_map_is_proposed_for_a_depthwise_convolution():
    """Whose number of channels does not allow activations of their own."""
    model = of_model("a model", replace(MODEL, primary_depthwise=True))
    assert '"conv1.weight" = "encoder.image2primary_capsules.0.weight"' in propose(Lengths(), model, Settings())


def test_a_proposal_says_what_forward_raises():
    assert "# forward(images) raises ValueError: no such thing\n" in propose(Raises(), SUBJECT, Settings())
    assert "# forward(images) raises SystemExit: 0\n" in propose(Ends(), SUBJECT, Settings())


HERE = __name__
MODULE = Lengths()
NUMBER = 3


def no_module():
    return 3


def unbuildable():
    raise RuntimeError("no weights")


def lazy():
    return nn.LazyLinear(3)


def test_a_module_is_built_with_the_same_weights_each_time():
    one = load_module("parity_tests.foreign_models:Lengths")
    torch.rand(1)
    other = load_module("parity_tests.foreign_models:Lengths")
    assert torch.equal(one.W, other.W)
    assert isinstance(load_module("parity_tests.foreign_models:with_detach"), LengthsAndImages)
    assert load_module(f"{HERE}:MODULE") is MODULE


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lengths", "The torch model 'lengths' has no colon; expected package.module:model."),
        ("no.such:build", "The torch model 'no.such:build' cannot be imported: ModuleNotFoundError: No module named"),
        (f"{HERE}:nothing", f"cannot be imported: AttributeError: module '{HERE}'"),
        (f"{HERE}:NUMBER", f"{HERE}:NUMBER() raises TypeError: 'int' object is not callable; expected a function"),
        (f"{HERE}:no_module", f"{HERE}:no_module() returns int; expected a torch module."),
        (f"{HERE}:unbuildable", f"{HERE}:unbuildable() raises RuntimeError: no weights; expected a function"),
        (f"{HERE}:lazy", f"{HERE}:lazy: the weight weight has no shape yet; expected a module that was run once."),
    ],
)
def test_a_name_that_is_not_a_module_is_refused(spec, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_module(spec)
