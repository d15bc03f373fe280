"""Modules and maps that do not fit, and names that are none of a module: each is told in a sentence."""

import re
from dataclasses import replace

import pytest
import torch

from capsnet_jax.errors import UsageError
from capsnet_verify.foreign import propose, verify_module
from capsnet_verify.subjects import Settings, of_model
from capsnet_verify.torch_module import load_module
from capsnet_verify.weight_map import read_map
from parity_tests.foreign_models import (
    LENGTHS,
    LENGTHS_AND_IMAGES,
    MODEL,
    SUBJECT,
    Lengths,
    LengthsAndImages,
)
from parity_tests.test_foreign import NORMALIZED, OF_ENCODER, names_of


class Raises(Lengths):
    def forward(self, x):
        raise ValueError("no such thing\nand more")


class Integers(Lengths):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(12, dtype=torch.int64))


@pytest.mark.parametrize(
    ("build", "old", "new", "message"),
    [
        (Lengths, '"primary.bias" =', '"prim.bias" =', '"prim.bias" is not in the state_dict of the torch model; it'),
        (Lengths, "2.bias", "9.bias", '"encoder.image2primary_capsules.9.bias", which ours has not; it has encoder.im'),
        (Lengths, "encoder.image2primary_capsules.2.bias", "decoder.2.bias", "there are no reconstructions in [outp"),
        (Lengths, '"primary.bias" = "encoder.image2primary_capsules.2.bias"', "", "[weights] lacks encoder.image2prim"),
        (Integers, '"primary.bias"', '"count"', '[weights] "count" is torch.int64; expected a floating-point type.'),
        (Lengths, "(p g) d o h", "(p g) o d h", '[weights] "W" is (1, 18, 5, 6, 4), which "1 (g p) o h d -> (p g) o d'),
        (Lengths, "conv1 = {", "conv2 = {", '[values] "conv2" is no submodule of the torch model; it has conv1, prim'),
        (Lengths, '"stem 0"', '"stem 1"', '[values] "conv1" is "stem 1", which ours has not; it has stem 0, primary p'),
        (Lengths, "activations = {}", "activations = 0", "at 0 of what forward returns, which is one tensor; expected"),
        (Lengths, "activations = {}", "poses = {}", '[outputs] "poses" is (3, 5); ours is (3, 5, 6).'),
        (Lengths, "[weights]", 'labels = "indices"\n[weights]', "called with images (3, 2, 9, 8) and labels (3,), rai"),
        (Raises, "", "", "called with images (3, 2, 9, 8), raises ValueError: no such thing."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_a_sentence(verify_foreign, build, old, new, message):
    assert old in LENGTHS
    with pytest.raises(UsageError, match=re.escape(message)):
        verify_foreign(build, LENGTHS.replace(old, new))


def test_a_submodule_that_runs_twice_or_never_is_refused(verify_foreign):
    class Twice(Lengths):
        def forward(self, x):
            self.conv1(x)
            return super().forward(x)

    with pytest.raises(UsageError, match=re.escape('[values] "conv1" ran 2 times in one call')):
        verify_foreign(Twice, LENGTHS)


def test_reconstructions_without_a_decoder_of_ours_are_refused(verify_foreign):
    with pytest.raises(UsageError, match=re.escape("[outputs] has reconstructions, and our model has no decoder.")):
        verify_foreign(LengthsAndImages, LENGTHS_AND_IMAGES, NORMALIZED)


def test_a_proposal_that_needs_no_editing_can_be_verified(tmp_path):
    subject = of_model("encoder", replace(MODEL, decoder_hidden=None))
    module = load_module("parity_tests.foreign_models:Everything")
    path = tmp_path / "map.toml"
    path.write_text(propose(module, subject, Settings()))
    verification = verify_module(module, read_map(path), subject, Settings())
    assert verification.status == 0
    assert names_of(verification) == ["poses", "total loss", *OF_ENCODER]
    assert verification.notes[0].startswith("Not in the map, and so not compared by themselves: temperature, decoder.0")


def test_a_forward_that_raises_is_told_in_the_proposal():
    proposal = propose(Raises(), SUBJECT, Settings())
    assert "# forward(images) raises ValueError: no such thing\n" in proposal


HERE = __name__
MODULE = Lengths()


def no_module():
    return 3


def unbuildable():
    raise RuntimeError("no weights")


def test_a_module_is_found_by_name_with_the_same_weights_each_time():
    one = load_module("parity_tests.foreign_models:Lengths")
    torch.rand(1)
    other = load_module("parity_tests.foreign_models:Lengths")
    assert torch.equal(one.W, other.W)
    assert isinstance(load_module("parity_tests.foreign_models:with_detach"), LengthsAndImages)
    assert load_module("parity_tests.test_foreign_errors:MODULE") is MODULE


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lengths", "The torch model 'lengths' is not a name that can be found; expected package.module:build."),
        ("no.such:build", "The torch model 'no.such:build' cannot be imported: ModuleNotFoundError: No module named"),
        (
            f"{HERE}:nothing",
            f"cannot be imported: AttributeError: module '{HERE}'",
        ),
        (
            f"{HERE}:LENGTHS",
            f"{HERE}:LENGTHS is str; expected a function that builds a",
        ),
        (
            f"{HERE}:no_module",
            f"{HERE}:no_module() returns int; expected a torch",
        ),
        (
            f"{HERE}:unbuildable",
            f"{HERE}:unbuildable() raises RuntimeError: no weights; expec",
        ),
    ],
)
def test_a_name_that_is_none_of_a_module_is_told(spec, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_module(spec)
