"""SeparationCallback: the separation step (Stage I of U-Hop) inside the stock `Trainer`."""

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

from .memories import MemorySet
from .separation import OPTIMIZERS, SEPARATION_KINDS, SeparationOptimizer, annealed, denoising_loss, separation_loss


SCHEDULES = ("train_begin", "epoch", "step")
MOVED = ("feature_maps", "upstream")
KINDS = (*SEPARATION_KINDS, "denoising")
STATE_FILE = "separation.pt"


class SeparationCallback(TrainerCallback):
    r"""Run the separation step (Stage I) before and between the supervised steps of a `Trainer`.

    A separation step spreads the memories of the Hopfield layers in feature space. By default it
    minimizes the average separation loss of U-Hop (arXiv 2404.03827, equation 2.6), with unit-norm
    features and temperature $\tau = 1 / (2 t)$:

    $$
    L = \log \mathrm{E}_{\mu \ne \nu} \exp\left(-t\, |\Phi(\xi_\mu) - \Phi(\xi_\nu)|^2\right)
    $$

    **Defaults.** Before training, SGD steps on every parameter that the features depend on, each
    step on one sampled batch. These defaults gave the best results when training from scratch on
    about 1,000 images. With 5,000 and 10,000 images they gave no gain on held-out images, and many
    more than 100 steps reduced accuracy. Algorithm 2 of the paper is
    `SeparationCallback(schedule="step", parameters="feature_maps", kind="squared")`. Use
    `parameters="feature_maps"` to keep the layers below the feature maps unchanged, for example in
    a pretrained model.

    **Memories.** They are what `memory_sets` of the model yields. For a vision transformer these
    are the tokens of an image as the feature map of each layer receives them. The gradient uses the
    sum of the losses of all layers; logs report their mean. Layers that retrieve from a single
    memory (for example a single series) are skipped.

    **Effect on training.** Stage I does not disturb the supervised steps (Stage II). It samples its
    own batches with its own random state, has its own optimizer, leaves no gradient, and changes
    only the parameters that `parameters` selects. With `lr=0`, training is bitwise the same as
    without the callback. Gradients are averaged over processes. A stream must be readable again
    from its start.

    **Checkpoints.** A checkpoint holds all that an exact resume needs, in two places.
    `optimizer.pt` holds it beside the optimizer state of the Trainer, which the Trainer loads from
    every folder it resumes from. `separation.pt` holds it for `resume_from` and for checkpoints
    without an optimizer. Several callbacks of this class in one Trainer write `separation.pt`,
    `separation_1.pt` and so on; a resume needs them in the same order.

    **PEFT.** In a model wrapped by PEFT, Stage I trains what PEFT trains: an adapter of the feature
    map (`LoraConfig(target_parameters=["feature_map.weight"])`), or the feature map itself
    (`modules_to_save=["feature_map"]`).

    **Logs.** Each round adds `separation_loss_before` and `separation_loss` (after the round) to
    `state.log_history`. Both are measured on the first batch of the round. With `schedule="step"`
    they join the Trainer's own entries. `history` holds the loss of every step that was measured.
    The two values also join the next log of the training loss, for callbacks that come after this
    one. Callbacks named in `report_to` come before it, and a callback cannot change this order. To
    send the separation loss to TensorBoard, pass both in order,
    `Trainer(callbacks=[SeparationCallback(), TensorBoardCallback()])`, with `report_to="none"`.

    Args:
        schedule: When rounds run. "train_begin": one round before training. "epoch": one round
            before each epoch. "step": one round before each optimizer step.
        steps: Gradient steps per round, at least 1 (the papers' N, or N_i of Algorithm 2). `None`
            means 100 with "train_begin", otherwise 1.
        parameters: What Stage I changes. "feature_maps": only the feature maps, with the memories
            held fixed. "upstream": every trainable parameter that the features depend on
            (embeddings, lower layers, feature maps), as in the authors' code. A model without
            feature maps needs "upstream".
        kind: The loss: one of the kinds of `separation_loss`, or "denoising". The latter trains the
            model to tell each memory from the others of its set, given its copy in a noisy example;
            see `denoising_loss`.
        temperature: Temperature $\tau$ of the loss, positive.
        noise: For "denoising", the standard deviation of the noise added to the main input of the
            model (pixels, instances, past values), positive.
        final_temperature: Temperature at the end of all rounds, positive; the temperature falls
            geometrically to it (U-Hop+). `None` keeps the temperature fixed.
        lr: Learning rate, at least 0.
        optimizer: "sgd" or "adam".
        batch_size: Examples per step, over all processes together; a multiple of the number of
            processes.
        include_class_token: Whether the CLS token is a memory.
        pool_memories: Whether all memories of a batch form one set, instead of one set per example
            (image, bag, series).
        project: Whether to scale the rows of W to unit norm after every step (the projection of
            U-Hop+), in the feature maps that the step changed.
        normalize_rows: Whether to scale the rows of W to unit norm after every round (U-Hop,
            Algorithm 1).
        seed: Seed of Stage I; `None` means the seed of the Trainer.
        resume_from: Checkpoint folder that holds the Stage I state when training resumes. `None`
            means what the Trainer loads with its optimizer; if the checkpoint has no optimizer or
            is of an earlier version of this package, the folder that the Trainer saves to.

    Raises:
        ValueError: If an argument is not one of its choices or out of range. When training begins:
            if no selected parameter is trainable; if `project` or `normalize_rows` is set while an
            adapter is trained instead of W; if the data set is a stream that can be read only once;
            if `final_temperature` is used with "epoch" on a stream. On resuming: if the saved state
            belongs to other weights, or to another schedule, kind, optimizer or choice of
            parameters.
        FileNotFoundError: On resuming, if the Stage I state of a checkpoint is missing.
        MemoryError: If a separation step runs out of memory.
        NotImplementedError: When training begins under FSDP, DeepSpeed or another engine that
            shards parameters.
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
        self._separated_model: nn.Module | None = None
        self._training = False
        self._state_dict_hook: RemovableHandle | None = None

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, optimizer=None, **kwargs):
        """Prepare Stage I, load its state on a resume, and run the round of "train_begin"."""
        self._file_name = _state_file_name(state)
        loaded_state = self._attach_to_optimizer(optimizer)
        if state.global_step == 0 and self._separated_model is model:
            # Because the supervised step after the last round ran out of memory,
            # `auto_find_batch_size` starts training again; the round is not repeated.
            self._sample = _sampler(train_dataloader, self.batch_size)
            state.stateful_callbacks[self._file_name] = {"args": {}, "attributes": {}}
            state.log_history += self._logged_losses
            return
        self._separated_model = None
        maps = _feature_maps(model, needed=self.parameters == "feature_maps" or self.project or self.normalize_rows)
        world_size = PartialState().num_processes
        if self.batch_size % world_size != 0:
            raise ValueError(f"batch_size must be a multiple of the {world_size} processes, got {self.batch_size}")
        if (self.project or self.normalize_rows) and any(hasattr(phi, "base_layer") for phi in maps):
            raise ValueError(
                "project and normalize_rows scale the rows of W, but an adapter is trained instead of W; "
                "turn them off, or train W itself (modules_to_save=['feature_map'])"
            )
        self._maps = maps
        moved = model.parameters() if self.parameters == "upstream" else (p for phi in maps for p in phi.parameters())
        self._trained_parameters = [parameter for parameter in moved if parameter.requires_grad]
        self._refuse_sharding(args)
        self._private_optimizer = SeparationOptimizer(self.optimizer, self._trained_parameters, self.lr)
        self._sample = _sampler(train_dataloader, self.batch_size)
        self._has_length = not _is_stream(train_dataloader.dataset)
        if self.final_temperature is not None and self.schedule == "epoch" and not self._has_length:
            raise ValueError("final_temperature with schedule='epoch' needs a known number of epochs, got a stream; use schedule='step'")
        self._steps_done, self.history = 0, []
        self._latest = {}
        self._logged_losses: list[dict[str, float]] = []
        self._mid_epoch = False
        # Because a checkpoint whose separation.pt was lost must not pass for one that was saved
        # without the callback, we put a mark into every checkpoint.
        had_callback = self._file_name in state.stateful_callbacks
        state.stateful_callbacks[self._file_name] = {"args": {}, "attributes": {}}
        resumed = state.global_step > 0 and self._load(args, state, had_callback, loaded_state)
        self._training = True
        if self.schedule == "train_begin" and not resumed:
            self._round(args, state, model, record=True)

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        """Run a round with schedule "epoch", except where a resume continues inside an epoch."""
        if self.schedule == "epoch" and not self._mid_epoch:
            self._round(args, state, model, record=True)
        self._mid_epoch = False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Run a round with schedule "step"; measure its losses only if they will be logged."""
        if self.schedule == "step":
            by_steps = args.logging_strategy == IntervalStrategy.STEPS
            should_measure = not by_steps or state.global_step == 0 or (state.global_step + 1) % max(state.logging_steps, 1) == 0
            self._round(args, state, model, measure=should_measure)

    def on_step_end(self, args, state, control, **kwargs):
        """Note that a supervised step has followed the last round."""
        self._separated_model = None

    def on_train_end(self, args, state, control, **kwargs):
        """Note that training has ended."""
        self._separated_model = None
        self._training = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the latest separation losses to a log of the training loss."""
        if self._latest and logs is not None and "loss" in logs:
            logs.update(self._latest)
            if self.schedule == "step":
                state.log_history[-1].update(self._latest)
            self._latest = {}

    def on_save(self, args, state, control, **kwargs):
        """Write the Stage I state into the checkpoint folder."""
        if not args.should_save:
            return
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            warnings.warn(f"Stage I's state is not saved: the checkpoint is not in {folder}", stacklevel=2)
            return
        self._write(folder)

    def on_push_begin(self, args, state, control, **kwargs):
        # Because the Trainer uploads a checkpoint before it calls `on_save`, we write the state
        # here.
        """Write the Stage I state before a checkpoint is uploaded."""
        folder = _checkpoint(args, state)
        if self._training and args.should_save and folder.is_dir():
            self._write(folder)

    def _write(self, folder: Path) -> None:
        target = folder / self._file_name
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
            "settings": self._resume_settings(),
            "fingerprint": self._fingerprint(),
        }

    def _attach_to_optimizer(self, optimizer: Any) -> dict[str, Any] | None:
        """Save the Stage I state with the Trainer's optimizer; return the state loaded with it.

        Callbacks are not told which folder training resumes from. PyTorch keeps entries of an
        optimizer state that belong to no parameter, so the Trainer saves and loads this entry with
        the others.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        if self._state_dict_hook is not None:
            self._state_dict_hook.remove()
            self._state_dict_hook = None
        if not isinstance(inner, torch.optim.Optimizer):
            return None

        def with_state(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
            return {**saved, "state": {**saved["state"], self._file_name: self._state()}} if self._training else saved

        self._state_dict_hook = inner.register_state_dict_post_hook(with_state)
        return cast(dict[Any, Any], inner.state).pop(self._file_name, None)

    def _round(self, args: TrainingArguments, state: TrainerState, model: nn.Module, record: bool = False, measure: bool = True) -> None:
        """Do `steps` gradient steps; with `measure`, log the loss before and after.

        The round is skipped if no supervised step has followed the last round of this model.
        """
        if self._separated_model is model:
            return
        first_batch: list[dict[str, Any]] = []
        before = 0.0
        bar = logging.tqdm(
            range(self.steps),
            desc="separation",
            disable=args.disable_tqdm or not state.is_local_process_zero or not record,
            leave=record,
        )
        with _evaluating(model), _report_out_of_memory(self.batch_size):
            for inner in bar:
                index = self._steps_done
                with _isolated_rng(_combined_seed(self._seed(args), index, PartialState().process_index), args.device):
                    batch = self._with_noisy_copy(model, send_to_device(self._sample(self._seed(args), index), args.device))
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
            # Because a round that failed must be repeated, only a completed round is recorded.
            self._separated_model = model
            if not measure:
                return
            with torch.no_grad():
                after = self._losses(args, model, first_batch, self._temperature(state, self._steps_done - self.steps))
        self._latest = {"separation_loss_before": before, "separation_loss": _mean_over_processes(after)}
        if record:
            epoch = 0.0 if state.epoch is None else state.epoch
            self._logged_losses = [{**self._latest, "epoch": epoch, "step": state.global_step}]
            state.log_history += self._logged_losses

    def _with_noisy_copy(self, model: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The batch, and for "denoising" also a copy with noise on its main input."""
        if self.kind != "denoising":
            return [batch]
        clean = batch[model.main_input_name]
        clean = clean if clean.is_floating_point() else clean.float()
        return [batch, {**batch, model.main_input_name: clean + self.noise * torch.randn_like(clean)}]

    def _step(self, args: TrainingArguments, model: nn.Module, views: list[dict[str, Any]], temperature: float) -> torch.Tensor:
        """Do one gradient step; return the losses of the layers before the step."""
        with torch.enable_grad():
            losses = self._losses(args, model, views, temperature)
            if not losses.requires_grad:
                raise ValueError(
                    "there is nothing to train: all parameters that the memories' features depend on are frozen (requires_grad=False)"
                )
            # Because other code may freeze a layer during training, we check again in every step.
            moving = [parameter for parameter in self._trained_parameters if parameter.requires_grad]
            found = dict(zip(map(id, moving), torch.autograd.grad(losses.sum(), moving, allow_unused=True), strict=True))
        gradients = [found.get(id(parameter)) for parameter in self._trained_parameters]
        if PartialState().num_processes > 1:
            gradients = [None if g is None else reduce(g, reduction="mean") for g in gradients]
        self._private_optimizer.step(gradients)
        reached = {id(parameter) for parameter, gradient in zip(self._trained_parameters, gradients, strict=True) if gradient is not None}
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
        """What each layer retrieves from, under `pool_memories` and `include_class_token`."""
        options = {"include_class_token": True} if self.include_class_token else {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.parameters == "upstream"):
            sets = [MemorySet(*memory_set) for memory_set in model.memory_sets(**batch, **options)]
        if self.pool_memories:
            sets = [MemorySet(phi, memories.flatten(0, 1), None if mask is None else mask.flatten()) for phi, memories, mask in sets]
        separable = [each for each in sets if each.mask is not None or each.memories.shape[-2] > 1]
        if not separable:
            raise ValueError(
                "there is nothing to separate: a memory set needs at least two memories, and every set has one "
                "(for images, include_class_token=True adds one)"
            )
        return separable

    def _temperature(self, state: TrainerState, index: int) -> float:
        """Temperature of the step with this index."""
        if self.final_temperature is None:
            return self.temperature
        rounds = {"train_begin": 1, "epoch": state.num_train_epochs, "step": state.max_steps}[self.schedule]
        return annealed(self.temperature, self.final_temperature, index, rounds * self.steps)

    def _normalize_rows(self) -> None:
        for phi in self._moved_maps:
            phi.normalize_rows()

    def _seed(self, args: TrainingArguments) -> int:
        return args.seed if self.seed is None else self.seed

    def _resume_settings(self) -> dict[str, str]:
        """Settings that must be equal when training resumes from a checkpoint."""
        return {"schedule": self.schedule, "parameters": self.parameters, "optimizer": self.optimizer, "kind": self.kind}

    def _load(self, args: TrainingArguments, state: TrainerState, had_callback: bool, loaded_state: dict[str, Any] | None) -> bool:
        """Load the Stage I state of the checkpoint to resume from; return whether it has one.

        Args:
            args: Arguments of the Trainer.
            state: State of the Trainer.
            had_callback: Whether the run that wrote the checkpoint had this callback.
            loaded_state: The state that the Trainer loaded with its optimizer, if any.
        """
        given = (self.resume_from, args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None)
        folders = [Path(folder) for folder in given if folder] or [_checkpoint(args, state)]
        path = folders[0] / self._file_name
        if loaded_state is not None and self.resume_from is None:
            path = Path(f"{self._file_name} in optimizer.pt of the checkpoint")
        elif not path.is_file():
            if had_callback:
                raise FileNotFoundError(
                    f"this run had a separation step, but {path} is missing; pass SeparationCallback(resume_from=checkpoint folder)"
                )
            warnings.warn(f"the checkpoint has no {self._file_name}: it predates the separation step, which starts now", stacklevel=2)
            return False
        else:
            loaded_state = torch.load(path, map_location=args.device, weights_only=True)
        saved = cast(dict[str, Any], loaded_state)
        for name, value in self._resume_settings().items():
            written = saved["settings"].get(name, value)
            if written != value:
                raise ValueError(f"{path} was written with {name}={written!r} and cannot be resumed with {name}={value!r}")
        if saved["fingerprint"] != self._fingerprint():
            raise ValueError(
                f"{path} belongs to other weights than the loaded ones; pass SeparationCallback(resume_from=checkpoint folder)"
            )
        self._steps_done, self.history, self._latest = saved["steps_done"], saved["history"], saved["latest"]
        # Because the Trainer starts an interrupted epoch again on a resume (for a stream, whose end
        # is unknown, every epoch), we skip the round that this epoch already had.
        self._mid_epoch = not self._has_length or state.epoch % 1 > 1e-6
        self._private_optimizer.load_state_dict(saved["optimizer"])
        return True

    def _fingerprint(self) -> str:
        """Hash of the parameters that Stage I changes."""
        digest = hashlib.sha256()
        for parameter in self._trained_parameters:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _refuse_sharding(self, args: TrainingArguments) -> None:
        """Raise a `NotImplementedError` if parameters are sharded over processes."""
        unsharded = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
        kind = PartialState().distributed_type
        engine = next((engine for engine in ("fsdp", "deepspeed") if getattr(args, engine, None)), kind.value)
        # Because tensor parallelism shards without telling accelerate, we also check for
        # `placements`, which only a DTensor has.
        if engine != kind.value or kind not in unsharded or any(hasattr(parameter, "placements") for parameter in self._trained_parameters):
            raise NotImplementedError(
                f"SeparationCallback needs parameters that are not sharded, but {engine} shards or copies them; "
                "train with plain data parallelism (DDP)"
            )


def _feature_maps(model: Any, needed: bool) -> list[Any]:
    """The feature maps of a model; a feature map with an adapter is returned inside its adapter.

    The list may be empty only if `needed` is false.
    """
    # Because code loaded from a model folder has its own FeatureMap class, we compare class names.
    # An adapter of PEFT holds the wrapped module as `base_layer`.
    names = [name for name, module in model.named_modules() if type(module).__name__ == "FeatureMap"]
    maps = [model.get_submodule(re.sub(r"(\.base_layer)+$", "", name)) for name in names]
    if not hasattr(model, "memory_sets") or (needed and not maps):
        raise ValueError(
            f"SeparationCallback needs a model with feature maps (use_feature_map=True) and memory_sets; {type(model).__name__} has none"
        )
    if maps and not any(parameter.requires_grad for phi in maps for parameter in phi.parameters()):
        raise ValueError(
            "SeparationCallback needs trainable feature maps, but all of them are frozen (requires_grad=False); "
            "with PEFT, LoraConfig(target_parameters=['feature_map.weight']) adapts them"
        )
    return maps


def _sampler(loader: DataLoader, batch_size: int) -> Callable[[int, int], dict[str, Any]]:
    """Return a function of (seed, index) that makes Stage I batch `index` for this process."""
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset
    collate = loader.collate_fn
    rank, world_size = PartialState().process_index, PartialState().num_processes
    if _is_stream(dataset) and iter(copy.copy(dataset)) is iter(copy.copy(dataset)):
        raise ValueError("the training data set is a stream that can be read only once, but the separation step needs to read it again")
    stream: Iterator[Any] = iter(())
    position = 0

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
                stream = iter(copy.copy(dataset))
                more = list(itertools.islice(stream, batch_size - len(examples)))
                if not more:
                    raise ValueError("the training data set is an empty stream: there is nothing to separate")
                examples += more
            position += 1
        return collate(examples[rank::world_size])

    def from_indices(seed: int, index: int) -> dict[str, Any]:
        """Draw the examples of a batch at random, without repetition as far as possible."""
        generator = torch.Generator().manual_seed(_combined_seed(seed, index))
        size = len(dataset)
        chosen = torch.cat([torch.randperm(size, generator=generator) for _ in range(-(-batch_size // size))])[:batch_size]
        return collate([dataset[i] for i in chosen[rank::world_size].tolist()])

    return from_stream if _is_stream(dataset) else from_indices


def _is_stream(dataset: Any) -> bool:
    """Whether a data set has no length or no index access."""
    return isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and restore the mode of each module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _report_out_of_memory(batch_size: int) -> Iterator[None]:
    """Raise a `MemoryError` if Stage I runs out of memory.

    Otherwise `auto_find_batch_size` would halve the batch of the Trainer, which is not the batch
    that was too large.
    """
    try:
        yield
    except Exception as error:
        if should_reduce_batch_size(error):
            raise MemoryError(f"the separation step ran out of memory with batch_size={batch_size}; use a smaller batch_size") from error
        raise


@contextmanager
def _isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Give Stage I its own random state, so that Stage II draws the same numbers without it."""
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
    """Mean loss over layers and processes."""
    return float((reduce(losses, reduction="mean") if PartialState().num_processes > 1 else losses).mean())


def _combined_seed(*parts: int) -> int:
    """Combine several integers into one seed; neighbouring integers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _state_file_name(state: TrainerState) -> str:
    """Name of the state file of a callback, numbered by its position in the Trainer."""
    before = getattr(state, "_separation_callbacks", 0)
    state._separation_callbacks = before + 1  # type: ignore[attr-defined]
    return f"separation_{before}.pt" if before > 0 else STATE_FILE


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Folder of the checkpoint at the current step."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
