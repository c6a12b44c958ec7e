"""SeparationCallback: Stage I of U-Hop inside the stock Trainer."""

import copy
import hashlib
import itertools
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import DistributedType, reduce, send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy
from transformers.utils import logging

from .hopfield import MemorySet
from .separation import OPTIMIZERS, SEPARATION_KINDS, SeparationOptimizer, annealed, denoising_loss, separation_loss


SCHEDULES = ("train_begin", "epoch", "step")
MOVED = ("feature_maps", "upstream")
KINDS = (*SEPARATION_KINDS, "denoising")
STATE_FILE = "separation.pt"


class SeparationCallback(TrainerCallback):
    """Separates what the Hopfield layers of a model retrieve from, before and between the supervised steps of a `Trainer`.

    The defaults are what our experiments speak for, of models that are trained from scratch on few examples (a thousand images; with five
    and ten thousand they gain nothing on others, and many more steps than 100 cost accuracy there): before training, SGD steps on all that
    the features depend on, on the average separation loss (2.6) of U-Hop (arXiv 2404.03827), each on a sampled batch. Its Algorithm 2 is
    `SeparationCallback(schedule="step", parameters="feature_maps", kind="squared")`. Where what lies below the features is to be kept, as
    in a pretrained model, let `parameters` be "feature_maps".

    The memories are those that the model's `memory_sets` yields, for a vision transformer the tokens of an image as each layer's feature
    map sees them; the losses of the layers are added up for the gradient, and averaged where they are reported. Layers that retrieve from
    a single memory (of a single series, for one) have no part in it.

    Stage I leaves Stage II alone: it samples its own batches with its own random state, has its own optimizer, leaves no gradient
    behind and moves nothing but what `parameters` says. With `lr=0` training is bitwise what it would be without the callback.
    Gradients are averaged over processes. A checkpoint holds what an exact resume needs, beside the state of the Trainer's optimizer in
    `optimizer.pt`, which the Trainer loads from any folder that it resumes from, and in `separation.pt`, for `resume_from` and where the
    Trainer saves no optimizer; of further callbacks of this class in one Trainer, which a resume needs in the same order, as
    `separation_1.pt` and so on. A stream must be readable again from its start.

    Of a model that PEFT has wrapped it moves what PEFT trains: an adapter of Phi (`LoraConfig(target_parameters=["feature_map.weight"])`),
    or Phi itself (`modules_to_save=["feature_map"]`).

    Args:
        schedule: "train_begin": one round before training. "epoch": a round before each epoch. "step": a round before each optimizer step.
        steps: Gradient steps in a round, at least 1 (the papers' N, or N_i of Algorithm 2); `None`: 100 under "train_begin", else 1.
        parameters: "feature_maps": the maps Phi alone, memories held fixed. "upstream": every trainable parameter that the features
            depend on (embeddings, lower layers, Phi), as the authors' code does. A model without feature maps can only move these.
        kind, temperature: The loss; see `separation_loss`. "denoising" has each memory told from the others of its set by its copy in a
            noisy example; see `denoising_loss`.
        noise: Of "denoising", the standard deviation of what is added to the model's main input (pixels, instances, past values), positive.
        final_temperature: Where the temperature ends after falling geometrically over all rounds (U-Hop+); `None` holds it fixed.
        lr: Learning rate, at least 0.
        optimizer: "sgd" or "adam".
        batch_size: Examples in a step, over all processes together; a multiple of their number.
        include_class_token: Whether the CLS token counts as a memory.
        pool_memories: Whether the memories of a batch are one set, in place of a set for each example (image, bag, series).
        project: Whether the rows of W are scaled to unit norm after every step (the projection of U-Hop+), in the maps that it moved.
        normalize_rows: Whether they are after every round (U-Hop Algorithm 1).
        seed: Seed of Stage I; `None` for the Trainer's.
        resume_from: Checkpoint folder to take Stage I's state from when training resumes; `None`: what the Trainer loads with its
            optimizer, or, of a checkpoint without one or of an earlier version, from where the Trainer saves.

    Each round adds `separation_loss_before` and `separation_loss` (after), measured on the round's first batch, to
    `state.log_history`; under "step" they join the Trainer's own entries. `history` holds the loss of every step that was measured.
    They also join the next logs of the training loss, for the callbacks behind this one. Those that `report_to` names come before it, and
    a callback cannot change that: for TensorBoard, say, with the separation loss, let
    `Trainer(callbacks=[SeparationCallback(), TensorBoardCallback()])` have both in this order, and `report_to` be "none".

    Raises:
        ValueError: For an argument outside its choices or range; when training begins, where nothing that is to move can, for
            `project` or `normalize_rows` where an adapter moves in the place of W, for a stream that can be read only once, for
            `final_temperature` under "epoch" on a stream, and on resuming, where a checkpoint's state is of other weights or another
            schedule, kind, choice of parameters or optimizer.
        FileNotFoundError: On resuming, where a checkpoint's state is missing.
        MemoryError: When a separation step runs out of memory.
        NotImplementedError: When training begins under FSDP, DeepSpeed or another engine that shards parameters.
    """

    def __init__(
        self,
        schedule: str = "train_begin",
        steps: int | None = None,
        parameters: str = "upstream",
        kind: str = "average",
        temperature: float = 0.25,
        noise: float = 0.5,
        final_temperature: float | None = None,
        lr: float = 0.1,
        optimizer: str = "sgd",
        batch_size: int = 128,
        include_class_token: bool = False,
        pool_memories: bool = False,
        project: bool = False,
        normalize_rows: bool = False,
        seed: int | None = None,
        resume_from: str | os.PathLike | None = None,
    ):
        for name, value, choices in (
            ("schedule", schedule, SCHEDULES),
            ("parameters", parameters, MOVED),
            ("kind", kind, KINDS),
            ("optimizer", optimizer, tuple(OPTIMIZERS)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        for name, number in (("steps", steps), ("batch_size", batch_size)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {number}")
        for name, size in (("temperature", temperature), ("final_temperature", final_temperature), ("noise", noise)):
            if size is not None and not size > 0:
                raise ValueError(f"{name} must be positive, got {size}")
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        self.schedule = schedule
        self.steps = (100 if schedule == "train_begin" else 1) if steps is None else steps
        self.parameters = parameters
        self.kind = kind
        self.temperature = temperature
        self.noise = noise
        self.final_temperature = final_temperature
        self.lr = lr
        self.optimizer = optimizer
        self.batch_size = batch_size
        self.include_class_token = include_class_token
        self.pool_memories = pool_memories
        self.project = project
        self.normalize_rows = normalize_rows
        self.seed = seed
        self.resume_from = resume_from
        self.history: list[dict[str, float]] = []
        self._latest: dict[str, float] = {}
        self._separated: nn.Module | None = None
        self._training = False
        self._travelling: RemovableHandle | None = None

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, optimizer=None, **kwargs):
        self._file = _state_file(state)
        handed = self._travel_with(optimizer)
        if state.global_step == 0 and self._separated is model:
            # The step behind the last round ran out of memory, and `auto_find_batch_size` begins anew.
            self._sample = _sampler(train_dataloader, self.batch_size)
            state.stateful_callbacks[self._file] = {"args": {}, "attributes": {}}
            state.log_history += self._recorded
            return
        self._separated = None
        maps = _feature_maps(model, needed=self.parameters == "feature_maps" or self.project or self.normalize_rows)
        world_size = PartialState().num_processes
        if self.batch_size % world_size != 0:
            raise ValueError(f"batch_size must be a multiple of the {world_size} processes, got {self.batch_size}")
        if (self.project or self.normalize_rows) and any(hasattr(phi, "base_layer") for phi in maps):
            raise ValueError(
                "project and normalize_rows scale the rows of W, and an adapter moves in its place; "
                "leave them off, or train W itself (modules_to_save=['feature_map'])"
            )
        self._maps = maps
        moved = model.parameters() if self.parameters == "upstream" else (p for phi in maps for p in phi.parameters())
        self._moved = [parameter for parameter in moved if parameter.requires_grad]
        self._refuse_sharding(args)
        self._private_optimizer = SeparationOptimizer(self.optimizer, self._moved, self.lr)
        self._sample = _sampler(train_dataloader, self.batch_size)
        self._sized = not _is_stream(train_dataloader.dataset)
        if self.final_temperature is not None and self.schedule == "epoch" and not self._sized:
            raise ValueError("final_temperature needs a known number of epochs, which a stream has not; anneal with schedule 'step'")
        self._steps_done, self.history = 0, []
        self._latest = {}
        self._recorded: list[dict[str, float]] = []
        self._mid_epoch = False
        # A mark in every checkpoint, so that one whose separation.pt was lost is told from one that predates the callback.
        marked = self._file in state.stateful_callbacks
        state.stateful_callbacks[self._file] = {"args": {}, "attributes": {}}
        resumed = state.global_step > 0 and self._load(args, state, marked, handed)
        self._training = True
        if self.schedule == "train_begin" and not resumed:
            self._round(args, state, model, record=True)

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        if self.schedule == "epoch" and not self._mid_epoch:
            self._round(args, state, model, record=True)
        self._mid_epoch = False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.schedule == "step":
            by_steps = args.logging_strategy == IntervalStrategy.STEPS
            due = not by_steps or state.global_step == 0 or (state.global_step + 1) % max(state.logging_steps, 1) == 0
            self._round(args, state, model, measure=due)

    def on_step_end(self, args, state, control, **kwargs):
        self._separated = None

    def on_train_end(self, args, state, control, **kwargs):
        self._separated = None
        self._training = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._latest and logs is not None and "loss" in logs:
            logs.update(self._latest)
            if self.schedule == "step":
                state.log_history[-1].update(self._latest)
            self._latest = {}

    def on_save(self, args, state, control, **kwargs):
        if not args.should_save:
            return
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            warnings.warn(f"Stage I's state is not saved: the checkpoint is not in {folder}", stacklevel=2)
            return
        self._write(folder)

    def on_push_begin(self, args, state, control, **kwargs):
        # A checkpoint is uploaded before `on_save`.
        folder = _checkpoint(args, state)
        if self._training and args.should_save and folder.is_dir():
            self._write(folder)

    def _write(self, folder: Path) -> None:
        target = folder / self._file
        partial = target.with_suffix(".tmp")
        torch.save(self._state(), partial)
        os.replace(partial, target)

    def _state(self) -> dict[str, Any]:
        """What an exact resume needs."""
        return {
            "steps_done": self._steps_done,
            "history": self.history,
            "latest": self._latest,
            "optimizer": self._private_optimizer.state_dict(),
            "settings": self._resumable(),
            "fingerprint": self._fingerprint(),
        }

    def _travel_with(self, optimizer: Any) -> dict[str, Any] | None:
        """Put Stage I's state into what the Trainer saves of its optimizer; and take out what it has loaded, `None` without any.

        Callbacks are not told the folder that training resumes from. PyTorch keeps entries of an optimizer's state that are not of a
        parameter, so that this one comes back with the others.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        if self._travelling is not None:
            self._travelling.remove()
            self._travelling = None
        if not isinstance(inner, torch.optim.Optimizer):
            return None

        def with_state(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
            return {**saved, "state": {**saved["state"], self._file: self._state()}} if self._training else saved

        self._travelling = inner.register_state_dict_post_hook(with_state)
        return cast(dict[Any, Any], inner.state).pop(self._file, None)

    def _round(self, args: TrainingArguments, state: TrainerState, model: nn.Module, record: bool = False, measure: bool = True) -> None:
        """`steps` gradient steps; with `measure` also the loss of the first batch before and after, for the log.

        Nothing if no supervised step has followed the last round of this model.
        """
        if self._separated is model:
            return
        first_batch: list[dict[str, Any]] = []
        before = 0.0
        bar = logging.tqdm(
            range(self.steps),
            desc="separation",
            disable=args.disable_tqdm or not state.is_local_process_zero or not record,
            leave=record,
        )
        with _evaluating(model), _own_memory_errors(self.batch_size):
            for inner in bar:
                index = self._steps_done
                with _isolated_rng(_mixed(self._seed(args), index, PartialState().process_index), args.device):
                    batch = self._views(model, send_to_device(self._sample(self._seed(args), index), args.device))
                    losses = self._step(args, model, batch, self._temperature(state, index))
                self._steps_done += 1
                if measure:
                    value = _mean_over_processes(losses)
                    self.history.append({"step": state.global_step, "inner_step": inner, "separation_loss": value})
                    bar.set_postfix(loss=f"{value:.4f}")
                    if not first_batch:
                        first_batch, before = batch, value
            if self.normalize_rows:
                self._normalize_rows()
            # Only a whole round counts: after one that failed, training begins with it.
            self._separated = model
            if not measure:
                return
            with torch.no_grad():
                after = self._losses(args, model, first_batch, self._temperature(state, self._steps_done - self.steps))
        self._latest = {"separation_loss_before": before, "separation_loss": _mean_over_processes(after)}
        if record:
            epoch = 0.0 if state.epoch is None else state.epoch
            self._recorded = [{**self._latest, "epoch": epoch, "step": state.global_step}]
            state.log_history += self._recorded

    def _views(self, model: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The batch, and under "denoising" its noisy copy."""
        if self.kind != "denoising":
            return [batch]
        clean = batch[model.main_input_name]
        clean = clean if clean.is_floating_point() else clean.float()
        return [batch, {**batch, model.main_input_name: clean + self.noise * torch.randn_like(clean)}]

    def _step(self, args: TrainingArguments, model: nn.Module, views: list[dict[str, Any]], temperature: float) -> torch.Tensor:
        """One gradient step; the losses of the layers before it."""
        with torch.enable_grad():
            losses = self._losses(args, model, views, temperature)
            if not losses.requires_grad:
                raise ValueError("there is nothing to move: all that the memories' features depend on is frozen (requires_grad=False)")
            # Others may freeze a layer as training goes on.
            moving = [parameter for parameter in self._moved if parameter.requires_grad]
            found = dict(zip(map(id, moving), torch.autograd.grad(losses.sum(), moving, allow_unused=True), strict=True))
        gradients = [found.get(id(parameter)) for parameter in self._moved]
        if PartialState().num_processes > 1:
            gradients = [None if g is None else reduce(g, reduction="mean") for g in gradients]
        self._private_optimizer.step(gradients)
        reached = {id(parameter) for parameter, gradient in zip(self._moved, gradients, strict=True) if gradient is not None}
        self._moved_maps = [phi for phi in self._maps if id(phi.weight) in reached]
        if self.project:
            self._normalize_rows()
        return losses.detach()

    def _losses(self, args: TrainingArguments, model: Any, views: list[dict[str, Any]], temperature: float) -> torch.Tensor:
        """Separation loss of each layer on one batch."""
        half = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float16
        with torch.autocast(args.device.type, dtype=half, enabled=args.mixed_precision in ("bf16", "fp16")):
            stored, *noisy = [self._memory_sets(model, batch) for batch in views]
            if noisy:
                losses = [
                    denoising_loss(copies.features(), each.features(), temperature=temperature, mask=each.mask)
                    for copies, each in zip(noisy[0], stored, strict=True)
                ]
            else:
                losses = [separation_loss(each.features(), kind=self.kind, temperature=temperature, mask=each.mask) for each in stored]
        return torch.stack(losses)

    def _memory_sets(self, model: Any, batch: dict[str, Any]) -> list[MemorySet]:
        """What each layer retrieves from, as `pool_memories` and `include_class_token` say."""
        options = {"include_class_token": True} if self.include_class_token else {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.parameters == "upstream"):
            sets = [MemorySet(*memory_set) for memory_set in model.memory_sets(**batch, **options)]
        if self.pool_memories:
            sets = [MemorySet(phi, memories.flatten(0, 1), None if mask is None else mask.flatten()) for phi, memories, mask in sets]
        separable = [each for each in sets if each.mask is not None or each.memories.shape[-2] > 1]
        if not separable:
            raise ValueError(
                "there is nothing to separate: a memory set needs two memories, and each has one (of images, include_class_token adds one)"
            )
        return separable

    def _temperature(self, state: TrainerState, index: int) -> float:
        if self.final_temperature is None:
            return self.temperature
        rounds = {"train_begin": 1, "epoch": state.num_train_epochs, "step": state.max_steps}[self.schedule]
        return annealed(self.temperature, self.final_temperature, index, rounds * self.steps)

    def _normalize_rows(self) -> None:
        for phi in self._moved_maps:
            phi.normalize_rows()

    def _seed(self, args: TrainingArguments) -> int:
        return args.seed if self.seed is None else self.seed

    def _resumable(self) -> dict[str, str]:
        """What a checkpoint's state is bound to."""
        return {"schedule": self.schedule, "parameters": self.parameters, "optimizer": self.optimizer, "kind": self.kind}

    def _load(self, args: TrainingArguments, state: TrainerState, marked: bool, handed: dict[str, Any] | None) -> bool:
        """Take over Stage I's state from the checkpoint that training resumes from; whether there was one.

        Args:
            marked: Whether the checkpoint's run had this callback.
            handed: The state that the Trainer has loaded with its optimizer.
        """
        given = (self.resume_from, args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None)
        folders = [Path(folder) for folder in given if folder] or [_checkpoint(args, state)]
        path = folders[0] / self._file
        if handed is not None and self.resume_from is None:
            path = Path(f"{self._file} in optimizer.pt of the checkpoint")
        elif not path.is_file():
            if marked:
                raise FileNotFoundError(
                    f"this run had a separation step, but {path} is missing; pass SeparationCallback(resume_from=checkpoint folder)"
                )
            warnings.warn(f"the checkpoint has no {self._file}: it predates the separation step, which begins now", stacklevel=2)
            return False
        else:
            handed = torch.load(path, map_location=args.device, weights_only=True)
        saved = cast(dict[str, Any], handed)
        for name, value in self._resumable().items():
            written = saved["settings"].get(name, value)
            if written != value:
                raise ValueError(f"{path} was written with {name}={written!r}, and cannot go on with {name}={value!r}")
        if saved["fingerprint"] != self._fingerprint():
            raise ValueError(
                f"{path} belongs to other weights than those that were loaded; pass SeparationCallback(resume_from=checkpoint folder)"
            )
        self._steps_done, self.history, self._latest = saved["steps_done"], saved["history"], saved["latest"]
        # The Trainer begins an interrupted epoch again, and every epoch of a stream, which has no known end.
        self._mid_epoch = not self._sized or state.epoch % 1 > 1e-6
        self._private_optimizer.load_state_dict(saved["optimizer"])
        return True

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for parameter in self._moved:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _refuse_sharding(self, args: TrainingArguments) -> None:
        whole = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
        kind = PartialState().distributed_type
        engine = next((engine for engine in ("fsdp", "deepspeed") if getattr(args, engine, None)), kind.value)
        # A DTensor has placements: tensor parallelism shards without telling accelerate.
        if engine != kind.value or kind not in whole or any(hasattr(parameter, "placements") for parameter in self._moved):
            raise NotImplementedError(
                f"SeparationCallback moves whole parameters and cannot under {engine}, which shards or shadows them; "
                "train with plain data parallelism (DDP)"
            )


def _feature_maps(model: Any, needed: bool) -> list[Any]:
    """The feature maps of a model, each with the adapter around it where it has one; none only where they are not needed."""
    # By name: code loaded from a model folder has classes of its own, and an adapter of PEFT has what it wraps as `base_layer`.
    names = [name for name, module in model.named_modules() if type(module).__name__ == "FeatureMap"]
    maps = [model.get_submodule(re.sub(r"(\.base_layer)+$", "", name)) for name in names]
    if not hasattr(model, "memory_sets") or (needed and not maps):
        raise ValueError(
            f"SeparationCallback needs a model with feature maps (use_feature_map=True) and memory_sets; {type(model).__name__} has none"
        )
    if maps and not any(parameter.requires_grad for phi in maps for parameter in phi.parameters()):
        raise ValueError(
            "SeparationCallback needs feature maps that can move, but all of them are frozen (requires_grad=False); "
            "with PEFT, LoraConfig(target_parameters=['feature_map.weight']) adapts them"
        )
    return maps


def _sampler(loader: DataLoader, batch_size: int) -> Callable[[int, int], dict[str, Any]]:
    """A function of (seed, index) that makes this process's part of Stage I's batch number `index`."""
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset
    collate = loader.collate_fn
    rank, world_size = PartialState().process_index, PartialState().num_processes
    if _is_stream(dataset) and iter(copy.copy(dataset)) is iter(copy.copy(dataset)):
        raise ValueError("the training data set is a stream that can be read only once, and the separation step would use it up")
    stream: Iterator[Any] = iter(())
    position = 0

    def from_stream(seed: int, index: int) -> dict[str, Any]:
        """Batches follow one another through the stream, round and round; a resume reads on to where it was."""
        nonlocal stream, position
        if position > index:
            stream, position = iter(()), 0
        while position <= index:
            examples = list(itertools.islice(stream, batch_size))
            while len(examples) < batch_size:
                # A copy, so that a stream that counts its readings does not count this one.
                stream = iter(copy.copy(dataset))
                more = list(itertools.islice(stream, batch_size - len(examples)))
                if not more:
                    raise ValueError("the training data set is an empty stream: there is nothing to separate")
                examples += more
            position += 1
        return collate(examples[rank::world_size])

    def from_indices(seed: int, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(_mixed(seed, index))
        size = len(dataset)
        chosen = torch.cat([torch.randperm(size, generator=generator) for _ in range(-(-batch_size // size))])[:batch_size]
        return collate([dataset[i] for i in chosen[rank::world_size].tolist()])

    return from_stream if _is_stream(dataset) else from_indices


def _is_stream(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, each module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _own_memory_errors(batch_size: int) -> Iterator[None]:
    """Keep `auto_find_batch_size` from halving the Trainer's batch, which is not the one that was too large."""
    try:
        yield
    except Exception as error:
        if should_reduce_batch_size(error):
            raise MemoryError(f"the separation step ran out of memory with batch_size={batch_size}; give it a smaller one") from error
        raise


@contextmanager
def _isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """A random state of its own, so that what Stage I draws (augmentations, say) is not missing from Stage II."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    count = torch.get_device_module(device).device_count() if device.type in ("cuda", "xpu") else 0
    with torch.random.fork_rng(range(count), device_type=device.type if count else "cuda"):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _mean_over_processes(losses: torch.Tensor) -> float:
    return float((reduce(losses, reduction="mean") if PartialState().num_processes > 1 else losses).mean())


def _mixed(*parts: int) -> int:
    """A seed out of several numbers, such that neighbouring numbers give unrelated ones."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _state_file(state: TrainerState) -> str:
    """The name of a callback's file, by the number of those that began this run before it."""
    before = getattr(state, "_separation_callbacks", 0)
    state._separation_callbacks = before + 1  # type: ignore[attr-defined]
    return f"separation_{before}.pt" if before > 0 else STATE_FILE


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
