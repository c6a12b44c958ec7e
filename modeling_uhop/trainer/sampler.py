"""Batches of the separation step, drawn from a data set of its own or from that of the training."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import RemoveColumnsCollator


def sampler(
    loader: DataLoader, batch_size: int, dataset: Any = None, collate: Callable | None = None, names: set[str] | None = None
) -> Callable[[int, int], dict[str, Any]]:
    """Return a function of (seed, index) that makes batch `index` for this process.

    Args:
        loader: The training data loader.
        batch_size: Number of examples, over all processes together.
        dataset: Data set to draw from; `None` means that of the loader.
        collate: Function from examples to a batch; `None` means that of the loader.
        names: Columns to keep of an example of `dataset`; `None` keeps all.

    Raises:
        TypeError: If `dataset` is not a data set of examples.
        ValueError: If the data set is empty, or a stream that can be read only once.
    """
    if isinstance(dataset, str | Mapping | torch.Tensor | DataLoader):
        raise TypeError(f"dataset must be a data set of examples, map-style or a stream, got {type(dataset).__name__}")
    given = loader.dataset if dataset is None else dataset
    source: Any = given.dataset if isinstance(given, IterableDatasetShard) else given
    collate = loader.collate_fn if collate is None else collate
    if dataset is not None and isinstance(collate, RemoveColumnsCollator):
        # Because that of the Trainer drops what the model does not take, and `names` says what is kept, we use what it wraps.
        collate = collate.data_collator
    rank, world_size = PartialState().process_index, PartialState().num_processes
    whose = "training" if dataset is None else "separation"
    if isinstance(source, Iterator) or (is_stream(source) and iter(copy.copy(source)) is iter(copy.copy(source))):
        raise ValueError(f"the {whose} data set is a stream that can be read only once, but the separation step needs to read it again")
    if not is_stream(source) and len(source) == 0:
        raise ValueError(f"the {whose} data set is empty: there is nothing to separate")
    stream: Iterator[Any] = iter(())
    position = 0

    def collated(examples: list[Any]) -> dict[str, Any]:
        if dataset is not None and names is not None:
            examples = [{key: each[key] for key in each if key in names} if isinstance(each, Mapping) else each for each in examples]
        return collate(examples)

    def from_stream(seed: int, index: int) -> dict[str, Any]:
        """Read batch after batch from the stream, starting again at its end.

        A resume skips to the batch where the run had stopped.
        """
        nonlocal stream, position
        if position > index:
            stream, position = iter(()), 0
        while position <= index:
            examples = list(itertools.islice(stream, batch_size))
            while len(examples) < batch_size:
                # Because a stream may count how often it is read, we read a copy of it.
                stream = iter(copy.copy(source))
                more = list(itertools.islice(stream, batch_size - len(examples)))
                if not more:
                    raise ValueError(f"the {whose} data set is an empty stream: there is nothing to separate")
                examples += more
            position += 1
        return collated(examples[rank::world_size])

    def from_indices(seed: int, index: int) -> dict[str, Any]:
        """Draw the examples of a batch at random, without repetition as far as possible."""
        generator = torch.Generator().manual_seed(combined_seed(seed, index))
        size = len(source)
        chosen = torch.cat([torch.randperm(size, generator=generator) for _ in range(-(-batch_size // size))])[:batch_size]
        return collated([source[i] for i in chosen[rank::world_size].tolist()])

    return from_stream if is_stream(source) else from_indices


def accepted_names(model: Any, label_names: list[str]) -> set[str]:
    """Return the columns that the Trainer gives to a model: those that its `forward` names.

    For a model without memories of its own, `special_tokens_mask` is kept too, as `memory_sets_of`
    uses it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    more = () if hasattr(model, "memory_sets") else ("special_tokens_mask",)
    return {*inspect.signature(base.forward).parameters, *label_names, *more, "label", "label_ids"}


def is_stream(dataset: Any) -> bool:
    """Return whether a data set has no length or no index access."""
    return isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))


def combined_seed(*parts: int) -> int:
    """Combine several integers into one seed; neighbouring integers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
