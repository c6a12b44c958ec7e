"""Data collator of UHopMIL: a batch of padded bags and their labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .bag_arrays import as_arrays, copy_bag, padded
from .feature_extraction_uhop_mil import UHopMILFeatureExtractor


# Because the collators of transformers accept these column names for labels, we do too.
_LABELS = ("label", "labels", "label_ids")


@dataclass
class DataCollatorForBags:
    """Make a batch of model inputs from examples `{"instances": bag, "label": class}`.

    Other columns are left out. Labels that are whole floats stay floats, because a batch does not
    show whether they are classes or regression targets; the models read them as classes.
    `label_smoothing_factor` of the Trainer, which computes the loss outside the model, needs
    integers.

    With `TrainingArguments(train_sampling_strategy="group_by_length")` the Trainer batches bags of
    similar length. It needs a feature extractor as `processing_class`, or a column `length`. The
    Trainer also evaluates through this collator, so `selection="random"` makes evaluation random
    too.

    Args:
        feature_extractor: A fitted `UHopMILFeatureExtractor`. `None` for bags that went through its
            `transform`; these are only padded.
        max_instances: Largest number of instances in a bag, at least 1; larger bags are reduced to
            it. `None` means no limit.
        selection: Which instances remain: "random" (drawn again each time, from torch's random
            state), "first", or "spread" (evenly over the bag).

    Raises:
        ValueError: If `max_instances` is below 1, if `selection` is unknown, or if only some
            examples have a label.
    """

    feature_extractor: UHopMILFeatureExtractor | None = None
    max_instances: int | None = None
    selection: str = "random"

    def __post_init__(self):
        if self.max_instances is not None and self.max_instances < 1:
            raise ValueError(f"max_instances must be at least 1, or None, got {self.max_instances}")
        if self.selection not in ("random", "first", "spread"):
            raise ValueError(f"selection must be one of ('random', 'first', 'spread'), got {self.selection!r}")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        bags, extractor = [example["instances"] for example in examples], self.feature_extractor
        arrays = [self._reduced(array) for array in (as_arrays(bags) if extractor is None else extractor.arrays(bags))]
        inputs = padded(arrays, arrays[0].shape[1:], copy_bag) if extractor is None else extractor.padded(arrays)
        batch = {name: torch.from_numpy(array) for name, array in inputs.items()}
        labels = [next((example[name] for name in _LABELS if example.get(name) is not None), None) for example in examples]
        unlabelled = [index for index, label in enumerate(labels) if label is None]
        if 0 < len(unlabelled) < len(labels):
            raise ValueError(f"bag {unlabelled[0]} of the batch has no label, but others have one; give a label to all bags or to none")
        if not unlabelled:
            batch["labels"] = _as_labels(labels)
        return batch

    def _reduced(self, bag: np.ndarray) -> np.ndarray:
        """Reduce a bag to `max_instances` instances."""
        count, limit = len(bag), self.max_instances
        if limit is None or count <= limit:
            return bag
        if self.selection == "random":
            return bag[torch.randperm(count)[:limit].sort().values.numpy()]
        return bag[:limit] if self.selection == "first" else bag[np.linspace(0, count - 1, limit).round().astype(int)]


def _as_labels(labels: list[Any]) -> torch.Tensor:
    """Labels of bags as one tensor.

    One label per bag gives (B,), as integers if all are integers, otherwise as floats. Several
    labels per bag give floats (B, num_labels).
    """
    stacked: list[torch.Tensor] = []
    for index, label in enumerate(labels):
        try:
            # Because an array of objects may hold numbers, we convert it through a list.
            array = label if isinstance(label, torch.Tensor) else np.asarray(label)
            array = np.asarray(array.tolist()) if array.dtype == object else array
            tensor = array.detach().cpu().to_dense() if isinstance(array, torch.Tensor) else torch.tensor(array)
        except (TypeError, ValueError):
            tensor = None
        if tensor is not None and tensor.shape == (1,):
            tensor = tensor[0]
        if tensor is None or tensor.is_complex() or tensor.dim() > 1 or (stacked and tensor.shape != stacked[0].shape):
            hint = "; config.label2id has the class index of a name" if isinstance(label, str) else ""
            raise ValueError(f"the label of bag {index} of the batch is not a number, or its shape differs from the first: {label!r}{hint}")
        tensor = tensor.float() if tensor.is_floating_point() or tensor.dim() > 0 else tensor.long()
        if not tensor.isfinite().all():
            raise ValueError(f"the label of bag {index} of the batch is missing or not finite in float32: {label!r}")
        stacked.append(tensor)
    floats = any(tensor.is_floating_point() for tensor in stacked)
    return torch.stack([tensor.float() if floats else tensor for tensor in stacked])
