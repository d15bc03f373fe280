"""Other people's capsule networks beside ours, with right and wrong maps, and with mistakes of their own."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from capsnet_jax.errors import UsageError
from capsnet_verify.foreign import propose, verify_module
from capsnet_verify.subjects import of_model
from capsnet_verify.torch_module import load_module
from capsnet_verify.verification import Settings
from capsnet_verify.weight_map import read_map
from parity_tests.foreign_models import (
    MODEL,
    SUBJECT,
    Everything,
    Lengths,
    LengthsAndImages,
    LengthsOverInputs,
    Normalized,
    with_detach,
)

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


@pytest.fixture
def verify(tmp_path):
    def verify(build, text, subject=SUBJECT, dtype="float64"):
        path = tmp_path / "map.toml"
        path.write_text(text)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = build()
        return verify_module(module, read_map(path), subject, Settings(dtype))

    return verify


def names_of(verification):
    return [check.name for check in verification.checks]


OF_ENCODER = [
    f"gradient {VOTES}",
    "gradient encoder.image2primary_capsules.2.bias",
    "gradient encoder.image2primary_capsules.2.weight",
    "gradient encoder.image2primary_capsules.0.bias",
    "gradient encoder.image2primary_capsules.0.weight",
]
OF_DECODER = [f"gradient decoder.{number}.{kind}" for number in (4, 2, 0) for kind in ("bias", "weight")]


@pytest.mark.parametrize(
    ("build", "text", "names"),
    [
        (Lengths, LENGTHS, ["stem 0", "activations", "total loss", *OF_ENCODER]),
        (
            LengthsAndImages,
            LENGTHS_AND_IMAGES,
            ["stem 0", "poses 0", "activations", "reconstructions", "total loss", *OF_DECODER, *OF_ENCODER],
        ),
        (Everything, EVERYTHING, ["poses", "reconstructions", "total loss", *OF_DECODER, *OF_ENCODER]),
    ],
)
def test_a_right_model_agrees_with_the_right_map(verify, build, text, names):
    verification = verify(build, text)
    assert names_of(verification) == names
    assert verification.status == 0
    assert all(found.hot for found in verification.heats)
    assert max(check.error for check in verification.checks) < 1e-13


def test_what_is_not_compared_and_what_mode_it_ran_in_is_told(verify):
    assert verify(LengthsAndImages, LENGTHS_AND_IMAGES).notes == [
        "Not in the map, and so not compared by themselves: temperature.",
        "The torch model ran in training mode, but for its dropout (dropout).",
    ]
    assert verify(Lengths, LENGTHS).notes == []


def test_float32_agrees_to_its_own_tolerance(verify):
    verification = verify(Lengths, LENGTHS, dtype="float32")
    assert verification.status == 0
    assert 1e-8 < max(check.error for check in verification.checks) < 2e-5


@pytest.mark.parametrize(
    ("build", "text", "old", "new", "first", "cause"),
    [
        (
            LengthsAndImages,
            LENGTHS_AND_IMAGES,
            '"decoder.2.weight" = "decoder.2.weight"',
            '"decoder.2.weight" = { name = "decoder.2.weight", axes = "a b -> b a" }',
            "reconstructions",
            'axes 0 and 1 of "decoder.2.weight" are mixed up in the map; swapped, this agrees',
        ),
        (
            Lengths,
            LENGTHS,
            '0.bias"\n"primary.weight" = "encoder.image2primary_capsules.2.weight"\n'
            '"primary.bias" = "encoder.image2primary_capsules.2.bias"',
            '2.bias"\n"primary.weight" = "encoder.image2primary_capsules.2.weight"\n'
            '"primary.bias" = "encoder.image2primary_capsules.0.bias"',
            "stem 0",
            '"primary.bias" and "conv1.bias" are mixed up in the map; swapped, this agrees',
        ),
        (
            Lengths,
            LENGTHS,
            'axes = "1 (g p) o h d -> (p g) d o h", sizes = { g = 3 }',
            'axes = "1 i o h d -> i d o h"',
            "activations",
            'input capsules, axis 1 of "W", are in order of groups, then positions, and ours of positions, then groups'
            "; as (g p) -> (p g) with g = 3 in the map, this agrees",
        ),
    ],
)
def test_a_mistake_in_the_map_is_found(verify, build, text, old, new, first, cause):
    assert old in text
    verification = verify(build, text.replace(old, new))
    assert verification.status == 1
    assert verification.first_divergence.name == first
    assert verification.cause == cause


def test_a_softmax_over_input_capsules_is_caught(verify):
    verification = verify(LengthsOverInputs, LENGTHS)
    assert names_of(verification)[:2] == ["stem 0", "activations"]
    assert verification.first_divergence.name == "activations"
    assert "not seen without more [values] in the map, as one of these: in activations, the axis" in verification.cause
    assert "in couplings 0, softmax axis" in verification.cause
    assert "stem 0" not in verification.cause  # which agrees


class Tanh(LengthsAndImages):
    def __init__(self):
        super().__init__()
        self.decoder[5] = nn.Tanh()


def test_no_cause_is_sought_before_a_step_that_agrees(verify):
    verification = verify(Tanh, LENGTHS_AND_IMAGES)
    assert verification.first_divergence.name == "reconstructions"
    assert verification.cause == (
        "not seen without more [values] in the map, as one of these: in reconstructions, the last layer's axis order "
        "or bias, or what follows it; in decoder 0, which capsule is masked, or the order of its axes"
    )


def test_a_gradient_that_stops_is_caught_where_values_agree(verify):
    verification = verify(with_detach, LENGTHS_AND_IMAGES)
    assert verification.first_divergence.name == f"gradient {VOTES}"
    assert verification.cause.startswith("a stop-gradient or detach")


def test_a_frozen_weight_is_caught(verify):
    def frozen():
        module = Lengths()
        module.primary.bias.requires_grad_(False)
        return module

    assert verify(frozen, LENGTHS).first_divergence.name == "gradient encoder.image2primary_capsules.2.bias"


class InFloat32(Lengths):
    def forward(self, x):
        return super().forward(x).float()


def test_a_cast_to_float32_is_named(verify):
    verification = verify(InFloat32, LENGTHS)
    assert verification.first_divergence.name == "activations"
    assert verification.cause == "a cast to float32 in PyTorch"


def test_weights_that_are_constant_are_compared_all_the_same(verify):
    def with_zero_biases():
        module = Lengths()
        nn.init.zeros_(module.conv1.bias)
        nn.init.zeros_(module.primary.bias)
        return module

    swapped = LENGTHS.replace("0.bias", "?").replace("2.bias", "0.bias").replace("?", "2.bias")
    assert verify(with_zero_biases, LENGTHS).status == 0
    assert verify(with_zero_biases, swapped).first_divergence.name == "stem 0"


NORMALIZED = of_model(
    "normalised", replace(MODEL, batch_norm=True, decoder_hidden=None), image_shape=(9, 8, 2), num_classes=5
)
NORM = f"""{CONVOLUTIONS.replace("capsules.2", "capsules.3")}
"norm.weight" = "encoder.image2primary_capsules.2.weight"
"norm.bias" = "encoder.image2primary_capsules.2.bias"
"norm.running_mean" = "encoder.image2primary_capsules.2.running_mean"
"norm.running_var" = "encoder.image2primary_capsules.2.running_var"
"digits.weight" = {{ name = "{VOTES}", axes = "o i h d -> i d o h" }}
[outputs]
poses = "poses"
"""


def test_running_means_are_compared_before_training_changes_them(verify):
    verification = verify(Normalized, NORM, NORMALIZED)
    assert names_of(verification)[:2] == ["poses", "poses with running means"]
    assert verification.status == 0
    swapped = NORM.replace('running_mean"\n', '?"\n').replace('running_var"\n', 'running_mean"\n')
    verification = verify(Normalized, swapped.replace("?", "running_var"), NORMALIZED)
    assert verification.first_divergence.name == "poses with running means"
    assert [check.name for check in verification.checks if check.verdict != "agrees"] == ["poses with running means"]


class Noisy(Lengths):
    always = False

    def forward(self, x):
        return super().forward(x) + (torch.rand(()) if self.training or self.always else 0)


class AlwaysNoisy(Noisy):
    always = True


def test_what_is_random_in_training_runs_in_evaluation_mode(verify):
    verification = verify(Noisy, LENGTHS)
    assert verification.status == 0
    assert verification.notes == ["The torch model ran in evaluation mode, as its outputs are random in training mode."]
    with pytest.raises(UsageError, match="The outputs of the torch model are random; expected the same"):
        verify(AlwaysNoisy, LENGTHS)


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
def test_what_does_not_fit_is_told_in_a_sentence(verify, build, old, new, message):
    assert old in LENGTHS
    with pytest.raises(UsageError, match=re.escape(message)):
        verify(build, LENGTHS.replace(old, new))


def test_a_submodule_that_runs_twice_or_never_is_refused(verify):
    class Twice(Lengths):
        def forward(self, x):
            self.conv1(x)
            return super().forward(x)

    with pytest.raises(UsageError, match=re.escape('[values] "conv1" ran 2 times in one call')):
        verify(Twice, LENGTHS)


def test_reconstructions_without_a_decoder_of_ours_are_refused(verify):
    with pytest.raises(UsageError, match=re.escape("[outputs] has reconstructions, and our model has no decoder.")):
        verify(LengthsAndImages, LENGTHS_AND_IMAGES, NORMALIZED)


def test_a_proposal_that_needs_no_editing_can_be_verified(tmp_path):
    subject = of_model("encoder", replace(MODEL, decoder_hidden=None), image_shape=(9, 8, 2), num_classes=5)
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
    assert load_module("parity_tests.test_foreign:MODULE") is MODULE


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lengths", "The torch model 'lengths' is not a name that can be found; expected package.module:build."),
        ("no.such:build", "The torch model 'no.such:build' cannot be imported: ModuleNotFoundError: No module named"),
        ("parity_tests.test_foreign:nothing", "cannot be imported: AttributeError: module 'parity_tests.test_foreign"),
        ("parity_tests.test_foreign:NORM", "parity_tests.test_foreign:NORM is str; expected a function that builds a"),
        ("parity_tests.test_foreign:no_module", "parity_tests.test_foreign:no_module() returns int; expected a torch"),
        ("parity_tests.test_foreign:unbuildable", "test_foreign:unbuildable() raises RuntimeError: no weights; expec"),
    ],
)
def test_a_name_that_is_none_of_a_module_is_told(spec, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_module(spec)
