"""SeparationCallback: the separation step (Stage I of U-Hop) inside the stock `Trainer`."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..distributed import mean_over_processes, reshard
from ..separation import Separation, StageOne, check_settings, chosen
from ..zero import has_master, is_partitioned
from .sampler import accepted_names, combined_seed, is_stream, sampler
from .state import attach_to_optimizer, checkpoint, evaluating, isolated_rng, state_file_name, write_state


SCHEDULES = ("train_begin", "epoch", "step")


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
    are the tokens of an image as the feature map of each layer receives them. In a model of
    transformers with an adapter of `UHopAdapterConfig` they are what the key projections read; see
    `memory_sets_of` for the padding and the special tokens that are left out. The gradient uses the
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

    **Many processes.** DDP, FSDP2 and DeepSpeed with ZeRO-1, ZeRO-2 or ZeRO-3 are supported; see
    `StageOne` for the memory that they need. Under FSDP2 and DeepSpeed, only `separation.pt` holds
    the state, as whole tensors that any number of processes can load. FSDP1, tensor parallelism and
    DeepSpeed without ZeRO raise an error. With `pool_memories="global"`, the memories of all
    processes form one set.

    **PEFT.** In a model wrapped by PEFT, Stage I trains what PEFT trains: an adapter of the feature
    map (`LoraConfig(target_parameters=["feature_map.weight"])`), or the feature map itself
    (`modules_to_save=["feature_map"]`), or the feature maps that `UHopAdapterConfig` adds.

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
            means those of `separation`; without it, 100 with "train_begin", otherwise 1.
        separation: How to separate; `None` for `Separation()`. The temperature falls over all
            rounds together.
        dataset: Data set from which Stage I draws, for example of unlabelled images: map-style or a
            stream; `None` means that of the training.
        data_collator: Function from examples of `dataset` to a batch; `None` means that of the
            training.
        seed: Seed of Stage I; `None` means the seed of the Trainer.
        resume_from: Checkpoint folder that holds the Stage I state when training resumes. `None`
            means what the Trainer loads with its optimizer; if the checkpoint has no optimizer or
            is of an earlier version of this package, the folder that the Trainer saves to.
        fields: Fields of `Separation` to change, such as `kind` or `parameters`.

    Raises:
        TypeError: If `separation` is not a `Separation`, or a name in `fields` is not a field.
        ValueError: If an argument is not one of its choices or out of range. When training begins:
            if no selected parameter is trainable; if `project` or `normalize_rows` is set while an
            adapter is trained instead of W; if the data set is a stream that can be read only once;
            if `final_temperature` is used with "epoch" on a stream. On resuming: if the saved state
            belongs to other weights, to another schedule, or to a `Separation` with other fields.
        FileNotFoundError: On resuming, if the Stage I state of a checkpoint is missing.
        MemoryError: If a separation step runs out of memory.
        NotImplementedError: When training begins under FSDP1, tensor parallelism, DeepSpeed without
            ZeRO, or another engine that shards parameters. FSDP2 and ZeRO-1, ZeRO-2 and ZeRO-3 work.
    """

    def __init__(
        self,
        schedule: str = "train_begin",
        steps: int | None = None,
        *,
        separation: Separation | None = None,
        dataset: Any = None,
        data_collator: Callable | None = None,
        seed: int | None = None,
        resume_from: str | os.PathLike | None = None,
        **fields,
    ):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}; a Separation is passed as separation=")
        if steps is None and separation is None:
            steps = 100 if schedule == "train_begin" else 1
        self.separation = chosen(separation, Separation(), **fields, **({} if steps is None else {"steps": steps}))
        if self.separation.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {self.separation.steps}")
        self.schedule = schedule
        self.batch_size = 128 if self.separation.batch_size is None else self.separation.batch_size
        self.dataset = dataset
        self.data_collator = data_collator
        self.seed = seed
        self.resume_from = resume_from
        self.history: list[dict[str, float]] = []
        self._latest: dict[str, float] = {}
        self._separated_model: nn.Module | None = None
        self._training = self._is_sharded = False
        self._state_dict_hook: RemovableHandle | None = None

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, optimizer=None, **kwargs):
        """Prepare Stage I, load its state on a resume, and run the round of "train_begin"."""
        refuse_engines(args, model)
        self._file_name = state_file_name(state)
        if self._state_dict_hook is not None:
            self._state_dict_hook.remove()
        self._is_sharded = reshard(model) or any(map(is_partitioned, model.parameters()))
        # Because accelerate saves FSDP2's optimizer by the names of its parameters, which this entry
        # does not have, the state then has only its own file. DeepSpeed's optimizer takes no hook.
        self._state_dict_hook, loaded_state = attach_to_optimizer(
            None if self._is_sharded else optimizer, self._file_name, lambda: self._state() if self._training else None
        )
        names = accepted_names(model, args.label_names or []) if args.remove_unused_columns else None
        if state.global_step == 0 and self._separated_model is model:
            # Because the supervised step after the last round ran out of memory,
            # `auto_find_batch_size` starts training again; the round is not repeated.
            self._sample = sampler(train_dataloader, self.batch_size, self.dataset, self.data_collator, names)
            state.stateful_callbacks[self._file_name] = {"args": {}, "attributes": {}}
            state.log_history += self._logged_losses
            return
        self._separated_model = None
        world_size = PartialState().num_processes
        if self.batch_size % world_size != 0:
            raise ValueError(f"batch_size must be a multiple of the {world_size} processes, got {self.batch_size}")
        self._sample = sampler(train_dataloader, self.batch_size, self.dataset, self.data_collator, names)
        self._has_length = not is_stream(train_dataloader.dataset)
        if self.separation.final_temperature is not None and self.schedule == "epoch" and not self._has_length:
            raise ValueError("final_temperature with schedule='epoch' needs a known number of epochs, got a stream; use schedule='step'")
        rounds = {"train_begin": 1, "epoch": state.num_train_epochs, "step": state.max_steps}[self.schedule]
        half = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float16
        is_mixed = args.mixed_precision in ("bf16", "fp16")
        self.stage = StageOne(
            model,
            self.separation,
            total_steps=rounds * self.separation.steps,
            autocast=lambda: torch.autocast(args.device.type, dtype=half, enabled=is_mixed),
        )
        self.history, self._latest = [], {}
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
        if not (args.should_save or self._is_sharded):
            return
        content = self._state()
        folder = checkpoint(args, state)
        if args.should_save and not folder.is_dir():
            warnings.warn(f"Stage I's state is not saved: the checkpoint is not in {folder}", stacklevel=2)
        elif args.should_save:
            write_state(folder / self._file_name, content)

    def on_push_begin(self, args, state, control, **kwargs):
        # Because the Trainer uploads a checkpoint before it calls `on_save`, we write the state
        # here. It calls this in one process, which holds only a part of a sharded state.
        """Write the Stage I state before a checkpoint is uploaded; under FSDP2 and ZeRO-3 it is not."""
        folder = checkpoint(args, state)
        if self._training and args.should_save and folder.is_dir() and not self._is_sharded:
            write_state(folder / self._file_name, self._state())

    def _state(self) -> dict[str, Any]:
        """What an exact resume needs."""
        state = self.stage.state_dict()
        return {**state, "settings": {"schedule": self.schedule, **state["settings"]}, "history": self.history, "latest": self._latest}

    def _round(self, args: TrainingArguments, state: TrainerState, model: nn.Module, record: bool = False, measure: bool = True) -> None:
        """Do `steps` gradient steps; with `measure`, log the loss before and after.

        The round is skipped if no supervised step has followed the last round of this model.
        """
        if self._separated_model is model:
            return
        first: tuple[Any, Any, int] | None = None
        before = 0.0
        bar = logging.tqdm(
            range(self.separation.steps),
            desc="separation",
            disable=args.disable_tqdm or not state.is_local_process_zero or not record,
            leave=record,
        )
        seed = args.seed if self.seed is None else self.seed
        with evaluating(model), _report_out_of_memory(self.batch_size):
            for inner in bar:
                index = self.stage.steps_done
                with isolated_rng(combined_seed(seed, index, PartialState().process_index), args.device):
                    batch = send_to_device(self._sample(seed, index), args.device)
                    batch, copies = self.stage.views(batch)
                    losses = self.stage.step(batch, copies)
                if measure:
                    value = mean_over_processes(losses)
                    self.history.append({"step": state.global_step, "inner_step": inner, "separation_loss": value})
                    bar.set_postfix(loss=f"{value:.4f}")
                    if first is None:
                        first, before = (batch, copies, index), value
            self.stage.finish_round()
            # Because a round that failed must be repeated, only a completed round is recorded.
            self._separated_model = model
            if first is None:
                return
            with torch.no_grad():
                after = mean_over_processes(self.stage.losses(*first))
        self._latest = {"separation_loss_before": before, "separation_loss": after}
        if record:
            epoch = 0.0 if state.epoch is None else state.epoch
            self._logged_losses = [{**self._latest, "epoch": epoch, "step": state.global_step}]
            state.log_history += self._logged_losses

    def _load(self, args: TrainingArguments, state: TrainerState, had_callback: bool, loaded_state: dict[str, Any] | None) -> bool:
        """Load the Stage I state of the checkpoint to resume from; return whether it has one.

        Args:
            args: Arguments of the Trainer.
            state: State of the Trainer.
            had_callback: Whether the run that wrote the checkpoint had this callback.
            loaded_state: The state that the Trainer loaded with its optimizer, if any.
        """
        given = (self.resume_from, args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None)
        folders = [Path(folder) for folder in given if folder] or [checkpoint(args, state)]
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
            loaded_state = torch.load(path, map_location="cpu", weights_only=True)
        saved = cast(dict[str, Any], loaded_state)
        check_settings(saved["settings"], {"schedule": self.schedule}, str(path))
        self.stage.load_state_dict(saved, str(path))
        self.history, self._latest = saved["history"], saved["latest"]
        # Because the Trainer starts an interrupted epoch again on a resume (for a stream, whose end
        # is unknown, every epoch), we skip the round that this epoch already had.
        self._mid_epoch = not self._has_length or state.epoch % 1 > 1e-6
        return True


def refuse_engines(args: TrainingArguments, model: nn.Module) -> None:
    """Raise a `NotImplementedError` if an engine other than FSDP or ZeRO shards or copies parameters.

    `StageOne` tells the kinds of FSDP apart. DeepSpeed without ZeRO is refused, because its copies
    in fp32 cannot be reached from the model.
    """
    kinds = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "FSDP")
    kind = PartialState().distributed_type.value
    engine = "DEEPSPEED" if getattr(args, "deepspeed", None) else kind
    if engine not in kinds and not (engine == "DEEPSPEED" and any(map(has_master, model.parameters()))):
        raise NotImplementedError(
            f"the separation step needs whole parameters or those of FSDP2 or DeepSpeed's ZeRO, but {engine} shards or copies them; "
            "use plain data parallelism (DDP), FSDP2 (fsdp_version: 2 of accelerate) or DeepSpeed with zero_optimization.stage 1, 2 or 3"
        )


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
