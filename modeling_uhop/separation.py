"""The separation step (Stage I): `Separation` says how to separate, `StageOne` does it."""

import copy
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from transformers.utils import logging

from .checks import check_tensor, check_tensors
from .corruption import Corruption
from .distributed import (
    are_finite,
    averaged_like,
    check_sharding,
    gather_rows,
    mean_over_processes,
    process_count,
    reshard,
    whole,
    whole_parameters,
)
from .feature_map import FeatureMap, unit_norm
from .memories import MemorySet, SharedMemorySet, has_memories, memory_sets_of
from .precision import is_readable
from .separation_loss import SEPARATION_KINDS, denoising_loss, separation_loss, subsample
from .separation_optimizer import OPTIMIZERS, SeparationOptimizer, is_half
from .view_losses import koleo_loss, sigreg_loss, supervised_loss, vicreg_loss
from .zero import has_master, master, write


# The kinds that compare each memory with a copy, and those that can use one.
WITH_COPIES = ("denoising", "vicreg", "sigreg")
WITH_VIEWS = (*WITH_COPIES, "koleo", "supervised")
KINDS = (*SEPARATION_KINDS, *WITH_VIEWS)
PARAMETERS = ("feature_maps", "upstream")
MEMORIES = ("tokens", "example")
LAYERS = ("all", "last")
POOLINGS = (False, True, "global")


@dataclasses.dataclass(frozen=True)
class Separation:
    r"""How to separate memories: the loss, the steps, and what they change.

    One value serves the Trainer (`SeparationCallback`), a loop of one's own (`StageOne`), one
    feature map (`maximize_separation`) and an associative memory (`UHopMemoryModel.separate`). The
    presets `uhop`, `uhop_plus`, `algorithm_2`, `denoising` and `two_views` are the papers' methods and ours;
    each takes further fields.

    The defaults are those of the Trainer: SGD steps on every parameter that the features depend on;
    see `SeparationCallback`.

    Args:
        kind: The loss: one of the kinds of `separation_loss`, or of those that compare each memory
            with a copy: "denoising" (`denoising_loss`), which tells each memory from the others of
            its set, given its copy; "vicreg" (`vicreg_loss`); "sigreg" (`sigreg_loss`). Two more
            need no copy: "koleo" (`koleo_loss`), and "supervised" (`supervised_loss`), where the
            memories of one class are copies of each other.
        temperature: Temperature $\tau$ of the loss, positive.
        final_temperature: Temperature of the last step, positive and at most `temperature`; the
            temperature falls geometrically to it (U-Hop+). `None` keeps the temperature fixed.
        steps: Gradient steps, at least 0 (the papers' N, or N_i of Algorithm 2).
        lr: Learning rate, at least 0.
        optimizer: "sgd" or "adam".
        parameters: What is changed. "feature_maps": only the feature maps, with the memories held
            fixed; it keeps the layers below unchanged, for example in a pretrained model.
            "upstream": every trainable parameter that the features depend on (embeddings, lower
            layers, feature maps), as in the authors' code. A model without feature maps needs
            "upstream".
        project: Whether to scale the rows of W to unit norm after every step (the projection of
            U-Hop+), in the feature maps that the step changed.
        normalize_rows: Whether to scale the rows of W to unit norm after the last step (U-Hop,
            Algorithm 1).
        noise: For a kind with copies, the standard deviation of the noise in a copy, positive.
        corruption: For a kind with copies, a function from clean values to corrupted ones, such as
            `mask_patterns`; `None` adds noise. It acts on patterns, or on the main input of a model
            (pixels, instances, past values).
        views: A function from a batch to an augmented one, such as `ImageViews()`; it is called
            twice, and the two views are each other's copies. `None` for one view: the copy is then
            a corrupted one. A batch is a dictionary of the model's inputs, or patterns.
        memories: What a memory is. "tokens": each that a layer retrieves from. "example": an example
            as a whole, the mean of the features of its tokens. The examples of a batch are then one
            set, or those of all processes with `pool_memories="global"`. Layers with learned
            memories take no part.
        layers: Whether "all" layers are separated or the "last" one.
        batch_size: Number of examples of a step of `SeparationCallback`, over all processes
            together, or of memories of a step of `maximize_separation`. `None` means 128 examples,
            and all memories. `StageOne` takes batches as they are given.
        include_class_token: Whether the CLS token of an image is a memory.
        pool_memories: Which memories form one set. `False`: those of one example (image, bag,
            series). `True`: those of the batch of a process. "global": those of the batches of all
            processes together, so that the loss does not depend on the number of processes. With
            one process it is `True`.

    Raises:
        ValueError: If a value is not one of its choices or out of range.

    Examples:
        >>> from modeling_uhop import Separation
        >>> Separation.uhop_plus(steps=50).final_temperature
        0.01
    """

    kind: str = "average"
    temperature: float = 0.25
    final_temperature: float | None = None
    steps: int = 100
    lr: float = 0.1
    optimizer: str = "sgd"
    parameters: str = "upstream"
    project: bool = False
    normalize_rows: bool = False
    noise: float = 0.5
    corruption: Corruption | None = None
    views: Callable[[Any], Any] | None = None
    memories: str = "tokens"
    layers: str = "all"
    batch_size: int | None = None
    include_class_token: bool = False
    pool_memories: bool | str = False

    def __post_init__(self):
        choices: dict[str, tuple] = {"kind": KINDS, "parameters": PARAMETERS, "optimizer": tuple(OPTIMIZERS), "pool_memories": POOLINGS}
        choices |= {"memories": MEMORIES, "layers": LAYERS}
        choices |= dict.fromkeys(("project", "normalize_rows", "include_class_token"), (False, True))
        for name, accepted in choices.items():
            value = getattr(self, name)
            # Because 1 == True, the type is compared too.
            if not any(value == choice and type(value) is type(choice) for choice in accepted):
                raise ValueError(f"{name} must be one of {accepted}, got {value!r}")
        rules: dict[str, tuple[type, Callable[[Any], bool], str]] = {
            "steps": (Integral, lambda value: value >= 0, "an integer of at least 0"),
            "batch_size": (Integral, lambda value: value >= 1, "an integer of at least 1, or None"),
            "lr": (Real, lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
            "temperature": (Real, lambda value: 0 < value < math.inf, "a positive, finite number"),
            "final_temperature": (Real, lambda value: 0 < value <= self.temperature, f"positive and at most {self.temperature}, or None"),
            "noise": (Real, lambda value: 0 < value < math.inf, "a positive, finite number"),
        }
        for name, (kind, holds, rule) in rules.items():
            value = getattr(self, name)
            if value is None and rule.endswith("or None"):
                continue
            if not isinstance(value, kind) or isinstance(value, bool) or not holds(value):
                raise ValueError(f"{name} must be {rule}, got {value!r}")
        if self.corruption is not None and not callable(self.corruption):
            raise ValueError(f"corruption must be a function of clean values, or None, got {self.corruption!r}")
        if self.views is not None and not callable(self.views):
            raise ValueError(f"views must be a function of a batch, or None, got {self.views!r}")
        if self.views is not None and self.kind not in WITH_VIEWS:
            raise ValueError(f"views need one of the kinds {WITH_VIEWS}, got kind={self.kind!r}")
        if self.views is not None and self.corruption is not None:
            raise ValueError("views and corruption both make the copies; give one of them")
        if self.kind == "supervised" and self.memories != "example":
            raise ValueError("kind='supervised' needs memories='example', because a label belongs to an example")

    @classmethod
    def uhop(cls, **fields) -> "Separation":
        """U-Hop, Algorithm 1: the average loss (2.6) on the feature maps, then rows of unit norm."""
        return cls(**{"normalize_rows": True, **_ON_MAPS, **fields})

    @classmethod
    def uhop_plus(cls, **fields) -> "Separation":
        r"""U-Hop+: projected gradient descent, $W \leftarrow \mathrm{Proj}(W - \eta \nabla L)$.

        The loss is "per_memory", and the temperature falls from 0.25 to 0.01.
        """
        return cls(**{"kind": "per_memory", "project": True, "final_temperature": 0.01, **_ON_MAPS, **fields})

    @classmethod
    def algorithm_2(cls, **fields) -> "Separation":
        """U-Hop, Algorithm 2: one SGD step on the squared loss (3.2) between two training steps.

        In the Trainer it needs `SeparationCallback(schedule="step")`.
        """
        return cls(**{"kind": "squared", "steps": 1, "parameters": "feature_maps", **fields})

    @classmethod
    def denoising(cls, **fields) -> "Separation":
        """Recognise each memory from a corrupted copy, at temperature 0.1; not in the papers."""
        return cls(**{"kind": "denoising", "temperature": 0.1, **_ON_MAPS, **fields})

    @classmethod
    def two_views(cls, views: Callable[[Any], Any] | None = None, **fields) -> "Separation":
        """Recognise each example of a batch from another view of it, by the last layer's features; not in the papers.

        The loss is "denoising" in both directions at temperature 0.2, and Adam moves every parameter
        below the features. It is contrastive learning (SimCLR, arXiv 2002.05709), of which the loss
        of U-Hop is the half that spreads (Wang and Isola, arXiv 2005.10242).

        Args:
            views: As the field; with `None`, an example is recognised from a corrupted copy.
            fields: Other fields.
        """
        whole = {"memories": "example", "layers": "last", "temperature": 0.2, "optimizer": "adam", "lr": 1e-3}
        return cls(**{"kind": "denoising", "views": views, **whole, **fields})

    def replace(self, **fields) -> "Separation":
        """Return this separation with other values of some fields.

        Raises:
            TypeError: If a name is not a field.
        """
        names = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(fields) - set(names)):
            raise TypeError(f"{unknown} must be among the fields of Separation, {names}; it has the presets {list(PRESETS)}")
        return dataclasses.replace(self, **fields)

    def temperature_of(self, step: int, steps: int) -> float:
        """Return the temperature of a step of `steps`, by geometric interpolation.

        From the last step on, it is the final temperature.
        """
        if self.final_temperature is None:
            return self.temperature
        return self.temperature * (self.final_temperature / self.temperature) ** (min(step, steps - 1) / max(steps - 1, 1))


_ON_MAPS: dict[str, Any] = {"parameters": "feature_maps", "optimizer": "adam", "lr": 1e-3}
_PRESETS = (Separation.uhop, Separation.uhop_plus, Separation.algorithm_2, Separation.denoising, Separation.two_views)
PRESETS: dict[str, Callable[..., Separation]] = {preset.__name__: preset for preset in _PRESETS}


def chosen(separation: Any, default: Separation, **fields) -> Separation:
    """Return a given separation, or a default for `None`, with other values of some fields.

    Raises:
        TypeError: If it is not a `Separation`, or a name in `fields` is not a field.
    """
    separation = default if separation is None else separation
    # Because code loaded from a model folder has its own class, we compare class names.
    if type(separation).__name__ != "Separation":
        raise TypeError(f"separation must be a Separation, such as Separation.uhop(), got {separation!r}")
    changed: Separation = separation.replace(**fields)
    return changed


class StageOne:
    r"""The separation step of a model, or of one feature map, step by step.

    Each step lowers the summed loss of all layers, by the model's gradient or that of its feature
    maps. It leaves no `.grad` behind, has an optimizer of its own, and changes only the parameters
    that `separation.parameters` selects. In several processes, gradients are averaged.

    The model may be sharded by FSDP2 (`fully_shard`), before it comes here. Then every process must
    call each method. During a step, each process holds the whole parameters of the model and their
    gradients; the state of the optimizer stays sharded. The parameters are gathered as they are
    stored, so a `MixedPrecisionPolicy` has no effect; `autocast` has.

    An engine of DeepSpeed may manage the model with ZeRO-1, ZeRO-2 or ZeRO-3. The model is then
    `engine.module`, after `deepspeed.initialize`, between `engine.step()` and the next
    `engine(...)`. Every process must call each method. Each process also keeps a whole fp32 copy of
    the selected parameters, and the whole state of the optimizer.

    Args:
        model: A model with `memory_sets` (possibly wrapped by PEFT), a model of transformers with an
            adapter of `UHopAdapterConfig`, or a `FeatureMap`. A model in training mode is separated
            with its dropout; `SeparationCallback` switches it off.
        separation: How to separate; `None` for `Separation()`.
        total_steps: Number of steps over which the temperature falls; `None` for
            `separation.steps`.
        autocast: A function that returns a context for the forward pass, such as
            `accelerator.autocast`.
        fields: Fields of `Separation` to change.

    Raises:
        ValueError: If a model has no memories to separate; if no selected parameter is trainable; if
            `project` or `normalize_rows` is set while an adapter is trained instead of W.
        TypeError: If a name in `fields` is not a field of `Separation`.
        NotImplementedError: If FSDP1 or tensor parallelism shards the parameters, or ZeRO-3 without
            an engine.

    Examples:
        >>> from modeling_uhop import Separation, StageOne, UHopViTConfig, UHopViTForImageClassification
        >>> config = UHopViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> stage = StageOne(UHopViTForImageClassification(config), Separation.uhop(), lr=1e-2)
        >>> losses = stage.run([{"pixel_values": torch.rand(4, 3, 8, 8)}])
        >>> len(losses), losses[-1] < losses[0]
        (101, True)
    """

    def __init__(
        self,
        model: Any,
        separation: Separation | None = None,
        *,
        total_steps: int | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        **fields,
    ):
        self.model = model
        self.separation = chosen(separation, Separation(), **fields)
        if hasattr(model, "default_separation"):
            raise ValueError(f"a {type(model).__name__} separates its own patterns: call separate(separation) of the model")
        self.autocast = autocast
        check_sharding(model)
        reshard(model)
        self.total_steps = max(1, self.separation.steps) if total_steps is None else total_steps
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        scales_rows = self.separation.project or self.separation.normalize_rows
        self.maps = _feature_maps(model, needed=self.separation.parameters == "feature_maps" or scales_rows)
        has_rows = all("weight" in dict(phi.named_parameters(recurse=False)) for phi in self.maps)
        if scales_rows and not has_rows:
            raise ValueError(
                "project and normalize_rows scale the rows of W, but an adapter or a map of low rank is trained instead of W; "
                "turn them off, or train W itself (modules_to_save=['feature_map'], or UHopAdapterConfig without a rank)"
            )
        moved = model.parameters() if self.separation.parameters == "upstream" else (p for phi in self.maps for p in phi.parameters())
        self.parameters = [parameter for parameter in moved if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("there is nothing to train: all selected parameters are frozen (requires_grad=False)")
        self.optimizer = SeparationOptimizer(self.separation.optimizer, self.parameters, self.separation.lr)
        self.steps_done = 0
        self._moved_maps: list[Any] = []

    def run(self, batches: Iterable[Any], progress: bool = True) -> list[float]:
        """Take `separation.steps` steps, one for each batch, and normalise rows at the end.

        Args:
            batches: Batches as in `step`: a list, a `DataLoader` or another iterable. They are read
                again from the start where they end before the last step.
            progress: Whether to show a progress bar.

        Returns:
            The `steps + 1` losses, averaged over layers and processes: before each step, and after
                the last one on a further batch (on the last batch again, if there is none).

        Raises:
            ValueError: If the batches end before the last step; also as `step`.
        """
        source, batch = _repeated(batches), None
        history: list[float] = []
        for _ in logging.tqdm(range(self.separation.steps), desc="separation", leave=False, delay=3, disable=not progress):
            batch = next(source, None)
            if batch is None:
                raise ValueError(f"batches ended after {len(history)} of {self.separation.steps} steps: pass what can be read again")
            history.append(mean_over_processes(self.step(*self.views(batch))))
        self.finish_round()
        with torch.no_grad():
            batch = next(source, batch)
            return [*history, mean_over_processes(self.losses(*self.views(batch), max(0, self.steps_done - 1)))]

    def step(self, batch: Any, copies: Any = None) -> torch.Tensor:
        """Take one gradient step.

        Args:
            batch: A dictionary of the model's inputs. For a `FeatureMap`, memories (..., M, d), or a
                pair of memories and mask as `separation_loss` takes it. Labels are used by
                "supervised" alone.
            copies: For a kind with copies, the copy of the batch. If it is `None`, `views` makes
                what the step needs.

        Returns:
            The loss of each layer before the step.

        Raises:
            TypeError: If the batch has the wrong type.
            ValueError: If no set has room for two memories; if all parameters below the features
                are frozen; if "supervised" has no labels; or (on CPU) if the gradient is not finite.
            RuntimeError: If called under `torch.inference_mode()`.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("separation needs gradients, which torch.inference_mode() forbids; torch.no_grad() does not")
        first, second = self.views(batch) if copies is None else (batch, copies)
        with torch.enable_grad(), whole_parameters(self.model) as leaves:
            losses = self.losses(first, second, self.steps_done)
            if not losses.requires_grad:
                raise ValueError(
                    "there is nothing to train: all parameters that the memories' features depend on are frozen (requires_grad=False)"
                )
            gradients = self._gradients(losses.sum(), leaves)
        if is_readable(losses) and not are_finite([gradient for gradient in gradients if gradient is not None]):
            raise ValueError(
                "the gradient of the separation loss must be finite, and is not: the memories are too small or too large; scale them"
            )
        self.optimizer.step(gradients)
        moved = {id(parameter) for parameter, gradient in zip(self.parameters, gradients, strict=True) if gradient is not None}
        self._moved_maps = [phi for phi in self.maps if any(id(parameter) in moved for parameter in phi.parameters())]
        if self.separation.project:
            self._normalize_rows()
        self.steps_done += 1
        return losses.detach()

    def finish_round(self) -> None:
        """Scale the rows of W to unit norm, with `normalize_rows`."""
        if self.separation.normalize_rows:
            self._normalize_rows()

    def views(self, batch: Any) -> tuple[Any, Any]:
        """Return the batch that a step sees, and its copy; the latter is `None` for a kind without copies.

        Random numbers are drawn from torch's global random state.
        """
        self._check(batch)
        if self.separation.views is not None:
            return self._augmented(batch), self._augmented(batch)
        return batch, self._corrupted(batch) if self.separation.kind in WITH_COPIES else None

    def _augmented(self, batch: Any) -> Any:
        """One view of a batch; the mask of patterns stays."""
        views: Any = self.separation.views
        if not _is_map(self.model):
            return views(batch)
        memories, mask = _pair(batch)
        return views(memories), mask

    def _corrupted(self, batch: Any) -> Any:
        """The corrupted copy of a batch."""
        name = None if _is_map(self.model) else self.model.main_input_name
        if name is not None and name not in batch:
            raise ValueError(f"a batch must have {name}, the main input of the model, got {list(batch)}")
        clean = _pair(batch)[0] if name is None else batch[name]
        if name == "input_ids" and self.separation.corruption is None:
            raise ValueError(
                f"noise cannot be added to input_ids: {self.separation.kind!r} needs a corruption, a function from ids to ids, or views"
            )
        clean = clean if clean.is_floating_point() or name == "input_ids" else clean.float()
        corrupt = self.separation.corruption or (lambda values: values + self.separation.noise * torch.randn_like(values))
        return (corrupt(clean), _pair(batch)[1]) if name is None else {**batch, name: corrupt(clean)}

    def losses(self, batch: Any, copies: Any, step: int) -> torch.Tensor:
        """Return the loss of each layer on a batch (and its copy), at a step's temperature."""
        with self.autocast(), whole_parameters(self.model):
            seen = self._features(batch)
            others: list[Any] = [(None, None)] * len(seen) if copies is None else self._features(copies)
            labels = self._labels(batch) if self.separation.kind == "supervised" else None
            losses = [
                self._loss(features, both(mask, other_mask), other, labels, step)
                for (features, mask), (other, other_mask) in zip(seen, others, strict=True)
            ]
        return torch.stack(losses)

    def _loss(self, features: torch.Tensor, mask: torch.Tensor | None, copies: Any, labels: Any, step: int) -> torch.Tensor:
        """The loss of one layer."""
        kind, temperature = self.separation.kind, self.separation.temperature_of(step, self.total_steps)
        if kind in SEPARATION_KINDS:
            return separation_loss(features, kind=kind, temperature=temperature, mask=mask)
        if kind == "supervised":
            return supervised_loss(features, labels, copies, temperature=temperature, mask=mask)
        if kind == "koleo":
            return torch.stack([koleo_loss(each, mask=mask) for each in (features, copies) if each is not None]).mean()
        if kind == "vicreg":
            return vicreg_loss(features, copies, mask=mask)
        if kind == "sigreg":
            return sigreg_loss(features, copies, mask=mask, seed=step)
        loss = denoising_loss(copies, features, temperature=temperature, mask=mask)
        if self.separation.views is None:
            return loss
        # Because both are views, each is recognised from the other.
        return (loss + denoising_loss(features, copies, temperature=temperature, mask=mask)) / 2

    def _features(self, batch: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """The features of each layer that is separated (B, M, D), and which of them are present (B, M)."""
        sets = self._memory_sets(batch)
        if self.separation.layers == "last":
            sets = sets[-1:]
        if self.separation.memories == "tokens":
            return [(each.features(), each.mask) for each in sets]
        return [self._of_examples(each.features(), each.mask) for each in sets]

    def _of_examples(self, features: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean feature of each example as one set (1, B, D), and which examples have a memory (1, B)."""
        if features.dim() != 3:
            raise ValueError(f"memories='example' needs the memories of several examples (B, M, d), got shape {tuple(features.shape)}")
        mask = torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device) if mask is None else mask
        counts = mask.sum(-1)
        means = features.masked_fill(~mask.unsqueeze(-1), 0.0).sum(-2) / counts.clamp(min=1).unsqueeze(-1)
        present = counts > 0
        if self.separation.pool_memories == "global":
            means, present = gather_rows(means), _gathered(present)
        if len(means) < 2:
            raise ValueError("memories='example' separates the examples of a batch, which must be at least two")
        return means.unsqueeze(0), present.unsqueeze(0)

    def _labels(self, batch: Any) -> torch.Tensor:
        """The classes of the examples (1, B)."""
        labels = None if _is_map(self.model) else batch.get("labels")
        if not isinstance(labels, torch.Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise ValueError("kind='supervised' needs labels in the batch, one class (an integer) for each example")
        if self.separation.pool_memories == "global":
            labels = gather_rows(labels.unsqueeze(-1).double()).squeeze(-1)
        return labels.unsqueeze(0)

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs, in any number of processes: it holds whole tensors."""
        return {
            "steps_done": self.steps_done,
            "optimizer": self.optimizer.state_dict(),
            "settings": self._settings(),
            "fingerprint": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any], name: str = "the state") -> None:
        """Restore the state that `state_dict` returned, whose `name` an error tells.

        Raises:
            ValueError: If it belongs to other weights, or to another kind, optimizer or choice of
                parameters.
        """
        check_settings(state["settings"], self._settings(), name)
        if state["fingerprint"] != self._fingerprint():
            raise ValueError(
                f"{name} belongs to other weights than the loaded ones; "
                "in a Trainer, pass SeparationCallback(resume_from=checkpoint folder)"
            )
        self.steps_done = state["steps_done"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _settings(self) -> dict[str, Any]:
        # A resume may take another number of steps or examples.
        return {name: value for name, value in vars(self.separation).items() if name not in ("corruption", "views", "steps", "batch_size")}

    def _fingerprint(self) -> str:
        """Hash of the parameters that the steps change."""
        digest = hashlib.sha256()
        for parameter in self.parameters:
            digest.update(whole(parameter).float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _memory_sets(self, batch: Any) -> list[MemorySet]:
        """What each layer retrieves from, under `pool_memories` and `include_class_token`."""
        self._check(batch)
        if _is_map(self.model):
            return _separable([MemorySet(self.model, *_pair(batch))])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.separation.parameters == "upstream"):
            sets = memory_sets_of(self.model, batch, include_class_token=self.separation.include_class_token)
        sets = [_own_kind(memory_set) for memory_set in sets]
        if self.separation.memories == "example":
            sets = [each for each in sets if not each.shared]
            if not sets:
                raise ValueError("memories='example' needs memories that depend on the example; all memories of this model are learned")
            return sets
        if self.separation.pool_memories:
            sets = [self._pooled(each) for each in sets]
        return _separable(sets)

    def _check(self, batch: Any) -> None:
        """Raise a `TypeError` for a batch of the wrong type."""
        if _is_map(self.model):
            memories = _pair(batch)[0]
            if not isinstance(memories, torch.Tensor):
                raise TypeError(f"a batch of a FeatureMap must be memories, or memories and a mask, got {type(memories).__name__}")
        elif not isinstance(batch, Mapping):
            raise TypeError(
                f"a batch must be a dictionary of the model's inputs, got {type(batch).__name__}; `run` takes a list of batches"
            )

    def _pooled(self, memory_set: MemorySet) -> MemorySet:
        """Return the memories of all examples as one set: of this process, or of all."""
        memories, mask = memory_set.memories.flatten(0, 1), None if memory_set.mask is None else memory_set.mask.flatten()
        if self.separation.pool_memories == "global" and process_count() > 1 and not memory_set.shared:
            if self.separation.views is not None and mask is not None:
                # Because two views may have different masks, their memories keep their places.
                memories, mask = gather_rows(memories.masked_fill(~mask.unsqueeze(-1), 0.0)), _gathered(mask)
            else:
                memories = gather_rows(memories if mask is None else memories[mask])
                mask = None if mask is None else mask.new_ones(len(memories))
        return memory_set._replace(memories=memories, mask=mask)

    def _gradients(self, loss: torch.Tensor, leaves: dict[int, torch.Tensor]) -> list[torch.Tensor | None]:
        """Gradients of the loss, averaged over processes; `None` where it does not depend."""
        # Because other code may freeze a layer during training, we check again in every step.
        moving = [parameter for parameter in self.parameters if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, [leaves.get(id(parameter), parameter) for parameter in moving], allow_unused=True)
        found = dict(zip(map(id, moving), gradients, strict=True))
        return [None if found.get(id(each)) is None else averaged_like(found[id(each)], each) for each in self.parameters]

    def _normalize_rows(self) -> None:
        reshard(self.model)
        for phi in self._moved_maps:
            if has_master(phi.weight):
                write([(phi.weight, unit_norm(master(phi.weight)))])
            else:
                phi.normalize_rows()


def _separable(sets: list[MemorySet]) -> list[MemorySet]:
    """Return the sets that can hold two memories; raise a `ValueError` if there is none."""
    # Because the bags of a batch may by chance have one instance each, a set with a mask is kept.
    separable = [each for each in sets if each.mask is not None or each.memories.shape[-2] > 1]
    if not separable:
        raise ValueError(
            "there is nothing to separate: a memory set needs at least two memories, and every set has fewer "
            "(for images, include_class_token=True adds one)"
        )
    return separable


def _gathered(mask: torch.Tensor) -> torch.Tensor:
    """The masks (n,) of all processes."""
    return gather_rows(mask.unsqueeze(-1).float()).squeeze(-1) > 0


def both(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """Return a mask that is True where both are; `None` stands for all."""
    masks = [mask for mask in (first, second) if mask is not None]
    return None if not masks else torch.stack(masks).all(0)


def check_settings(saved: dict[str, Any], now: dict[str, Any], name: str) -> None:
    """Raise a `ValueError` if a setting differs from the one that a state was saved with."""
    for key, value in now.items():
        if saved.get(key, value) != value:
            raise ValueError(f"{name} was written with {key}={saved[key]!r} and cannot be resumed with {key}={value!r}")


def _own_kind(memory_set: Any) -> MemorySet:
    """Return a memory set as one of this package; code loaded from a model folder has its own class."""
    return (SharedMemorySet if getattr(memory_set, "shared", False) else MemorySet)(*memory_set)


def _is_map(model: Any) -> bool:
    """Return whether a module is a feature map, possibly inside an adapter, and not a model."""
    return isinstance(model, torch.nn.Module) and hasattr(model, "weight") and not has_memories(model)


def _pair(batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memories and their mask, from memories alone or a pair."""
    return (batch[0], batch[1]) if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    """Read batches again and again, until there is none."""
    was_empty = False
    while not was_empty:
        was_empty = True
        for batch in batches:
            was_empty = False
            yield batch


def _feature_maps(model: Any, needed: bool) -> list[Any]:
    """The feature maps of a model; a feature map with an adapter is returned inside its adapter.

    The list may be empty only if `needed` is false.
    """
    # Because code loaded from a model folder has its own FeatureMap class, and FSDP2 makes a subclass,
    # we compare the names of all base classes.
    # An adapter of PEFT holds the wrapped module as `base_layer`.
    names = [name for name, module in model.named_modules() if "FeatureMap" in {kind.__name__ for kind in type(module).__mro__}]
    maps = [model.get_submodule(re.sub(r"(\.base_layer)+$", "", name)) for name in names]
    if not maps and (needed or not has_memories(model)):
        raise ValueError(
            f"the separation step needs a model with feature maps (use_feature_map=True) and memory_sets; {type(model).__name__} has none; "
            "UHopAdapterConfig adds them to a model of transformers"
        )
    # Because PEFT freezes all that it does not adapt, a frozen map is an oversight there.
    needed = needed or hasattr(model, "peft_config")
    if needed and not any(parameter.requires_grad for phi in maps for parameter in phi.parameters()):
        raise ValueError(
            "the separation step needs trainable feature maps, but all of them are frozen (requires_grad=False); "
            "with PEFT, LoraConfig(target_parameters=['feature_map.weight']) adapts them, and UHopAdapterConfig() adds new ones"
        )
    return maps


def maximize_separation(
    feature_map: FeatureMap, memories: torch.Tensor, separation: Separation | None = None, *, mask: torch.Tensor | None = None, **fields
) -> list[float]:
    r"""Run the separation step (Stage I) on one feature map: gradient steps on its matrix W.

    Args:
        feature_map: The map to train, in place. A map in half precision is trained in fp32. Nothing
            else changes, and no `.grad` is left behind.
        memories: Patterns (..., M, d).
        separation: How to separate; `None` for `Separation.uhop()`. With `batch_size`, each step
            uses a new random sample of that many memories, at least 2.
        mask: As in `separation_loss`; a mask of pairs is accepted only by the kinds of
            `separation_loss`.
        fields: Fields of `Separation` to change.

    Returns:
        The `steps + 1` losses: the loss before each step, then the loss of the final map (before it
            is rounded to half precision, if it is). With a falling temperature, each loss is at the
            temperature of its step.

    Raises:
        ValueError: If a value is out of range, the feature map is frozen, or the gradient is not
            finite.
        TypeError: If the memories are not a tensor, or a name in `fields` is not a field.
        RuntimeError: If called under `torch.inference_mode()`.

    Examples:
        >>> from modeling_uhop import FeatureMap, Separation, maximize_separation
        >>> phi = FeatureMap(8, normalize=True)
        >>> history = maximize_separation(phi, 1.0 + torch.rand(6, 8), Separation.uhop_plus(), steps=20, lr=1e-2)
        >>> len(history)
        21
    """
    if not _is_map(feature_map):
        raise TypeError(f"feature_map must be a FeatureMap, got {type(feature_map).__name__}; StageOne separates a model")
    check_tensors(memories=memories)
    check_tensor(mask, "mask")
    separation = chosen(separation, Separation.uhop(), **fields)
    if separation.batch_size is not None and separation.batch_size < 2:
        raise ValueError(f"batch_size must be at least 2 memories, got {separation.batch_size}")
    if separation.kind in WITH_VIEWS and mask is not None and mask.dim() == memories.dim():
        raise ValueError(
            f"the mask of kind {separation.kind!r} must be one of memories (..., M), not of pairs, got shape {tuple(mask.shape)}"
        )
    memories, moving = memories.to(feature_map.weight.dtype), feature_map
    if is_half(feature_map.weight) and not has_master(feature_map.weight):
        # Because small steps would be lost in half precision, we train a copy in fp32.
        moving, memories = copy.deepcopy(feature_map).float(), memories.float()
    history = StageOne(moving, separation).run(iter(lambda: subsample(memories, mask, separation.batch_size), None))
    if moving is not feature_map:
        with torch.no_grad():
            feature_map.weight.copy_(moving.weight)
    return history
