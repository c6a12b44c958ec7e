"""Tests of SeparationCallback in the Trainer: updated parameters, schedules, logs, resumed runs and
errors."""

import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_uhop import (
    DataCollatorForBags,
    FeatureMap,
    Separation,
    SeparationCallback,
    StageOne,
    UHopMILConfig,
    UHopMILForBagClassification,
    UHopViTForImageClassification,
    denoising_loss,
    separation_loss,
)
from modeling_uhop.trainer.state import STATE_FILE
from tests.conftest import assert_close
from tests.support.training import Images, image_model, image_trainer, map_weights, train


pytestmark = pytest.mark.trains


class Stream(IterableDataset):
    def __iter__(self):
        images = Images(augment=False)
        return (images[i] for i in range(len(images)))


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def algorithm_2(
    schedule: str = "step", steps: int = 1, parameters: str = "feature_maps", kind: str = "squared", **options: Any
) -> SeparationCallback:
    """The callback with the settings of U-Hop Algorithm 2, which the tests change one at a time."""
    return SeparationCallback(schedule, steps, parameters=parameters, kind=kind, **options)


SCHEDULES = [{"schedule": "train_begin", "steps": 4}, {"schedule": "epoch", "steps": 2}, {"schedule": "step"}]
MOVED = ["feature_maps", "upstream"]


@pytest.mark.parametrize("parameters", MOVED)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["schedule"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_with_lr_0_training_is_bitwise_equal_to_training_without_separation(tmp_path, schedule, parameters, optimizer):
    callback = algorithm_2(**schedule, parameters=parameters, optimizer=optimizer, lr=0.0, batch_size=8)
    assert _equal(train(tmp_path), train(tmp_path, callback))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["schedule"])
def test_with_a_learning_rate_separation_changes_training_and_is_deterministic(tmp_path, schedule):
    runs = [train(tmp_path, algorithm_2(**schedule, batch_size=8)) for _ in range(2)]
    assert _equal(*runs)
    assert not _equal(runs[0], train(tmp_path))
    assert not _equal(runs[0], train(tmp_path, algorithm_2(**schedule, batch_size=8, seed=123)))


class Freeze(TrainerCallback):
    """Undoes every supervised step, so that only Stage I changes parameters."""

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["schedule"])
def test_separation_changes_only_the_selected_parameters(tmp_path, schedule):
    before = {name: p.detach().clone() for name, p in image_model().named_parameters()}
    moved = {}
    for parameters in MOVED:
        after = train(tmp_path, algorithm_2(**schedule, parameters=parameters, batch_size=8), Freeze())
        moved[parameters] = {name for name in before if not torch.equal(before[name], after[name])}
    maps = {name for name in before if "feature_map" in name}
    assert moved["feature_maps"] == maps
    above = {name for name in before if name.startswith(("classifier", "vit.layernorm", "vit.layers.1"))} - maps
    above -= {name for name in above if "layernorm_before" in name}
    # A key bias adds the same number to all scores of a query, so outputs and gradients do not
    # depend on it, except by rounding.
    expected = set(before) - above
    assert expected - moved["upstream"] <= {name for name in before if name.endswith(("k_proj.bias", "cls_token"))}
    assert moved["upstream"] <= expected


def test_frozen_parameters_do_not_change(tmp_path):
    model = image_model()
    model.vit.embeddings.requires_grad_(False)
    first_map = model.vit.layers[0].attention.feature_map.weight.requires_grad_(False)
    kept = [p.detach().clone() for p in (*model.vit.embeddings.parameters(), first_map)]
    train(tmp_path, algorithm_2("train_begin", steps=2, parameters="upstream", batch_size=8), model=model)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*model.vit.embeddings.parameters(), first_map), strict=True))


@pytest.mark.parametrize("kind", ["average", "squared", "nearest", "per_memory"])
@pytest.mark.parametrize("class_token", [False, True])
def test_one_step_is_sgd_on_the_summed_losses_of_the_layers(tmp_path, kind, class_token):
    dataset = Images(size=8, augment=False)
    model = image_model(num_hidden_layers=2).eval()
    weights = [layer.attention.feature_map.weight for layer in model.vit.layers]
    memories = [s.memories.detach() for s in model.memory_sets(dataset.images, include_class_token=class_token)]
    losses = [separation_loss(m @ w.mT, kind=kind, temperature=0.4) for m, w in zip(memories, weights, strict=True)]
    expected = [w - 0.3 * g for w, g in zip(weights, torch.autograd.grad(sum(losses), weights), strict=True)]
    callback = algorithm_2("train_begin", kind=kind, temperature=0.4, lr=0.3, batch_size=8, include_class_token=class_token)
    after = train(tmp_path, callback, Freeze(), model=model, dataset=dataset)
    for i, weight in enumerate(expected):
        assert_close(after[f"vit.layers.{i}.attention.feature_map.weight"], weight)
    assert callback.history[0]["separation_loss"] == pytest.approx(sum(losses).item() / 2, abs=1e-5)


def test_without_phi_the_memories_themselves_are_separated(tmp_path):
    dataset = Images(size=8, augment=False)
    model = image_model(use_feature_map=False).eval()
    loss = sum(separation_loss(s.memories, kind="average") for s in model.memory_sets(dataset.images))
    named = dict(model.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
    expected = {name: p if (g := gradients[name]) is None else p - 0.3 * g for name, p in named.items()}
    expected = {name: value.detach().clone() for name, value in expected.items()}
    callback = algorithm_2("train_begin", parameters="upstream", kind="average", lr=0.3, batch_size=8)
    after = train(tmp_path, callback, Freeze(), model=model, dataset=dataset)
    for name, value in expected.items():
        assert_close(after[name], value)
    assert callback.history[0]["separation_loss"] == pytest.approx(loss.item() / 2, abs=1e-5)


def test_denoising_loss_separates_memories_from_noisy_copies(tmp_path, monkeypatch):
    model, seen = image_model(), []
    memory_sets = model.memory_sets

    def watched(pixel_values, **kwargs):
        sets = list(memory_sets(pixel_values, **kwargs))
        seen.append((pixel_values, [s.features().detach() for s in sets]))
        return sets

    monkeypatch.setattr(model, "memory_sets", watched)
    callback = algorithm_2("train_begin", steps=4, kind="denoising", temperature=0.2, noise=0.7, lr=0.0, batch_size=40)
    train(tmp_path, callback, model=model, dataset=Images(size=40, augment=False))
    (clean, features), (noisy, copies) = seen[:2]
    assert (noisy - clean).std().item() == pytest.approx(0.7, rel=0.05)
    losses = [denoising_loss(c, f, temperature=0.2).item() for c, f in zip(copies, features, strict=True)]
    assert callback.history[0]["separation_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    # Every step has new noise; the loss after the last step uses the noise of the first.
    assert not torch.equal(seen[3][0] - seen[2][0], noisy - clean)
    assert torch.equal(seen[-1][0], noisy)


def test_denoising_bags_ignores_their_padding():
    model = UHopMILForBagClassification(UHopMILConfig(instance_dim=5, hidden_size=8, num_attention_heads=2)).eval()
    batch = DataCollatorForBags()([{"instances": torch.randn(size, 5), "label": size % 2} for size in (1, 4, 2)])
    (stored,) = model.memory_sets(**batch)
    noisy = {**batch, "instances": batch["instances"] + 0.1}
    (copies,) = model.memory_sets(**noisy)
    each = [denoising_loss(copies.features()[i, :size], stored.features()[i, :size]) * size for i, size in ((0, 1), (1, 4), (2, 2))]
    stage = StageOne(model, Separation.denoising())
    assert_close(stage.losses(batch, noisy, 0), (sum(each) / 7).unsqueeze(0))


def test_no_gradient_remains_and_training_modes_are_restored(tmp_path):
    class Watch(TrainerCallback):
        seen = 0

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            assert all(p.grad is None for p in model.parameters())
            if state.global_step > 0:
                assert model.training
                assert not model.vit.layernorm.training
            model.vit.layernorm.eval()
            type(self).seen += 1

        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.train()
            model.vit.layernorm.eval()

    train(tmp_path, algorithm_2(parameters="upstream", batch_size=8), Watch())
    assert Watch.seen == 12


@pytest.mark.parametrize(
    ("schedule", "entries", "steps"),
    [
        ({"schedule": "train_begin", "steps": 4}, [0], 4),
        ({"schedule": "epoch", "steps": 2}, [0, 6], 4),
        ({"schedule": "step"}, [3, 6, 9, 12], 12),
    ],
    ids=lambda value: value.get("schedule") if isinstance(value, dict) else None,
)
def test_the_loss_before_and_after_is_logged(tmp_path, schedule, entries, steps):
    callback = algorithm_2(**schedule, batch_size=16, lr=0.5)
    trainer = image_trainer(tmp_path, callback)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "separation_loss" in entry]
    assert [entry["step"] for entry in logged] == entries
    assert all(entry["separation_loss"] < entry["separation_loss_before"] for entry in logged)
    assert callback.stage.steps_done == steps
    assert logged[0]["separation_loss_before"] <= 0


def test_annealing_covers_all_rounds(tmp_path, monkeypatch):
    seen: list[float] = []

    def recorded(features, *, temperature, **options):
        # The loss after a round is measured without gradients; each step has two layers.
        if features.requires_grad:
            seen.append(temperature)
        return separation_loss(features, temperature=temperature, **options)

    monkeypatch.setattr("modeling_uhop.separation.separation_loss", recorded)
    for schedule, total in (
        ({"schedule": "train_begin", "steps": 4}, 4),
        ({"schedule": "epoch", "steps": 2}, 4),
        ({"schedule": "step"}, 12),
    ):
        seen.clear()
        train(tmp_path, algorithm_2(**schedule, temperature=0.8, final_temperature=0.1, batch_size=8))
        assert seen[::2] == seen[1::2] == pytest.approx([0.8 * (0.1 / 0.8) ** (i / (total - 1)) for i in range(total)])


@pytest.mark.parametrize("option", ["project", "normalize_rows"])
def test_rows_of_w_can_be_normalised(tmp_path, option):
    callback = algorithm_2("train_begin", steps=3, batch_size=8, **{option: True})
    after = train(tmp_path, callback, Freeze())
    rows = [after[name].norm(dim=-1) for name in after if "feature_map" in name]
    assert_close(torch.stack(rows), torch.ones(2, 16))
    free = train(tmp_path, algorithm_2("train_begin", steps=3, batch_size=8), Freeze())
    assert not torch.allclose(free["vit.layers.0.attention.feature_map.weight"].norm(dim=-1), torch.ones(16), atol=1e-4)


def test_with_gradient_accumulation_there_is_one_round_per_optimizer_step(tmp_path):
    callback = algorithm_2(batch_size=8, lr=0.0)
    accumulated = train(tmp_path, callback, gradient_accumulation_steps=3)
    assert callback.stage.steps_done == 4
    assert _equal(accumulated, train(tmp_path, gradient_accumulation_steps=3))


def test_bf16_training(tmp_path):
    schedule = {"schedule": "train_begin", "steps": 5, "batch_size": 16, "lr": 0.5}
    full, half = algorithm_2(**schedule), algorithm_2(**schedule)
    train(tmp_path, full)
    train(tmp_path, half, bf16=True)
    losses = [[entry["separation_loss"] for entry in callback.history] for callback in (full, half)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 1e-3), ("adam", 1e-4)])
def test_half_precision_weights_change_as_much_as_fp32_weights(tmp_path, dtype, optimizer, lr):
    moved = []
    for kind in (torch.float32, dtype):
        model = image_model().to(kind)
        before = map_weights(model)
        callback = SeparationCallback(steps=60, parameters="feature_maps", optimizer=optimizer, lr=lr, batch_size=16)
        train(tmp_path, callback, Freeze(), model=model, max_steps=1, dataset=Images(augment=False), optim="sgd")
        after = map_weights(model)
        moved.append(torch.stack([(new - old).norm() for new, old in zip(after, before, strict=True)]))
    assert_close(moved[1] / moved[0], torch.ones(2), dtype=torch.bfloat16, scale=5)


def test_a_resume_of_two_callbacks_and_half_precision(tmp_path):
    """Each callback has its own file, with fp32 copies of the parameters it updates."""

    def callbacks():
        often = SeparationCallback(schedule="step", steps=2, kind="nearest", parameters="feature_maps", batch_size=8, lr=1e-3)
        return SeparationCallback(steps=3, batch_size=8, optimizer="adam", lr=1e-4), often

    def model():
        return image_model().bfloat16()

    arguments = {"save_strategy": "steps", "save_steps": 4, "dataset": Images(augment=False)}
    whole = train(tmp_path / "whole", *callbacks(), model=model(), **arguments)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert {path.name for path in checkpoint.glob("separation*")} == {STATE_FILE, "separation_1.pt"}
    resumed = train(tmp_path / "whole", *callbacks(), model=model(), resume=str(checkpoint), **arguments)
    assert _equal(whole, resumed)
    with pytest.raises(ValueError, match="cannot be resumed"):
        train(tmp_path / "whole", *reversed(callbacks()), model=model(), resume=str(checkpoint), **arguments)


@pytest.mark.parametrize("schedule", ["epoch", "step"])
def test_a_layer_can_be_frozen_during_training(tmp_path, schedule):
    class FreezeLater(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            if state.epoch >= 1:
                model.vit.embeddings.requires_grad_(False)
                self.frozen = [x.detach().clone() for x in model.vit.embeddings.parameters()]
                self.moving = map_weights(model)

    freeze = FreezeLater()
    model = image_model()
    train(tmp_path, freeze, SeparationCallback(schedule, batch_size=8), Freeze(), model=model)
    assert all(torch.equal(x, y) for x, y in zip(freeze.frozen, model.vit.embeddings.parameters(), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(freeze.moving, map_weights(model), strict=True))


def test_a_checkpoint_is_complete_before_it_is_pushed_and_unchanged_after_training(tmp_path, monkeypatch):
    pushed = []

    def upload_folder(folder_path, **settings):
        pushed.append((Path(folder_path).name, (Path(folder_path) / STATE_FILE).is_file()))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer, token=None: None)
    arguments = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_strategy": "all_checkpoints"}
    trainer = image_trainer(tmp_path, SeparationCallback(steps=1, batch_size=8), max_steps=2, **arguments)
    for name, value in (("hub_model_id", "me/model"), ("push_in_progress", None)):
        monkeypatch.setattr(trainer, name, value, raising=False)
    trainer.train()
    assert ("checkpoint-1", True) in pushed
    assert ("checkpoint-1", False) not in pushed

    state = tmp_path / "checkpoint-2" / STATE_FILE
    before = state.read_bytes()
    with torch.no_grad():
        trainer.model.classifier.weight.zero_()
        next(module for module in trainer.model.modules() if isinstance(module, FeatureMap)).weight.zero_()
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert state.read_bytes() == before


def test_a_stream_that_can_be_read_only_once_is_refused(tmp_path):
    class Once(IterableDataset):
        def __init__(self):
            self.examples = iter(Stream())

        def __iter__(self):
            return self.examples

    with pytest.raises(ValueError, match="read only once"):
        train(tmp_path, SeparationCallback(batch_size=8), dataset=Once(), max_steps=2)


def test_integer_inputs_can_be_denoised(tmp_path):
    class Bytes(Images):
        def __getitem__(self, index):
            return {"pixel_values": (40.0 * self.images[index]).clamp(0, 255).to(torch.uint8), "labels": self.labels[index]}

    callback = SeparationCallback(steps=2, kind="denoising", batch_size=8)
    train(tmp_path, callback, dataset=Bytes(), max_steps=1)
    assert all(np.isfinite(entry["separation_loss"]) for entry in callback.history)


def test_a_streamed_data_set_is_read_in_order_and_repeatedly(tmp_path):
    callback = algorithm_2(batch_size=16)
    train(tmp_path, callback, dataset=Stream(), max_steps=5)
    assert callback.stage.steps_done == 5
    images = Images(augment=False).images
    for index in (0, 1, 4, 2):
        start = 16 * index % 48
        assert torch.equal(callback._sample(0, index)["pixel_values"], images[start : start + 16])


def test_a_data_set_can_be_smaller_than_the_batch(tmp_path):
    callback = algorithm_2("train_begin", batch_size=64, steps=2)
    train(tmp_path, callback, dataset=Images(size=10))
    assert len(callback.history) == 2


def test_a_stream_has_an_epoch_each_time_it_is_read(tmp_path):
    callback = algorithm_2("epoch", steps=1, batch_size=8)
    train(tmp_path, callback, dataset=Stream(), max_steps=18)
    assert [entry["step"] for entry in callback.history] == [0, 6, 12]
    with pytest.raises(ValueError, match="needs a known number of epochs, got a stream"):
        train(tmp_path, algorithm_2("epoch", final_temperature=0.1), dataset=Stream(), max_steps=6)


class Counting(IterableDataset):
    """A stream with a length that is shuffled again each time it is read."""

    def __init__(self):
        self.readings = 0

    def __len__(self):
        return 48

    def __iter__(self):
        self.readings += 1
        images = Images(augment=False)
        order = torch.randperm(48, generator=torch.Generator().manual_seed(self.readings)).tolist()
        return (images[i] for i in order)


class Empty(IterableDataset):
    def __iter__(self):
        return iter(())


def test_separation_does_not_change_the_state_of_a_stream(tmp_path):
    expected = train(tmp_path, dataset=Counting(), max_steps=12)
    assert _equal(expected, train(tmp_path, algorithm_2(lr=0.0, batch_size=16), dataset=Counting(), max_steps=12))


def test_an_empty_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty stream"):
        train(tmp_path, algorithm_2("train_begin"), dataset=Empty(), max_steps=2)


def test_only_measured_losses_are_logged(tmp_path):
    trainer = image_trainer(tmp_path, algorithm_2(batch_size=8, lr=0.5), logging_strategy="epoch", logging_steps=500)
    trainer.train()
    logged = [entry["separation_loss"] for entry in trainer.state.log_history if "separation_loss" in entry]
    assert len(set(logged)) == 2


@pytest.mark.parametrize("option", ["project", "normalize_rows"])
def test_a_frozen_feature_map_keeps_its_rows(tmp_path, option):
    model = image_model()
    weight = model.vit.layers[0].attention.feature_map.weight.requires_grad_(False)
    weight.mul_(3.0)
    kept = weight.clone()
    train(tmp_path, algorithm_2("train_begin", batch_size=8, **{option: True}), model=model)
    assert torch.equal(weight, kept)


def test_only_one_process_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "should_save", property(lambda self: False))
    callback = algorithm_2(batch_size=8)
    trainer = image_trainer(tmp_path, callback)
    trainer.train()
    (tmp_path / "checkpoint-12").mkdir()
    callback.on_save(trainer.args, trainer.state, trainer.control)
    assert list((tmp_path / "checkpoint-12").iterdir()) == []


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stop", [4, 6])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["schedule"])
def test_a_resume_reproduces_the_uninterrupted_run(tmp_path, schedule, stop, optimizer):
    def callback() -> SeparationCallback:
        return algorithm_2(**schedule, optimizer=optimizer, lr=0.01, batch_size=8, parameters="upstream", final_temperature=0.1)

    # Because the Trainer itself reads the first batch after a resume within an epoch with another
    # random state, there is no augmentation in that case.
    images = Images(augment=stop == 6)
    whole = callback()
    expected = train(tmp_path, whole, dataset=images, save_strategy="steps", save_steps=stop)
    resumed = callback()
    actual = train(tmp_path, resumed, dataset=images, save_strategy="no", resume=str(tmp_path / f"checkpoint-{stop}"))
    assert _equal(expected, actual)
    assert resumed.history == whole.history
    assert resumed.stage.steps_done == whole.stage.steps_done
    assert resumed._latest == whole._latest


def test_a_resume_in_the_same_process_repeats_the_failed_round(tmp_path):
    settings = {"dataset": Images(augment=False), "save_strategy": "steps", "save_steps": 4}
    expected = train(tmp_path / "whole", algorithm_2(batch_size=8), **settings)
    trainer = image_trainer(tmp_path / "broken", algorithm_2(batch_size=8), **settings)
    calls = 0

    def fail_once(module, args, kwargs):
        nonlocal calls
        calls += module.training
        if calls == 6 and module.training:
            raise RuntimeError("no luck")

    trainer.model.register_forward_pre_hook(fail_once, with_kwargs=True)
    with pytest.raises(RuntimeError, match="no luck"):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert _equal(expected, dict(trainer.model.named_parameters()))


def test_a_failed_round_is_not_counted_as_done(tmp_path, monkeypatch):
    callback = algorithm_2("train_begin", steps=4, batch_size=8)
    step, calls = StageOne.step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(StageOne, "step", interrupted)
    trainer = image_trainer(tmp_path, callback, dataset=Images(augment=False))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert len(callback.history) == 4
    assert len(calls) == 2 + 4


@pytest.mark.parametrize("schedule", ["train_begin", "step"])
def test_an_out_of_memory_error_names_the_separation_step(tmp_path, monkeypatch, schedule):
    def exhausted(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    callback = algorithm_2(schedule, batch_size=8)
    monkeypatch.setattr(StageOne, "step", exhausted)
    with pytest.raises(MemoryError, match="the separation step ran out of memory with batch_size=8"):
        train(tmp_path, callback, auto_find_batch_size=True)


def test_a_frozen_backbone_without_phi_is_refused(tmp_path):
    model = image_model(use_feature_map=False)
    model.vit.requires_grad_(False)
    with pytest.raises(ValueError, match="all parameters that the memories' features depend on are frozen"):
        train(tmp_path, algorithm_2(parameters="upstream"), model=model)


@pytest.mark.parametrize("kind", ["sgd", "adam", "two of them"])
def test_a_run_can_resume_from_a_checkpoint_in_another_folder(tmp_path, kind):
    schedule = {"schedule": "step", "optimizer": "sgd" if kind == "sgd" else "adam", "lr": 0.01, "batch_size": 8}

    def callbacks(**options):
        more = [SeparationCallback(steps=2, batch_size=8)] if kind == "two of them" else []
        return [algorithm_2(**schedule, **options), *more]

    images = Images(augment=False)
    # Because the content of a checkpoint must not be inferred from the log, nothing is logged
    # before it.
    saving = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 500}
    expected = train(tmp_path / "first", *callbacks(), dataset=images, **saving)
    moved = tmp_path / "elsewhere" / "best"
    shutil.copytree(tmp_path / "first" / "checkpoint-4", moved)
    for path in moved.glob("separation*"):
        path.unlink()
    # A folder with the same number has the state of another run.
    stale = tmp_path / "second" / "checkpoint-4"
    shutil.copytree(tmp_path / "first" / "checkpoint-8", stale)
    assert _equal(expected, train(tmp_path / "second", *callbacks(), dataset=images, resume=str(moved)))
    assert _equal(expected, train(tmp_path / "first", *callbacks(), dataset=images, resume=True, **saving))
    if kind == "sgd":
        with pytest.raises(ValueError, match="was written with optimizer='sgd' and cannot be resumed with optimizer='adam'"):
            train(tmp_path / "second", algorithm_2(**{**schedule, "optimizer": "adam"}), resume=str(moved))


def test_a_run_can_resume_without_the_callback(tmp_path):
    images = Images(augment=False)
    train(tmp_path, algorithm_2(batch_size=8, optimizer="adam"), dataset=images, save_strategy="steps", save_steps=4)
    trainer = image_trainer(tmp_path / "plain", dataset=images)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 12


@pytest.mark.parametrize("save_only_model", [True, False])
def test_a_run_can_resume_from_a_checkpoint_with_its_state_in_a_file_only(tmp_path, save_only_model):
    schedule = {"schedule": "step", "optimizer": "adam", "lr": 0.01, "batch_size": 8}
    images = Images(augment=False)
    saving = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 500, "save_only_model": save_only_model}
    expected = train(tmp_path / "first", algorithm_2(**schedule), dataset=images, **saving)
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "first" / "checkpoint-4", moved)
    if not save_only_model:
        optimizer = torch.load(moved / "optimizer.pt", weights_only=True)
        del optimizer["state"][STATE_FILE]
        torch.save(optimizer, moved / "optimizer.pt")
    with pytest.raises(FileNotFoundError, match="resume_from=checkpoint folder"):
        train(tmp_path / "second", algorithm_2(**schedule), resume=str(moved))
    with pytest.raises(ValueError, match="was written with optimizer='adam' and cannot be resumed with optimizer='sgd'"):
        train(tmp_path / "second", algorithm_2(**{**schedule, "optimizer": "sgd"}, resume_from=moved), resume=str(moved))
    resumed = algorithm_2(**schedule, resume_from=moved)
    actual = train(tmp_path / "second", resumed, dataset=images, resume=str(moved))
    assert resumed.stage.steps_done == 12
    # Without its optimizer state, the Trainer itself does not resume exactly.
    assert _equal(expected, actual) or save_only_model
    other = tmp_path / "first" / "checkpoint-8"
    with pytest.raises(ValueError, match="belongs to other weights"):
        train(tmp_path / "third", algorithm_2(**schedule, resume_from=other), resume=str(moved))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["schedule"])
def test_a_run_can_resume_from_a_checkpoint_without_separation_state(tmp_path, schedule):
    images = Images(augment=False)
    train(tmp_path, dataset=images, save_strategy="steps", save_steps=3)
    checkpoint = str(tmp_path / "checkpoint-6")
    runs = []
    for _ in range(2):
        callback = algorithm_2(**schedule, batch_size=8)
        with pytest.warns(UserWarning, match="predates the separation step"):
            weights = train(tmp_path / "out", callback, dataset=images, resume=checkpoint, save_strategy="steps", save_steps=3)
        runs.append(weights)
    assert _equal(*runs)
    assert (tmp_path / "out" / "checkpoint-9" / STATE_FILE).is_file()
    checkpoint = str(tmp_path / "out" / "checkpoint-9")
    again = train(tmp_path / "out", algorithm_2(**schedule, batch_size=8), dataset=images, resume=checkpoint)
    assert _equal(runs[0], again)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["schedule"])
def test_a_step_that_runs_out_of_memory_is_tried_with_fewer_examples_and_without_another_round(tmp_path, schedule):
    def crowded(module, args, kwargs):
        if module.training and len(kwargs["pixel_values"]) > 4:
            raise RuntimeError("CUDA out of memory.")

    settings = {"dataset": Images(augment=False), "train_sampling_strategy": "sequential"}
    callbacks, weights = [], []
    for size in (4, 5):
        model = image_model(hidden_dropout_prob=0.0)
        model.register_forward_pre_hook(crowded, with_kwargs=True)
        callbacks.append(algorithm_2(**schedule, lr=0.3, batch_size=8))
        options = {"per_device_train_batch_size": size, "auto_find_batch_size": size == 5}
        weights.append(train(tmp_path, callbacks[-1], model=model, **settings, **options))
    assert _equal(*weights)
    assert callbacks[0].history == callbacks[1].history


def test_a_model_without_phi_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_feature_map=True"):
        train(tmp_path, algorithm_2(), model=image_model(use_feature_map=False))
    with pytest.raises(ValueError, match="use_feature_map=True"):
        train(tmp_path, algorithm_2(parameters="upstream", project=True), model=image_model(use_feature_map=False))
    with pytest.raises(ValueError, match="Linear has none"):
        train(tmp_path, algorithm_2(parameters="upstream"), model=nn.Linear(2, 2))
    frozen = image_model()
    for layer in frozen.vit.layers:
        layer.attention.feature_map.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        train(tmp_path, algorithm_2(), model=frozen)


def test_a_single_memory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs at least two memories, and every set has fewer"):
        train(tmp_path, algorithm_2(), model=image_model(patch_size=8))
    train(tmp_path, algorithm_2(include_class_token=True, batch_size=8), model=image_model(patch_size=8))


def test_seeds_sample_independent_batches(tmp_path):
    batches = {}
    for seed in (0, 1):
        callback = algorithm_2("train_begin", batch_size=8, seed=seed)
        train(tmp_path, callback, dataset=Images(augment=False))
        batches[seed] = [callback._sample(seed, index)["pixel_values"] for index in range(4)]
    drawn = torch.stack(batches[0] + batches[1])
    assert len(torch.unique(drawn.flatten(1), dim=0)) == 8


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_sharded_parameters_are_refused(tmp_path, monkeypatch, kind):
    trainer = image_trainer(tmp_path, algorithm_2())
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind)
    _assert_refused(trainer, rf"but {kind.value} shards")


def test_deepspeed_is_refused_where_it_manages_no_parameter(tmp_path):
    trainer = image_trainer(tmp_path, algorithm_2())
    trainer.args.deepspeed = "zero2.json"
    _assert_refused(trainer, r"but DEEPSPEED shards .* use plain data parallelism \(DDP\), FSDP2 .* or DeepSpeed with zero_optimization")


def test_fsdp_1_is_refused_by_name(tmp_path, monkeypatch):
    class FullyShardedDataParallel(UHopViTForImageClassification):
        pass

    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    _assert_refused(
        image_trainer(tmp_path, algorithm_2(), model=FullyShardedDataParallel(image_model().config)),
        r"but FSDP1 \(FullyShardedDataParallel\)",
    )


def _assert_refused(trainer: Trainer, message: str) -> None:
    callback = trainer.callback_handler.callbacks[1]
    assert isinstance(callback, SeparationCallback)
    with pytest.raises(NotImplementedError, match=message):
        callback.on_train_begin(
            trainer.args, trainer.state, trainer.control, model=trainer.model, train_dataloader=trainer.get_train_dataloader()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "always"}, "schedule must be one of .*'train_begin', 'epoch', 'step'.* got 'always'"),
        ({"parameters": "all"}, "parameters must be one of .* got 'all'"),
        ({"kind": "max"}, "kind must be one of .* got 'max'"),
        ({"optimizer": "lion"}, "optimizer must be one of .* got 'lion'"),
        ({"pool_memories": "all"}, r"pool_memories must be one of \(False, True, 'global'\), got 'all'"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, or None, got 0"),
        ({"steps": 1.5}, "steps must be an integer of at least 0, got 1.5"),
        ({"steps": 5.0}, "steps must be an integer of at least 0, got 5.0"),
        ({"temperature": 0.0}, "temperature must be a positive, finite number, got 0.0"),
        ({"final_temperature": -1.0}, "final_temperature must be positive and at most 0.25, or None, got -1.0"),
        ({"noise": 0.0}, "noise must be a positive, finite number, got 0.0"),
        ({"lr": -0.1}, "lr must be a finite number of at least 0, got -0.1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        algorithm_2(**arguments)


@pytest.mark.parametrize(("schedule", "steps"), [("train_begin", 100), ("epoch", 1), ("step", 1)])
def test_the_default_number_of_steps_is_larger_for_a_single_round(schedule, steps):
    assert SeparationCallback(schedule).separation.steps == steps
    assert SeparationCallback(schedule, steps=7).separation.steps == 7


def test_by_default_all_upstream_parameters_are_updated_once_before_training(tmp_path):
    def run(callback):
        model = image_model(hidden_dropout_prob=0.0)
        return train(tmp_path, callback, model=model, dataset=Images(augment=False), learning_rate=0.0, num_train_epochs=1)

    plain = SeparationCallback(batch_size=16)
    before = {name: parameter.detach().clone() for name, parameter in image_model().named_parameters()}
    after = run(plain)
    assert _equal(after, run(SeparationCallback("train_begin", 100, parameters="upstream", kind="average", batch_size=16)))
    assert len(plain.history) == 100
    assert plain.history[0]["separation_loss"] > plain.history[-1]["separation_loss"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"vit.embeddings.patch_embeddings.projection.weight", "vit.layers.0.attention.feature_map.weight"} <= moved
    assert not [name for name in moved if name.startswith("classifier")]


@pytest.mark.parametrize("pool_memories", [True, False, "global"])
def test_pooled_memories_are_one_set(tmp_path, pool_memories):
    torch.manual_seed(0)
    model = UHopMILForBagClassification(UHopMILConfig(instance_dim=5, hidden_size=8, num_attention_heads=2))
    bags = [{"instances": torch.randn(size, 5), "label": size % 2} for size in (1, 4, 2, 6)]
    collate = DataCollatorForBags()
    separation = algorithm_2("train_begin", kind="average", pool_memories=pool_memories, batch_size=4)
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=1, report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False
    )
    (expected_set,) = model.eval().memory_sets(**collate(bags))
    features = expected_set.features().detach()
    if pool_memories:
        expected = separation_loss(features[expected_set.mask])
    else:
        expected = torch.stack([separation_loss(features[i, :size]) for i, size in ((1, 4), (2, 2), (3, 6))]).mean()
    Trainer(model, arguments, collate, bags, callbacks=[separation]).train()
    assert separation.history[0]["separation_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_can_be_evaluated_before_training(tmp_path):
    trainer = image_trainer(tmp_path, SeparationCallback())
    assert trainer.evaluate(Images(8))["eval_loss"] > 0
