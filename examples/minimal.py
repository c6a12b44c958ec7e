"""U-Hop in plain PyTorch on scikit-learn's digits: feature map Phi, separation (Stage I), retrieval (Stage II), energy."""

import torch
from sklearn.datasets import load_digits


def phi(patterns, weight):
    """Features on the unit sphere, Phi(u) = W u / |W u|; the kernel is K(u, v) = <Phi(u), Phi(v)>. W = identity: no Phi."""
    return torch.nn.functional.normalize(patterns @ weight.T, dim=-1)


def simplex_map(scores, alpha):
    """Association weights of scores: softmax (alpha = 1), or sparsemax (alpha = 2), which gives most memories exactly 0."""
    means = (scores.sort(-1, descending=True).values.cumsum(-1) - 1) / torch.arange(1, scores.shape[-1] + 1)
    return scores.softmax(-1) if alpha == 1 else (scores - means.amax(-1, keepdim=True)).clamp(min=0)


def retrieve(queries, memories, weight, beta, alpha):
    """Stage II, one update step (equation 2.4): the memories (not their features), mixed by association weights."""
    return simplex_map(beta * phi(queries, weight) @ phi(memories, weight).T, alpha) @ memories


def energy(queries, memories, weight, beta, alpha):
    """E(x) = K(x, x) / 2 - Psi*(beta K(x, Xi)) / beta (equation 2.2), where Psi*(z) = <p, z> + entropy(p) of the weights p."""
    scores = beta * phi(queries, weight) @ phi(memories, weight).T
    p = simplex_map(scores, alpha)
    entropy = torch.special.entr(p) if alpha == 1 else (p - p.square()) / 2
    return phi(queries, weight).square().sum(-1) / 2 - (p * scores + entropy).sum(-1) / beta


def separation_loss(features, temperature=0.25):
    """U-Hop, equation 2.6: log mean exp((K - 1) / temperature) over all pairs. The lower, the farther apart."""
    pairs = (features @ features.T)[~torch.eye(len(features), dtype=torch.bool)]
    return ((pairs - 1) / temperature).exp().mean().log()


def denoising_loss(corrupted_features, features, temperature):
    """Not in the papers: minus the log weight of the right memory (softmax), for queries that are corrupted copies of the memories."""
    return -(corrupted_features @ features.T / temperature).log_softmax(-1).diagonal().mean()


def separate(weight, loss, steps, rate=1.0):
    """Stage I: gradient steps on W alone; the stored patterns stay as they are."""
    for _ in range(steps):
        weight = weight.detach().requires_grad_()
        weight = weight - rate * torch.autograd.grad(loss(weight), weight)[0]
    return weight.detach()


if __name__ == "__main__":
    torch.manual_seed(0)
    memories, beta, start = torch.tensor(load_digits().data[:100] / 16, dtype=torch.float32), 10.0, torch.randn(64, 64) / 8
    queries, *copies = (memories * (torch.rand(memories.shape) < 0.5) for _ in range(201))  # half of the pixels set to 0
    u_hop = separate(start, lambda w: separation_loss(phi(memories, w)), steps=20)
    denoising = separate(start, lambda w: denoising_loss(phi(copies.pop(), w), phi(memories, w), 1 / beta), steps=200)
    print("100 memories, beta = 10   error, softmax   error, sparsemax   separation loss   energy, alpha = 1")
    for name, w in {"no Phi": torch.eye(64), "untrained Phi": start, "U-Hop": u_hop, "denoising": denoising}.items():
        soft, sparse = ((retrieve(queries, memories, w, beta, alpha) - memories).square().sum(-1).mean() for alpha in (1, 2))
        before, after = (energy(x, memories, w, beta, 1).mean() for x in (queries, retrieve(queries, memories, w, beta, 1)))
        print(f"{name:<23} {soft:16.2f} {sparse:18.2f} {separation_loss(phi(memories, w)):17.2f} {before:9.2f} -> {after:.2f}")
