"""The routing algorithms of the PyTorch model agree with the code of their authors, values and gradients."""

from functools import partial

import pytest
import torch

from capsnet_torch.conv_capsules import softmax_over_parents
from capsnet_torch.routing import ROUTINGS
from tests import golden


@pytest.mark.parametrize("name", golden.NAMES)
def test_the_authors_code_agrees(name):
    case = golden.read(name)
    arrays = {name: torch.tensor(value, requires_grad=name == "votes") for name, value in case.arrays.items()}
    given = case.options | {name: torch.tensor(weight) for name, weight in case.weights.items()}
    if case.inputs is not None:
        inputs = torch.tensor(case.inputs)
        given["softmax"] = partial(softmax_over_parents, inputs=inputs, num_inputs=int(inputs.max()) + 1)
    routed = ROUTINGS[case.routing](**arrays, **given)
    (gradient,) = torch.autograd.grad((routed.poses * torch.tensor(case.cotangent)).sum(), arrays["votes"])
    results = routed._asdict() | {"gradient_of_votes": gradient}
    golden.assert_agrees({name: results[name].detach() for name in case.expected}, case.expected)
