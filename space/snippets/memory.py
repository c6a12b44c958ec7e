import torch
from sklearn.datasets import load_digits

from modeling_uhop import UHopMemoryConfig, UHopMemoryModel, mask_patterns


patterns = torch.tensor(load_digits().data[:100] / 16, dtype=torch.float32)
memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=64))
memory.store(patterns)
damaged = mask_patterns(patterns, 0.4)


@torch.no_grad()
def confused() -> int:
    retrieved = memory(damaged).retrieved
    return int((torch.cdist(retrieved, patterns).argmin(-1) != torch.arange(100)).sum())


print(f"without separation: {confused()} of 100 digits are confused")
memory.separate()
print(f"after separation:   {confused()} of 100 digits are confused")
