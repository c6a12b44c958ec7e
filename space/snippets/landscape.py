import torch

from modeling_uhop import FeatureMap, Separation, energy, maximize_separation, retrieve


angles = torch.deg2rad(torch.tensor([7.0, 26.0, 45.0, 64.0, 83.0]))
memories = torch.stack([angles.cos(), angles.sin()], dim=-1)
query = torch.tensor([[-0.35, 0.75]])

phi = FeatureMap(2, feature_init="identity", normalize=True)
separation = Separation.uhop_plus(steps=6, lr=0.03, optimizer="sgd", temperature=0.05, final_temperature=None)
maximize_separation(phi, memories, separation)
with torch.no_grad():
    for name, points, state in (("patterns", memories, query), ("features", phi(memories), phi(query))):
        end = retrieve(state, points, beta=35.0, alpha=1.0, steps=50)
        nearest = int(torch.cdist(end, points).argmin()) + 1
        fall = float(energy(state, points, beta=35.0, alpha=1.0) - energy(end, points, beta=35.0, alpha=1.0))
        print(f"{name}: x ends nearest to memory {nearest}, and its energy falls by {fall:.3f}")
