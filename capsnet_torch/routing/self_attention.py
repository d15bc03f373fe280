"""Self-attention routing of Efficient-CapsNet; see `capsnet_jax.routing.self_attention`."""

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet_torch.capsules import Routed
from capsnet_torch.ops import capsule_norm, exponential_squash
from capsnet_torch.routing.arguments import learns


@learns(prior="i o")
def self_attention(
    votes: Float[Tensor, "b i o h"], activations: Float[Tensor, "b i"], *, prior: Float[Tensor, "i o"] | float = 0.0
) -> Routed:
    """Attend among the votes for each output capsule, with the paper's matrix of all pairs of input capsules.

    References:
        Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet: Capsule Network with Self-Attention Routing" (2021),
        section 3.2. https://arxiv.org/abs/2101.12491
    """
    # axes: b = batch, o = output capsules, i and k = input capsules, h = output pose size
    keys = votes.transpose(1, 2)
    attention = keys @ keys.transpose(2, 3) / votes.shape[-1] ** 0.5  # [b o i k]
    couplings = torch.softmax(attention.sum(dim=-1), dim=1).transpose(1, 2) + prior
    poses = exponential_squash(torch.einsum("bio,bioh->boh", couplings, votes))
    return Routed(poses, capsule_norm(poses), couplings)
