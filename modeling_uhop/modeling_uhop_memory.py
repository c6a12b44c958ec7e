"""U-Hop associative memory: a PyTorch model that stores, separates and retrieves patterns."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .capacity import MemoryReport, cosine_margin, duplicates, memory_report
from .checks import check_tensors
from .configuration_uhop_memory import UHopMemoryConfig
from .corruption import mask_patterns
from .energy import association_of, energy, mixed
from .feature_cache import cached_features, index_candidates, select_index
from .feature_map import FeatureMap
from .memories import MemorySet, SharedMemorySet
from .modeling_hopfield import HopfieldPreTrainedModel
from .precision import is_finite, is_traced
from .search import Candidates, brute_force, mixture, sparse_association
from .separation import Separation, chosen, maximize_separation
from .spherical import are_independent, separate_optimally


# Because the optimal spherical code of more than 2 * feature_dim memories must be searched, "uhop+"
# computes it for at most 1000 memories. A separation step samples at most 4096 memories.
_SEARCHED_CODES, _MEMORIES_IN_A_STEP = 1000, 4096


@dataclass
class UHopMemoryOutput(ModelOutput):
    """What a memory retrieved for Q queries.

    Attributes:
        retrieved: (Q, pattern_dim), the states after the last update.
        association: (Q, M), the association weights of the last update.
        energy: (Q,), the energy (2.2) of the retrieved states; `None` for similarities that have no
            energy.
        steps: (Q,), the number of updates of each query.
    """

    retrieved: torch.Tensor | None = None
    association: torch.Tensor | None = None
    energy: torch.Tensor | None = None
    steps: torch.Tensor | None = None


@dataclass
class UHopMemorySearchOutput(ModelOutput):
    """What `UHopMemoryModel.search` retrieved for Q queries, with the nonzero weights.

    Attributes:
        retrieved: (Q, pattern_dim), the states after the last update.
        indices: (Q, K), the memories with nonzero weight in the last update, largest weight first.
        weights: (Q, K), the weights of these memories. A query with fewer than K such memories has
            weight 0 in the remaining places.
    """

    retrieved: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class UHopMemoryPreTrainedModel(HopfieldPreTrainedModel):
    """Base class of the U-Hop memory."""

    config: UHopMemoryConfig
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
        if isinstance(module, UHopMemoryModel):
            init.zeros_(module.memories)


class UHopMemoryModel(UHopMemoryPreTrainedModel):
    r"""Associative memory that stores, separates (Stage I) and retrieves (Stage II) patterns.

    This is Algorithm 1 of U-Hop (arXiv 2404.03827). A query $x$ retrieves from the memories $\xi_1,
    \dots, \xi_M$ by equation 2.4, with the feature map $\Phi(u) = W u$ and the simplex map
    $\mathrm{Sep}_\alpha$ (scores to weights):

    $$
    T(x) = \sum_\mu p_\mu \xi_\mu, \qquad p = \mathrm{Sep}_\alpha(\beta K(\Xi, x)), \qquad
    K(u, v) = \langle \Phi(u), \Phi(v) \rangle
    $$

    The stored patterns are saved with the model.

    Args:
        config: The configuration. The model keeps a copy of it.

    Examples:
        >>> import torch
        >>> from modeling_uhop import UHopMemoryConfig, UHopMemoryModel

        >>> patterns = torch.rand(20, 64)
        >>> memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=64))
        >>> memory.store(patterns)
        >>> history = memory.separate(steps=50)
        >>> memory(patterns).retrieved.shape
        torch.Size([20, 64])
    """

    _auto_class = "AutoModel"

    def __init__(self, config: UHopMemoryConfig):
        # Because `store` updates num_memories and several memories may be built from one
        # configuration, each memory keeps its own copy.
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
        """Dtype of the memories, because a model without a feature map has no parameter."""
        return self.memories.dtype

    @property
    def device(self) -> torch.device:
        """Device of the memories, because a model without a feature map has no parameter."""
        return self.memories.device

    def stored_features(self) -> torch.Tensor:
        """Features (M, feature_dim) of the memories; the memories if there is no feature map.

        The features are cached for the next retrieval. They are computed again if the memories or
        the feature map have changed. PyTorch does not count changes of memories through `.data`, a
        NumPy view or a collective operation, so these are not noticed. The cache is not used while
        a gradient has to pass through the features, a graph is traced, or autocast or inference
        mode is on; nor if the feature map is offloaded, has hooks or is wrapped in an adapter.
        """
        return self.memories if self.feature_map is None else self._cached_features().clone()

    def _cached_features(self) -> torch.Tensor:
        """Return `stored_features` without a copy; callers must not write to the result."""
        self.check_configuration()
        if self.feature_map is None:
            return self.memories
        return cached_features(self, self.feature_map, self.memories, lambda memories: self._features(memories, "memories"))

    def __len__(self) -> int:
        return len(self.memories)

    def store(self, patterns: torch.Tensor) -> None:
        """Replace all memories by new patterns.

        Integer patterns are converted to the dtype of the memory. Equal patterns are stored too,
        with a warning that lists them.

        Args:
            patterns: (M, pattern_dim), finite.

        Raises:
            ValueError: If the shape is wrong or an entry is not finite.
            TypeError: If `patterns` is not a tensor.
        """
        patterns = self._validated(patterns, "patterns")
        if patterns.dim() != 2:
            raise ValueError(f"patterns must have shape (M, {self.config.pattern_dim}), got {tuple(patterns.shape)}")
        self.memories = patterns.detach().clone()
        self.config.num_memories = len(patterns)
        equal = duplicates(self.memories)
        if equal:
            warnings.warn(f"{len(equal)} memories equal an earlier one; pairs (first, later): {equal[:10]}", stacklevel=2)

    def append(self, patterns: torch.Tensor) -> None:
        """Store further patterns after those that are already stored.

        Args:
            patterns: (M, pattern_dim), or a single pattern (pattern_dim,); finite.

        Raises:
            ValueError: If the shape is wrong or an entry is not finite.
            TypeError: If `patterns` is not a tensor.
        """
        self.store(torch.cat([self.memories, torch.atleast_2d(self._validated(patterns, "patterns"))]))

    def delete(self, indices: int | list[int] | torch.Tensor) -> None:
        """Delete the memories at the given indices.

        Args:
            indices: One index or several, as integers; a negative index counts from the end.

        Raises:
            IndexError: If an index does not exist.
            TypeError: If an index is not an integer.
        """
        count = len(self)
        given = torch.as_tensor(indices)
        if given.numel() == 0:
            return
        if given.is_floating_point() or given.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {given.dtype}")
        positions = given.reshape(-1).tolist()
        for position in positions:
            if not -count <= position < count:
                raise IndexError(f"memory index {position} is out of range: {count} memories are stored")
        kept = torch.ones(count, dtype=torch.bool, device=self.memories.device)
        kept[positions] = False
        self.store(self.memories[kept])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Resize the memories to the number that the checkpoint holds, then load it."""
        given = state_dict.get(f"{prefix}memories")
        if given is not None and given.dim() == 2 and given.shape[1] == self.memories.shape[1]:
            if len(given) != len(self):
                self.memories = self.memories.new_zeros(given.shape)
            self.config.num_memories = len(given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def default_separation(self) -> Separation:
        """How `separate` separates by default: denoising of masked patterns, at this memory's beta."""
        return Separation.denoising(temperature=1.0 / self.config.beta, corruption=mask_patterns)

    def separate(self, separation: Separation | None = None, **fields) -> list[float]:
        r"""Separate the stored patterns in feature space (Stage I): train the feature map and
        nothing else.

        By default the map learns to recognise each memory from a copy of which half is masked, by
        the cross entropy of the association weights at the inverse temperature of this memory:

        $$
        -\log \mathrm{softmax}_\nu(\beta \langle \Phi(\tilde\xi_\mu), \Phi(\xi_\nu) \rangle)_\mu
        $$

        This is `default_separation`, and not in the papers. What it learns from one kind of
        corruption helps against others. Plain separation of clean patterns, `Separation.uhop()`,
        can amplify their corruption.

        `Separation.uhop_plus()` computes the optimal spherical code directly, whatever `steps` and
        `lr` are (if they are not 0), if the memories are linearly independent. It takes gradient steps otherwise, with
        other fields, and for more than 1000 memories that are also more than twice `feature_dim`.

        Args:
            separation: How to separate; `None` for the default above. Without `batch_size`, each
                step uses a new random sample of at most 4096 memories.
            fields: Fields of `Separation` to change, such as `steps`, `lr` or `corruption`.

        Returns:
            The loss before each step, and after the last. For the optimal code two numbers: minus
            the smallest margin before and after.

        Raises:
            ValueError: If there is no feature map, or fewer than two memories; also as
                `maximize_separation`.
        """
        self.check_configuration()
        if self.feature_map is None:
            raise ValueError(f"similarity {self.config.similarity!r} has no feature map to separate with; 'kernel' has")
        if len(self) < 2:
            raise ValueError(f"separation needs at least two memories, got {len(self)}")
        separation = chosen(separation, self.default_separation, **fields)
        is_default_code = separation == Separation.uhop_plus(steps=separation.steps, lr=separation.lr)
        can_be_found = len(self) <= max(_SEARCHED_CODES, 2 * len(self.feature_map.weight))
        if is_default_code and separation.steps > 0 and separation.lr > 0 and can_be_found and are_independent(self.memories):
            before = cosine_margin(self._cached_features())
            separate_optimally(self.feature_map, self.memories)
            return [-before, -cosine_margin(self._cached_features())]
        batch_size = _MEMORIES_IN_A_STEP if separation.batch_size is None else separation.batch_size
        return maximize_separation(self.feature_map, self.memories, separation, batch_size=batch_size)

    def memory_sets(self, *inputs, include_class_token: bool = False, **batch) -> Iterator[MemorySet]:
        """Return the one set of stored patterns (1, M, d), with the feature map."""
        return iter([SharedMemorySet(self.feature_map, self.memories.unsqueeze(0))])

    def forward(
        self,
        queries: torch.Tensor,
        update_steps: int | None = None,
        tolerance: float | None = None,
        output_energies: bool = True,
        return_dict: bool | None = None,
    ) -> UHopMemoryOutput | tuple:
        r"""Retrieve the memories that are most similar to each query (Stage II).

        One update is $x \leftarrow T(x) = \sum_\mu p_\mu \xi_\mu$ with $p =
        \mathrm{Sep}_\alpha(\beta K(\Xi, x))$, equation 2.4.

        Args:
            queries: (Q, pattern_dim), or a single query (pattern_dim,); finite.
            update_steps: Number of updates, at least 1; `None` means `config.update_steps`.
            tolerance: Stop updating a query once no entry changes by more than this; `None` means
                do all updates.
            output_energies: Whether to compute the energies of the retrieved states. They cost
                about as much as one update.
            return_dict: `False` to return a tuple; `None` means `config.return_dict`.

        Returns:
            The retrieved states, association weights, energies and number of updates.

        Raises:
            ValueError: If nothing is stored, if queries have a wrong shape or entries that are not
                finite, or if features, scores or energies exceed the range of their dtype (for
                scores and energies: of fp64).
            TypeError: If `queries` is not a tensor.
        """
        self.check_configuration()
        states, steps = self._start(queries, update_steps)
        settings: dict[str, Any] = {"beta": self.config.beta, "alpha": self.config.alpha}
        similarity: dict[str, Any] = {"similarity": self.config.similarity, "degree": self.config.degree}
        features = self._cached_features()
        active = torch.ones(states.shape[0], dtype=torch.bool, device=states.device)
        steps_taken = torch.zeros(states.shape[0], dtype=torch.long, device=states.device)
        weights = association_of(self._features(states), features, **settings, **similarity)
        for step in range(steps):
            if step > 0:
                updated = association_of(self._features(states), features, **settings, **similarity)
                weights = torch.where(active.unsqueeze(-1), updated, weights)
            next_states = torch.where(active.unsqueeze(-1), mixed(weights, self.memories), states)
            steps_taken = steps_taken + active
            if tolerance is not None:
                active = active & ((next_states - states).abs().amax(-1) > tolerance)
            states = next_states
            # Because a traced graph cannot branch on values, it does all updates; updates after the
            # tolerance is reached change nothing.
            if tolerance is not None and not is_traced() and not active.any():
                break
        self._check_finite(states)
        weights = weights.to(states.dtype)
        energies = None
        if output_energies and self.config.similarity in ("kernel", "dot"):
            energies = energy(self._features(states), features, **settings)
        output = UHopMemoryOutput(retrieved=states, association=weights, energy=energies, steps=steps_taken)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def search(
        self, queries: torch.Tensor, update_steps: int | None = None, *, top_k: int = 64, candidates: Candidates | Any | None = None
    ) -> UHopMemorySearchOutput:
        """Retrieve (Stage II) from many memories without computing the weights that are zero.

        The result is exact, unless `candidates` misses memories; see `sparse_association`. At alpha
        = 1 every memory has nonzero weight, so the full (Q, M) weights are allocated.

        Args:
            queries: (Q, pattern_dim), or a single query (pattern_dim,); finite.
            update_steps: Number of updates, at least 1; `None` means `config.update_steps`.
            top_k: Number of candidates to start with. Queries with weight on more memories are
                searched again with more candidates.
            candidates: What finds the memories whose features are most similar to a query's
                features: a function, or a faiss index; see `faiss_index`. `None` means what `index`
                has selected. Weights are computed from exact inner products with the memories
                found, whatever scores `candidates` returns.

        Returns:
            The retrieved states, with indices and weights of the memories that have nonzero weight.

        Raises:
            ValueError: As `forward`; also if the similarity is not an inner product, or if the
                candidates do not match the current memories.
        """
        self._check_inner_product("search")
        states, steps = self._start(queries, update_steps)
        features = self._cached_features()
        given = index_candidates(self, features) if candidates is None else candidates
        candidates = brute_force(features) if given is None else given
        # Because candidates other than our own inner products may return approximate scores, the
        # exact scores are computed from the features.
        settings: dict[str, Any] = {
            "beta": self.config.beta,
            "alpha": self.config.alpha,
            "top_k": top_k,
            "features": None if given is None else features,
        }
        for _ in range(steps):
            weights, indices = sparse_association(self._features(states), len(self), candidates, **settings)
            states = mixture(self.memories, weights, indices)
        self._check_finite(states)
        return UHopMemorySearchOutput(retrieved=states, indices=indices, weights=weights)

    def index(self, factory: str = "flat", parameters: str = "") -> None:
        r"""Select how `search` finds memories: by all inner products, or with a faiss index.

        The index holds the features of the memories. The first search after a change of the
        memories or of $\Phi$ builds it, and trains it where its type needs training. The index
        belongs to this object: it is not saved, and a copy of the memory has none.

        Args:
            factory: "flat" for all inner products, or a string for faiss's `index_factory` such as
                "HNSW32" or "IVF16,Flat". The metric is always the inner product.
            parameters: Search settings that trade time for accuracy, in the format of faiss's
                `ParameterSpace`, for example "nprobe=8".

        Raises:
            ValueError: If the similarity is not an inner product, or if faiss rejects a string
                (with the message of faiss). `search` also raises it if there are too few memories
                to train the index.
            ImportError: If faiss is not installed.

        Examples:
            >>> memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=8, alpha=1.5))
            >>> memory.store(torch.randn(1000, 8))
            >>> memory.index("HNSW32", "efSearch=64")
            >>> memory.search(memory.memories[:2]).indices[:, 0].tolist()
            [0, 1]
        """
        self._check_inner_product("an index")
        width = self.config.pattern_dim if self.feature_map is None else self.config.feature_dim or self.config.pattern_dim
        select_index(self, factory, parameters, width)

    def _features(self, patterns: torch.Tensor, name: str = "queries") -> torch.Tensor:
        if self.feature_map is None:
            return patterns
        features = self.feature_map(patterns)
        if not is_traced() and not is_finite(features):
            raise ValueError(
                f"features of {name} must be finite in {features.dtype}, but the feature map returned infinite or NaN values; "
                "use a wider dtype or smaller patterns"
            )
        return features

    def _check_finite(self, retrieved: torch.Tensor) -> None:
        """Raise a `ValueError` if a narrower dtype made memories infinite or NaN."""
        if not is_traced() and not is_finite(retrieved):
            bad = int((~self.memories.isfinite()).sum())
            raise ValueError(
                f"memories must be finite in {self.memories.dtype}, got {bad} entries that are not; store them in a wider dtype"
            )

    @torch.no_grad()
    def report(self, queries: torch.Tensor | None = None) -> MemoryReport:
        """Describe how well this set of memories can be stored and retrieved; see `MemoryReport`.

        The report is computed in feature space ("kernel") or in pattern space ("dot").

        Args:
            queries: (Q, pattern_dim), optional: also report how many memories each query retrieves
                after `config.update_steps` updates.

        Returns:
            Margins, error bounds, measured errors, confusions and duplicates.

        Raises:
            ValueError: If nothing is stored, or if the similarity is not an inner product; also as
                `forward`.
        """
        self._check_inner_product("a report")
        features = self._cached_features()
        output = self(self.memories, update_steps=1, return_dict=True)
        return memory_report(
            self.memories,
            features,
            output.association,
            output.retrieved,
            beta=self.config.beta,
            alpha=self.config.alpha,
            features_are_unit=self.config.similarity == "kernel" and self.config.normalize_features,
            query_weights=None if queries is None else self(queries, return_dict=True).association,
        )

    def _sizes(self) -> dict[str, int]:
        return {"num_memories": len(self.memories)} if "memories" in self._buffers else {}

    def _start(self, queries: torch.Tensor, update_steps: int | None) -> tuple[torch.Tensor, int]:
        """Return the first states (Q, pattern_dim) of a retrieval, and its number of updates."""
        steps = self.config.update_steps if update_steps is None else update_steps
        if steps < 1:
            raise ValueError(f"update_steps must be at least 1, got {steps}")
        return torch.atleast_2d(self._validated(queries, "queries")), steps

    def _check_inner_product(self, what: str) -> None:
        if self.config.similarity not in ("kernel", "dot"):
            raise ValueError(f"{what} needs the similarity 'kernel' or 'dot', got {self.config.similarity!r}")

    def _validated(self, patterns: torch.Tensor, name: str) -> torch.Tensor:
        """Move patterns to the memory's device and dtype; check width and finite values.

        A traced graph skips the check for finite values, because it cannot branch on values.
        """
        check_tensors(**{name: patterns})
        width = self.config.pattern_dim
        if patterns.dim() not in (1, 2) or patterns.shape[-1] != width:
            raise ValueError(f"{name} must have shape (N, {width}) or ({width},), got {tuple(patterns.shape)}")
        patterns = patterns.to(device=self.memories.device, dtype=self.memories.dtype)
        if not is_traced() and not is_finite(patterns):
            bad = int((~patterns.isfinite()).sum())
            raise ValueError(f"{name} must be finite in {self.memories.dtype}, got {bad} entries that are not")
        return patterns


__all__ = ["UHopMemoryModel", "UHopMemoryOutput", "UHopMemoryPreTrainedModel", "UHopMemorySearchOutput"]
