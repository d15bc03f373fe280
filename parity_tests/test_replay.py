"""Layers of the JAX model that are fed PyTorch's values differ only if they are wrong themselves."""

import torch

import capsnet_torch
from capsnet_verify.report import describe
from capsnet_verify.subjects import Settings
from capsnet_verify.verification import verify
from parity_tests.foreign_models import ENCODER_GRADIENTS, MODEL, SUBJECT


def test_only_layers_with_other_weights_differ_if_all_are_fed_the_same_values():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = capsnet_torch.CapsNet.from_config(vars(MODEL)).double().state_dict()
    state = {name: tensor.numpy() for name, tensor in state.items()}
    bias, votes = "encoder.image2primary_capsules.0.bias", "encoder.primary2digit_capsules.input_caps2U.weight"
    others = state | {bias: state[bias] + 0.3, votes: 2 * state[votes]}
    verification = verify(SUBJECT._replace(state=state), Settings(steps=0, batch_size=3, torch_state=others))
    verdicts = {check.name: check.verdict for check in verification.checks if not check.name.startswith("weight")}
    # The gradients of the layers below are those through the doubled weight.
    assert [name for name, verdict in verdicts.items() if verdict == "DIFFERS"] == [
        "stem 0",
        "votes 0",
        *ENCODER_GRADIENTS[1:],
    ]
    assert {verdict for name, verdict in verdicts.items() if name.startswith(("poses", "decoder"))} == {"inherits"}
    assert "the layers below, these still differ: stem 0, votes 0 and 4 gradients; 20 others agree.\n" in describe(
        verification
    )
