"""Mimetic initialization: the projections of an attention layer begin like those of trained layers."""

from typing import Any

import torch
from transformers import initialization as init


def mimetic_factors(width: int, rank: int, *, identity: float, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Draw two matrices whose product is close to a multiple of the identity.

    $$
    A B^\top \approx M = \mathrm{noise} \cdot Z + \mathrm{identity} \cdot I, \qquad
    Z_{ij} \sim \mathcal{N}(0, 1 / \mathrm{width})
    $$

    With the singular value decomposition $M = U S V^\top$, the factors are the first `rank` columns
    of $U S^{1/2}$ and of $V S^{1/2}$. Their product is the matrix of this rank that is closest to M.

    Args:
        width: Number of rows of each factor.
        rank: Number of columns, at most `width`.
        identity: Weight of the identity; it may be negative.
        noise: Weight of the random matrix.

    Returns:
        A and B, each (width, rank), in fp32.
    """
    random = torch.randn(width, width, dtype=torch.float32) * width**-0.5
    left, sizes, right = torch.linalg.svd(noise * random + identity * torch.eye(width, dtype=torch.float32))
    roots = sizes[:rank].sqrt()
    return left[:, :rank] * roots, right[:rank].mT * roots


@torch.no_grad()
def mimetic_(layer: Any) -> None:
    r"""Set the projections of a `HopfieldAttention` to mimetic values (arXiv 2305.09828, section 3).

    For each head, and for the values and the output of all heads together, with tokens as rows:

    $$
    W_Q W_K^\top \approx 0.7\, Z + 0.7\, I, \qquad W_V W_O \approx 0.4\, Z - 0.4\, I
    $$

    $W_Q$ and $W_K$ act on features, so the first identity has the width of a feature. With an
    orthogonal $\Phi$, it is also an identity of the tokens. Biases do not change, and neither do
    weights that a checkpoint has set.
    """
    heads = [mimetic_factors(layer.q_proj.in_features, layer.head_dim, identity=0.7, noise=0.7) for _ in range(layer.num_attention_heads)]
    for projection, factors in zip((layer.q_proj, layer.k_proj), zip(*heads, strict=True), strict=True):
        init.copy_(projection.weight, torch.cat(factors, 1).mT)
    value, output = mimetic_factors(layer.v_proj.in_features, layer.v_proj.out_features, identity=-0.4, noise=0.4)
    init.copy_(layer.v_proj.weight, value.mT)
    init.copy_(layer.o_proj.weight, output)
