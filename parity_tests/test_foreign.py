"""Other people's capsule networks beside ours, with right and wrong maps, and with mistakes of their own."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from capsnet_jax.errors import UsageError
from capsnet_verify.subjects import of_model
from parity_tests.foreign_models import (
    CONVOLUTIONS,
    EVERYTHING,
    LENGTHS,
    LENGTHS_AND_IMAGES,
    MODEL,
    VOTES,
    Everything,
    Lengths,
    LengthsAndImages,
    LengthsOverInputs,
    Normalized,
    with_detach,
)


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
def test_a_right_model_agrees_with_the_right_map(verify_foreign, build, text, names):
    verification = verify_foreign(build, text)
    assert names_of(verification) == names
    assert verification.status == 0
    assert all(found.hot for found in verification.heats)
    assert max(check.error for check in verification.checks) < 1e-13


def test_what_is_not_compared_and_what_mode_it_ran_in_is_told(verify_foreign):
    assert verify_foreign(LengthsAndImages, LENGTHS_AND_IMAGES).notes == [
        "Not in the map, and so not compared by themselves: temperature.",
        "The torch model ran in training mode, but for its dropout (dropout).",
    ]
    assert verify_foreign(Lengths, LENGTHS).notes == []


def test_float32_agrees_to_its_own_tolerance(verify_foreign):
    verification = verify_foreign(Lengths, LENGTHS, dtype="float32")
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
def test_a_mistake_in_the_map_is_found(verify_foreign, build, text, old, new, first, cause):
    assert old in text
    verification = verify_foreign(build, text.replace(old, new))
    assert verification.status == 1
    assert verification.first_divergence.name == first
    assert verification.cause == cause


def test_a_softmax_over_input_capsules_is_caught(verify_foreign):
    verification = verify_foreign(LengthsOverInputs, LENGTHS)
    assert names_of(verification)[:2] == ["stem 0", "activations"]
    assert verification.first_divergence.name == "activations"
    assert "not seen without more [values] in the map, as one of these: in activations, the axis" in verification.cause
    assert "in couplings 0, softmax axis" in verification.cause
    assert "stem 0" not in verification.cause  # which agrees


class WithEpsilon(Lengths):
    """Capsules divided by a norm that is a little too long, as much public code does."""

    def forward(self, x):
        return super().forward(x) * (1 - 1e-8)


def test_a_mistake_in_the_map_is_found_beside_an_epsilon(verify_foreign):
    verification = verify_foreign(WithEpsilon, LENGTHS.replace("(g p)", "(p g)"))
    assert verification.first_divergence.name == "activations"
    assert "in order of groups, then positions" in verification.cause
    assert verification.cause.endswith("in the map, this is off by 1.0e-08 only")


def test_an_epsilon_is_not_blamed_on_the_map(verify_foreign):
    verification = verify_foreign(WithEpsilon, LENGTHS)
    assert verification.first_divergence.name == "activations"
    assert "the map" not in verification.cause
    assert verification.cause.startswith("an epsilon, or less precision")


class Tanh(LengthsAndImages):
    def __init__(self):
        super().__init__()
        self.decoder[5] = nn.Tanh()


def test_no_cause_is_sought_before_a_step_that_agrees(verify_foreign):
    verification = verify_foreign(Tanh, LENGTHS_AND_IMAGES)
    assert verification.first_divergence.name == "reconstructions"
    assert verification.cause == (
        "not seen without more [values] in the map, as one of these: in reconstructions, the last layer's axis order "
        "or bias, or what follows it; in decoder 0, which capsule is masked, or the order of its axes"
    )


def test_a_gradient_that_stops_is_caught_where_values_agree(verify_foreign):
    verification = verify_foreign(with_detach, LENGTHS_AND_IMAGES)
    assert verification.first_divergence.name == f"gradient {VOTES}"
    assert verification.cause.startswith("a stop-gradient or detach")


def test_a_frozen_weight_is_caught(verify_foreign):
    def frozen():
        module = Lengths()
        module.primary.bias.requires_grad_(False)
        return module

    assert verify_foreign(frozen, LENGTHS).first_divergence.name == "gradient encoder.image2primary_capsules.2.bias"


class InFloat32(Lengths):
    def forward(self, x):
        return super().forward(x).float()


def test_a_cast_to_float32_is_named(verify_foreign):
    verification = verify_foreign(InFloat32, LENGTHS)
    assert verification.first_divergence.name == "activations"
    assert verification.cause == "a cast to float32 in PyTorch"


def test_weights_that_are_constant_are_compared_all_the_same(verify_foreign):
    def with_zero_biases():
        module = Lengths()
        nn.init.zeros_(module.conv1.bias)
        nn.init.zeros_(module.primary.bias)
        return module

    swapped = LENGTHS.replace("0.bias", "?").replace("2.bias", "0.bias").replace("?", "2.bias")
    assert verify_foreign(with_zero_biases, LENGTHS).status == 0
    assert verify_foreign(with_zero_biases, swapped).first_divergence.name == "stem 0"


NORMALIZED = of_model("normalised", replace(MODEL, batch_norm=True, decoder_hidden=None))
NORM = f"""{CONVOLUTIONS.replace("capsules.2", "capsules.3")}
"norm.weight" = "encoder.image2primary_capsules.2.weight"
"norm.bias" = "encoder.image2primary_capsules.2.bias"
"norm.running_mean" = "encoder.image2primary_capsules.2.running_mean"
"norm.running_var" = "encoder.image2primary_capsules.2.running_var"
"digits.weight" = {{ name = "{VOTES}", axes = "o i h d -> i d o h" }}
[outputs]
poses = "poses"
"""


def test_running_means_are_compared_before_training_changes_them(verify_foreign):
    verification = verify_foreign(Normalized, NORM, NORMALIZED)
    assert names_of(verification)[:2] == ["poses", "poses with running means"]
    assert verification.status == 0
    swapped = NORM.replace('running_mean"\n', '?"\n').replace('running_var"\n', 'running_mean"\n')
    verification = verify_foreign(Normalized, swapped.replace("?", "running_var"), NORMALIZED)
    assert verification.first_divergence.name == "poses with running means"
    assert [check.name for check in verification.checks if check.verdict != "agrees"] == ["poses with running means"]


class Noisy(Lengths):
    always = False

    def forward(self, x):
        return super().forward(x) + (torch.rand(()) if self.training or self.always else 0)


class AlwaysNoisy(Noisy):
    always = True


def test_what_is_random_in_training_runs_in_evaluation_mode(verify_foreign):
    verification = verify_foreign(Noisy, LENGTHS)
    assert verification.status == 0
    assert verification.notes == ["The torch model ran in evaluation mode, as its outputs are random in training mode."]
    with pytest.raises(UsageError, match="The outputs of the torch model are random; expected the same"):
        verify_foreign(AlwaysNoisy, LENGTHS)
