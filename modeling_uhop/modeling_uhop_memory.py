"""PyTorch UHopMemory model: a kernelized associative memory that stores patterns, separates them, and retrieves."""

import copy
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .capacity import (
    MemoryReport,
    is_exactly_retrieved,
    is_well_separated,
    margins,
    metastable_sizes,
    retrieval_error_bound,
    separation_bounds,
)
from .configuration_uhop_memory import UHopMemoryConfig
from .corruption import Corruption, mask_patterns
from .energy import association_of, energy, inner_products, mixed
from .feature_map import FeatureMap, norms, unit_norm
from .modeling_hopfield import HopfieldPreTrainedModel
from .search import Candidates, brute_force, faiss_index, mark_in_step, mixture, sparse_association, trained_index
from .separation import maximize_separation
from .simplex import at_least_fp32
from .spherical import are_independent, separate_optimally
from .validation import check_tensors, is_finite, is_plain, is_traced


_SEARCHED_CODES, _MEMORIES_IN_A_STEP = 1000, 4096


class CachedFeatures(NamedTuple):
    """Features of what a memory model stores, and what they were computed from."""

    memories: torch.Tensor
    state: tuple[int, torch.dtype, bool]
    weight: torch.Tensor
    features: torch.Tensor


class Indexed(NamedTuple):
    """What `UHopMemoryModel.index` was asked for, and the index of faiss with the features and their version that it holds."""

    factory: str
    parameters: str
    features: torch.Tensor | None = None
    version: int = 0
    candidates: Candidates | None = None


# Apart from the models, so that a copy of one has no part in them.
_FEATURES: WeakKeyDictionary[nn.Module, CachedFeatures] = WeakKeyDictionary()
_INDEXES: WeakKeyDictionary[nn.Module, Indexed] = WeakKeyDictionary()


@dataclass
class UHopMemoryOutput(ModelOutput):
    """
    Args:
        retrieved: (Q, pattern_dim), the states after the last update.
        association: (Q, M), the weights of the last update.
        energy: (Q,), the energy (2.2) of the retrieved states; `None` for similarities that have none.
        steps: (Q,), how many updates each query took.
    """

    retrieved: torch.Tensor | None = None
    association: torch.Tensor | None = None
    energy: torch.Tensor | None = None
    steps: torch.Tensor | None = None


@dataclass
class UHopMemorySearchOutput(ModelOutput):
    """
    Args:
        retrieved: (Q, pattern_dim), the states after the last update.
        indices, weights: (Q, K), the memories that have any weight in the last update, the largest first; 0 beyond them.
    """

    retrieved: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class UHopMemoryPreTrainedModel(HopfieldPreTrainedModel):
    config: UHopMemoryConfig
    config_class = UHopMemoryConfig
    base_model_prefix = "memory"
    main_input_name = "queries"
    read_at_each_call = (*HopfieldPreTrainedModel.read_at_each_call, "degree")
    _auto_classes = {
        "AutoConfig": "configuration_uhop_memory.UHopMemoryConfig",
        "AutoModel": "modeling_uhop_memory.UHopMemoryModel",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FeatureMap):
            module.reset_parameters()
        elif isinstance(module, UHopMemoryModel):
            init.zeros_(module.memories)


class UHopMemoryModel(UHopMemoryPreTrainedModel):
    """Associative memory of U-Hop (arXiv 2404.03827), Algorithm 1: store, separate (Stage I), retrieve (Stage II).

    The stored patterns are saved with the model.

    >>> import torch
    >>> from modeling_uhop import UHopMemoryConfig, UHopMemoryModel

    >>> patterns = torch.rand(20, 64)
    >>> memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=64))
    >>> memory.store(patterns)
    >>> history = memory.separate(steps=50)
    >>> memory(patterns).retrieved.shape
    torch.Size([20, 64])
    """

    def __init__(self, config: UHopMemoryConfig):
        # A copy: `store` keeps num_memories up to date, and two memories may be built from one configuration.
        super().__init__(copy.deepcopy(config))
        self.feature_map = (
            FeatureMap(config.pattern_dim, config.feature_dim, feature_init=config.feature_init, normalize=config.normalize_features)
            if config.similarity == "kernel"
            else None
        )
        self.register_buffer("memories", torch.zeros(config.num_memories, config.pattern_dim))
        self.memories: torch.Tensor
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """Of the memories: without a feature map there is no parameter to tell."""
        return self.memories.dtype

    @property
    def device(self) -> torch.device:
        """Of the memories, likewise."""
        return self.memories.device

    def stored_features(self) -> torch.Tensor:
        """Features (M, feature_dim) of the memories, or these themselves without a feature map.

        They are kept for the next retrieval, and computed again when the memories or the map have changed (memories not through `.data`,
        a NumPy view or a collective, which PyTorch does not count), where a gradient has to pass, Phi is offloaded, hooked or in an
        adapter, under autocast and inference mode, and in a traced graph.
        """
        return self.memories if self.feature_map is None else self._cached_features().clone()

    def _cached_features(self) -> torch.Tensor:
        """`stored_features`, not to be written to."""
        self.check_configuration()
        if self.feature_map is None:
            return self.memories
        if is_traced() or not is_plain(self.feature_map, FeatureMap):
            return self._features(self.memories, "memories")
        memories, weight = self.memories, self.feature_map.weight
        passing = torch.is_grad_enabled() and (weight.requires_grad or memories.requires_grad)
        if passing or torch.is_autocast_enabled(weight.device.type) or torch.is_inference_mode_enabled() or memories.is_inference():
            return self._features(memories, "memories")
        cached = _FEATURES.get(self)
        state = (memories._version, weight.dtype, self.feature_map.normalize)
        # The weight's own version tells nothing of fused optimizers and collectives.
        if cached is None or cached.memories is not memories or cached.state != state or not torch.equal(cached.weight, weight):
            cached = _FEATURES[self] = CachedFeatures(memories, state, weight.detach().clone(), self._features(memories, "memories"))
        return cached.features

    def __len__(self) -> int:
        return len(self.memories)

    def store(self, patterns: torch.Tensor) -> None:
        """Replace all memories by `patterns` (M, pattern_dim).

        Integer patterns are stored in the dtype of the memory. Equal patterns are stored, with a warning that names them.

        Raises:
            ValueError: For a wrong shape, or entries that are not finite.
            TypeError: For what is no tensor.
        """
        patterns = self._checked(patterns, "patterns")
        if patterns.dim() != 2:
            raise ValueError(f"patterns must have shape (M, {self.config.pattern_dim}), got {tuple(patterns.shape)}")
        self.memories = patterns.detach().clone()
        self.config.num_memories = len(patterns)
        duplicates = _duplicates(self.memories)
        if duplicates:
            warnings.warn(f"{len(duplicates)} memories equal an earlier one, as pairs: {duplicates[:10]}", stacklevel=2)

    def append(self, patterns: torch.Tensor) -> None:
        """Store `patterns` (M, pattern_dim), or one (pattern_dim,), behind those that are stored."""
        self.store(torch.cat([self.memories, torch.atleast_2d(self._checked(patterns, "patterns"))]))

    def delete(self, indices: int | list[int] | torch.Tensor) -> None:
        """Forget the memories at `indices`; an index that does not exist is an `IndexError`, and one that is no integer a `TypeError`."""
        count = len(self)
        given = torch.as_tensor(indices)
        if given.numel() == 0:
            return
        if given.is_floating_point() or given.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {given.dtype}")
        positions = given.reshape(-1).tolist()
        for position in positions:
            if not -count <= position < count:
                raise IndexError(f"there is no memory {position}; {count} are stored")
        kept = torch.ones(count, dtype=torch.bool, device=self.memories.device)
        kept[positions] = False
        self.store(self.memories[kept])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Takes on as many memories as the checkpoint has."""
        given = state_dict.get(f"{prefix}memories")
        if given is not None and given.dim() == 2 and given.shape[1] == self.memories.shape[1]:
            if len(given) != len(self):
                self.memories = self.memories.new_zeros(given.shape)
            self.config.num_memories = len(given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def separate(
        self,
        steps: int = 100,
        lr: float | None = None,
        *,
        method: str = "denoising",
        corruption: Corruption = mask_patterns,
        **options,
    ) -> list[float]:
        r"""Separate the stored patterns in feature space (Stage I): train the feature map and nothing else.

        - "denoising" (default): learn to recognise each memory from a corrupted copy, by the cross
          entropy of the association weights at the inverse temperature of this memory,
          $-\log \mathrm{softmax}_\nu(\beta \langle \Phi(\tilde\xi_\mu), \Phi(\xi_\nu) \rangle)_\mu$ with unit-norm
          features; see `denoising_loss`. It is not in the papers. What it learns from one kind of corruption
          helps against others. Plain separation of clean patterns can amplify their corruption.
        - "uhop": the average separation loss (2.6) of U-Hop, then rows of W of unit norm.
        - "uhop+": the optimal spherical code of U-Hop+, computed once without `steps` and `lr`, if the
          memories are linearly independent. Projected gradient descent on W with a falling temperature
          otherwise, with `options`, and for more than 1000 memories that are also more than twice
          `feature_dim`.

        With more than 4096 memories each step uses a new random sample of 4096; `batch_size` in
        `options` changes this number.

        Args:
            steps: Gradient steps.
            lr: Learning rate; `None` means 1e-3.
            method: "denoising", "uhop" or "uhop+".
            corruption: For "denoising", a function from patterns to corrupted patterns: `mask_patterns`,
                `add_noise`, or your own.
            options: Further arguments of `maximize_separation`.

        Returns:
            The loss before each step, and after the last. For the optimal code two numbers: minus the
            smallest margin before and after.

        Raises:
            ValueError: If there is no feature map, or fewer than two memories.
        """
        self.check_configuration()
        if self.feature_map is None:
            raise ValueError(f"similarity {self.config.similarity!r} has no feature map to separate with; 'kernel' has")
        if len(self) < 2:
            raise ValueError(f"separation needs at least two memories, got {len(self)}")
        code_is_known = len(self) <= 2 * len(self.feature_map.weight)
        if method == "uhop+" and not options and (code_is_known or len(self) <= _SEARCHED_CODES) and are_independent(self.memories):
            return self._separate_optimally()
        options.setdefault("batch_size", _MEMORIES_IN_A_STEP)
        if method == "denoising":
            options = {"temperature": 1.0 / self.config.beta, "corruption": corruption, **options}
        return maximize_separation(self.feature_map, self.memories, method=method, steps=steps, lr=1e-3 if lr is None else lr, **options)

    def _separate_optimally(self) -> list[float]:
        assert self.feature_map is not None
        before, _ = margins(self._unit_kernel())
        separate_optimally(self.feature_map, self.memories)
        after, _ = margins(self._unit_kernel())
        return [-before.min().item(), -after.min().item()]

    def forward(
        self,
        queries: torch.Tensor,
        update_steps: int | None = None,
        tolerance: float | None = None,
        output_energies: bool = True,
        return_dict: bool | None = None,
    ) -> UHopMemoryOutput | tuple:
        """Retrieve (Stage II).

        Args:
            queries: (Q, pattern_dim), or one (pattern_dim,).
            update_steps: Updates to do, at least 1; `None` for `config.update_steps`.
            tolerance: Stop updating a query once no entry of it changes by more than this; `None` to do all updates.
            output_energies: Whether to compute the energies of what was retrieved, which cost about as much as an update.
            return_dict: `False` for a tuple; `None` for what the configuration has.

        Raises:
            ValueError: If nothing is stored, queries have a wrong shape or entries that are not finite, or features, scores or energies
                leave the range of their dtype (scores and energies that of fp64).
            TypeError: For what is no tensor.
        """
        steps = self.config.update_steps if update_steps is None else update_steps
        if steps < 1:
            raise ValueError(f"update_steps must be at least 1, got {steps}")
        self.check_configuration()
        states = torch.atleast_2d(self._checked(queries, "queries"))
        settings: dict[str, Any] = {"beta": self.config.beta, "alpha": self.config.alpha}
        similarity: dict[str, Any] = {"similarity": self.config.similarity, "degree": self.config.degree}
        features = self._cached_features()
        moving = torch.ones(states.shape[0], dtype=torch.bool, device=states.device)
        taken = torch.zeros(states.shape[0], dtype=torch.long, device=states.device)
        weights = association_of(self._features(states), features, **settings, **similarity)
        for step in range(steps):
            if step > 0:
                updated = association_of(self._features(states), features, **settings, **similarity)
                weights = torch.where(moving.unsqueeze(-1), updated, weights)
            next_states = torch.where(moving.unsqueeze(-1), mixed(weights, self.memories), states)
            taken = taken + moving
            if tolerance is not None:
                moving = moving & ((next_states - states).abs().amax(-1) > tolerance)
            states = next_states
            # A traced graph, which cannot branch on values, does all updates, and those past the tolerance change nothing.
            if tolerance is not None and not is_traced() and not moving.any():
                break
        self._check_finite(states)
        weights = weights.to(states.dtype)
        energies = None
        if output_energies and self.config.similarity in ("kernel", "dot"):
            energies = energy(self._features(states), features, **settings)
        output = UHopMemoryOutput(retrieved=states, association=weights, energy=energies, steps=taken)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def search(
        self,
        queries: torch.Tensor,
        update_steps: int | None = None,
        *,
        top_k: int = 64,
        candidates: Candidates | Any | None = None,
    ) -> UHopMemorySearchOutput:
        """Retrieve (Stage II) from many memories, without forming the weights of those that have none; see `sparse_association`.

        Exact, except by candidates that overlook memories.

        At alpha = 1 every memory has weight, and room for all of them is taken, (Q, M).

        Args:
            queries: (Q, pattern_dim), or one (pattern_dim,).
            update_steps: Updates to do, at least 1; `None` for `config.update_steps`.
            top_k: Candidates to begin with; queries that spread over more memories are asked again.
            candidates: What finds the memories whose features are most like a query's: a function, or an index of faiss; see
                `faiss_index`. `None` for what `index` has chosen. Weights are made of the exact inner products of what is found, whatever
                scores it has.

        Raises:
            ValueError: As `forward`, if the similarity is not an inner product, and for candidates that are out of step with the memory.
        """
        steps = self.config.update_steps if update_steps is None else update_steps
        if steps < 1:
            raise ValueError(f"update_steps must be at least 1, got {steps}")
        if self.config.similarity not in ("kernel", "dot"):
            raise ValueError(f"search needs the similarity 'kernel' or 'dot', got {self.config.similarity!r}")
        states = torch.atleast_2d(self._checked(queries, "queries"))
        features = self._cached_features()
        own = candidates is None and self not in _INDEXES
        if candidates is None:
            candidates = brute_force(features) if own else self._indexed(features)
        # All inner products are exact. Scores of others need not be.
        settings: dict[str, Any] = {
            "beta": self.config.beta,
            "alpha": self.config.alpha,
            "top_k": top_k,
            "features": None if own else features,
        }
        for _ in range(steps):
            weights, indices = sparse_association(self._features(states), len(self), candidates, **settings)
            states = mixture(self.memories, weights, indices)
        self._check_finite(states)
        return UHopMemorySearchOutput(retrieved=states, indices=indices, weights=weights)

    def index(self, factory: str = "flat", parameters: str = "") -> None:
        """Choose what `search` finds memories by: all inner products ("flat"), or an index of the faiss library, which this memory keeps.

        The index holds the features of the memories. It is made, and trained where it has to be, by the first search after memories or
        Phi have changed. It belongs to this object alone: it is not saved, and a copy of the memory has none.

        >>> memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=8, alpha=1.5))
        >>> memory.store(torch.randn(1000, 8))
        >>> memory.index("HNSW32", "efSearch=64")
        >>> memory.search(memory.memories[:2]).indices[:, 0].tolist()
        [0, 1]

        Args:
            factory: "flat", or a string of faiss's `index_factory`, such as "HNSW32" or "IVF16,Flat"; always of inner products.
            parameters: Settings of the index by which searches trade time for accuracy, as in faiss's `ParameterSpace`: "nprobe=8".

        Raises:
            ValueError: If the similarity is not an inner product, or for a string that faiss refuses, with its message; from `search`
                too, where the memories are too few to train it.
            ImportError: If faiss is not installed.
        """
        if self.config.similarity not in ("kernel", "dot"):
            raise ValueError(f"an index needs the similarity 'kernel' or 'dot', got {self.config.similarity!r}")
        _INDEXES.pop(self, None)
        if factory != "flat":
            width = self.config.pattern_dim if self.feature_map is None else self.config.feature_dim or self.config.pattern_dim
            trained_index(factory, parameters, torch.zeros(0, width))
            _INDEXES[self] = Indexed(factory, parameters)

    def _indexed(self, features: torch.Tensor) -> Candidates:
        """The index that was asked for, with these features."""
        held = _INDEXES[self]
        # Tensors of inference mode have no version.
        version = -1 if features.is_inference() else features._version
        if held.candidates is None or held.features is not features or held.version != version or version < 0:
            index = trained_index(held.factory, held.parameters, features)
            mark_in_step(index, features)
            candidates = faiss_index(index)
            held = _INDEXES[self] = Indexed(held.factory, held.parameters, features, version, candidates)
        assert held.candidates is not None
        return held.candidates

    def _features(self, patterns: torch.Tensor, name: str = "queries") -> torch.Tensor:
        if self.feature_map is None:
            return patterns
        features = self.feature_map(patterns)
        if not is_traced() and not is_finite(features):
            raise ValueError(
                f"features of {name} must be finite in {features.dtype}, but Phi gives some that are not; "
                "use a wider dtype, or smaller patterns"
            )
        return features

    def _check_finite(self, retrieved: torch.Tensor) -> None:
        """A `ValueError` where memories lost their values in a narrower dtype than they were stored in."""
        if not is_traced() and not is_finite(retrieved):
            bad = int((~self.memories.isfinite()).sum())
            raise ValueError(
                f"memories must be finite in {self.memories.dtype}, got {bad} entries that are not; store them in a wider dtype"
            )

    @torch.no_grad()
    def report(self, queries: torch.Tensor | None = None) -> MemoryReport:
        """What this memory set can hold, in feature space ("kernel") or pattern space ("dot"); see `MemoryReport`.

        Args:
            queries: (Q, pattern_dim), to see how many memories each of them retrieves, after `config.update_steps`.

        Raises:
            ValueError: If nothing is stored, or the similarity is not an inner product; and as `forward`.
        """
        if self.config.similarity not in ("kernel", "dot"):
            raise ValueError(f"a report needs the similarity 'kernel' or 'dot', got {self.config.similarity!r}")
        features = self._cached_features()
        output = self(self.memories, update_steps=1, return_dict=True)
        kernel = inner_products(features, features)
        # In fp64 where scores overflow fp32.
        weights, patterns, features = (tensor.to(kernel.dtype) for tensor in (output.association, self.memories, features))
        margin, rival = margins(kernel)
        # Retrieval rounds its scores: a certificate holds only where the margin exceeds what rounding may take from it.
        rounding = 2.0 * torch.finfo(self.memories.dtype).eps
        certain = kernel - rounding * kernel.abs().max() * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        count, feature_dim = features.shape
        separation = margins(self._unit_kernel())[0].min().item() if count > 1 else float("nan")
        others = weights.masked_fill(torch.eye(count, dtype=torch.bool, device=weights.device), 0.0)
        confused = sorted(((weights[m, n].item(), m, n) for m, n in (others > 0.01).nonzero().tolist()), reverse=True)
        unit_features = self.config.similarity == "kernel" and self.config.normalize_features
        sizes = None if queries is None else metastable_sizes(self(queries, return_dict=True).association, self.config.alpha)
        return MemoryReport(
            beta=self.config.beta,
            alpha=self.config.alpha,
            margin=margin,
            rival=rival,
            error_bound=retrieval_error_bound(patterns, features, self.config.beta),
            own_error_bound=retrieval_error_bound(patterns, features, self.config.beta, radius=0.0),
            error=norms(output.retrieved.to(kernel.dtype) - patterns),
            weight=weights.diagonal(),
            exact=is_exactly_retrieved(certain, self.config.beta, self.config.alpha),
            metastable_size=metastable_sizes(weights, self.config.alpha),
            query_metastable_size=sizes,
            separation=separation,
            separation_bounds=separation_bounds(count, feature_dim) if count > 1 and feature_dim > 1 else (float("nan"), float("nan")),
            well_separated=unit_features and is_well_separated(features, self.config.beta),
            confusions=[(m, n, weight) for weight, m, n in confused],
            duplicates=_duplicates(self.memories),
            rounding=2.0 * rounding * norms(patterns).max().item(),
        )

    def _sizes(self) -> dict[str, int]:
        return {"num_memories": len(self.memories)} if "memories" in self._buffers else {}

    def _unit_kernel(self) -> torch.Tensor:
        features = unit_norm(at_least_fp32(self._cached_features()))
        return features @ features.transpose(-1, -2)

    def _checked(self, patterns: torch.Tensor, name: str) -> torch.Tensor:
        """Patterns on the device and in the dtype of the memory, of the right width and finite (which a traced graph cannot ask)."""
        check_tensors(**{name: patterns})
        width = self.config.pattern_dim
        if patterns.dim() not in (1, 2) or patterns.shape[-1] != width:
            raise ValueError(f"{name} must have shape (N, {width}) or ({width},), got {tuple(patterns.shape)}")
        patterns = patterns.to(device=self.memories.device, dtype=self.memories.dtype)
        if not is_traced() and not is_finite(patterns):
            bad = int((~patterns.isfinite()).sum())
            raise ValueError(f"{name} must be finite in {self.memories.dtype}, got {bad} entries that are not")
        return patterns


def _duplicates(memories: torch.Tensor) -> list[tuple[int, int]]:
    """Pairs (first, later) of equal memories."""
    if len(memories) < 2:
        return []
    _, group = torch.unique(memories, dim=0, return_inverse=True)
    first: dict[int, int] = {}
    pairs = [(first.setdefault(key, index), index) for index, key in enumerate(group.tolist())]
    return [pair for pair in pairs if pair[0] != pair[1]]


__all__ = ["UHopMemoryModel", "UHopMemoryOutput", "UHopMemoryPreTrainedModel", "UHopMemorySearchOutput"]
