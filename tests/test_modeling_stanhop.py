"""Tests of STanHop models: configuration, values against loops, scaling, masks, losses, Stage I,
saving and loading, errors."""

import dataclasses
import re

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForTimeSeriesPrediction, PreTrainedConfig, Trainer, TrainingArguments

from modeling_uhop import SeparationCallback, STanHopConfig, STanHopForPrediction, STanHopModel
from modeling_uhop.modeling_stanhop import STanHopBlock, STanHopCoarseGraining
from modeling_uhop.series_window import location_and_scale
from tests import reference
from tests.conftest import assert_close


SMALL = {
    "num_input_channels": 3,
    "context_length": 20,
    "prediction_length": 10,
    "patch_length": 4,
    "num_hidden_layers": 2,
    "num_prototypes": 4,
    "d_model": 8,
    "num_attention_heads": 2,
    "ffn_dim": 12,
    "init_std": 1.0,
}

CHANGES = {
    "num_input_channels": 4,
    "context_length": 24,
    "prediction_length": 13,
    "patch_length": 5,
    "num_hidden_layers": 3,
    "merge_window": 3,
    "num_prototypes": 5,
    "d_model": 16,
    "num_attention_heads": 4,
    "ffn_dim": 16,
    "activation_function": "relu",
    "attention_dropout": 0.5,
    "ff_dropout": 0.5,
    "norm_eps": 1.0,
    "init_std": 0.1,
    "position_init_std": 0.1,
    "scaling": "mean",
    "minimum_scale": 100.0,
    "use_linear_skip": True,
    "cycle_length": 7,
    "memory_type": "tune",
    "loss": "mae",
    "qkv_bias": False,
    "alpha": 1.2,
    "learnable_alpha": False,
    "learnable_beta": True,
    "beta": 4.0,
    "use_feature_map": False,
    "feature_dim": 11,
    "feature_init": "normal",
    "update_steps": 2,
    "value_source": "memory",
}


def _model(**fields) -> STanHopForPrediction:
    return STanHopForPrediction(STanHopConfig(**{**SMALL, **fields})).eval()


def _windows(batch=2, length=20, channels=3, dtype=torch.float32) -> torch.Tensor:
    return 3.0 + 2.0 * torch.randn(batch, length, channels, dtype=dtype).cumsum(1)


def _observed(config: STanHopConfig) -> tuple[int, torch.Tensor, float]:
    """Parameter count, forecast and loss of a seeded model in training mode, so that dropout has an
    effect too."""
    torch.manual_seed(0)
    model = STanHopForPrediction(config).train()
    generator = torch.Generator().manual_seed(1)
    past = torch.randn(2, config.context_length, config.num_input_channels, generator=generator)
    future = torch.randn(2, config.prediction_length, config.num_input_channels, generator=generator)
    torch.manual_seed(2)
    outputs = model(past, future_values=future, cycle_index=None if config.cycle_length is None else torch.tensor([0, 3]))
    return model.num_parameters(), outputs.prediction_outputs, outputs.loss.item()


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_model(field):
    # With values that are not W_V W_K Y, the feature map may have another width.
    base = {**SMALL, "value_source": "memory"} if field == "feature_dim" else SMALL
    parameters, forecast, loss = _observed(STanHopConfig(**base))
    changed_parameters, changed_forecast, changed_loss = _observed(STanHopConfig(**{**base, field: CHANGES[field]}))
    same = forecast.shape == changed_forecast.shape and torch.allclose(forecast, changed_forecast, atol=1e-6)
    assert parameters != changed_parameters or not same or loss != changed_loss


def test_every_field_is_in_the_table_above():
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    # The tests of the memory, and those of tables in test_series_frame.py, change these fields.
    elsewhere = {"num_memories", "memory_beta", "memory_alpha"} | {"channel_names", "mean", "std", "frequency"}
    assert {field.name for field in dataclasses.fields(STanHopConfig)} - inherited == set(CHANGES) | elsewhere


def test_round_trip(tmp_path):
    config = STanHopConfig(**{**SMALL, **CHANGES, "learnable_alpha": True, "use_feature_map": True, "memory_type": None})
    config.save_pretrained(tmp_path)
    for loaded in (STanHopConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is STanHopConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert (config.hidden_size, config.attention_probs_dropout_prob) == (16, 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.0}, "strictly between 1 and 2, got alpha=1.0"),
        ({"context_length": 0}, "context_length must be at least 1, got 0"),
        ({"merge_window": 1}, "merge_window must be at least 2 if num_hidden_layers is above 1, got 1"),
        ({"num_memories": -1}, "num_memories must be at least 0, got -1"),
        ({"memory_beta": 0.0}, "memory_beta must be positive and finite, got 0.0"),
        ({"memory_alpha": 2.5}, r"memory_alpha must lie in \[1, 2\], got 2.5"),
        ({"minimum_scale": 0.0}, "minimum_scale must be positive, got 0.0"),
        ({"ff_dropout": 1.0}, r"ff_dropout must lie in \[0, 1\), got 1.0"),
        ({"activation_function": "gelo"}, "activation_function must be one of .* got 'gelo'"),
        ({"feature_dim": 24}, "must equal hidden_size 8, got 24"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        STanHopConfig(**{**SMALL, **fields})


@pytest.mark.parametrize(("field", "value"), [("scaling", "max"), ("loss", "nll"), ("value_source", "keys")])
def test_unknown_choices_are_refused(field, value):
    with pytest.raises(Exception, match=rf"(?s){field}.*{value}"):
        STanHopConfig(**{**SMALL, field: value})


def _linears(attention):
    layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in layers]


def _retrieval(module, states, memories):
    """LN(LN(X + GSH(X, Y)) + MLP(...)) by loops."""
    attention = module.attention
    found = reference.attend(states, memories, _linears(attention), 2, 4**-0.5, 1.5, attention.feature_map.weight.detach().numpy())
    norms = [(norm.weight.tolist(), norm.bias.tolist()) for norm in (module.layernorm_retrieved, module.layernorm_mlp)]
    outputs = []
    for state, retrieved in zip(states, found, strict=True):
        state = reference.layer_norm(state + retrieved, norms[0], 1e-5)
        mixed = module.mlp(torch.from_numpy(state)).detach().numpy()
        outputs.append(reference.layer_norm(state + mixed, norms[1], 1e-5))
    return np.stack(outputs)


def test_a_block_equals_the_loops():
    block = STanHopBlock(STanHopConfig(**SMALL)).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for attention in (block.time.attention, block.pooling, block.series.attention):
        torch.nn.init.zeros_(attention.alpha_logit)
    states = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    actual = block(states)
    for window in range(2):
        patches = states[window].numpy()
        over_time = np.stack([_retrieval(block.time, series, series) for series in patches])
        for position in range(5):
            series = over_time[:, position]
            prototypes = block.prototypes[0].detach().numpy()
            phi = block.pooling.feature_map.weight.detach().numpy()
            pooled = reference.attend(prototypes, series, _linears(block.pooling), 2, 4**-0.5, 1.5, phi)
            assert_close(actual[window, :, position], _retrieval(block.series, series, pooled))


def test_series_and_windows_do_not_leak_over_time():
    """Attention over time uses only the same series, and prototypes mix series only at the same
    position."""
    block = _model().model.blocks[0]
    states = torch.randn(2, 3, 5, 8)
    changed = states.clone()
    changed[0, 1, 2] += 1.0
    first, second = block.over_time(states), block.over_time(changed)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[0, [0, 2]], second[0, [0, 2]])
    assert not torch.equal(first[0, 1], second[0, 1])
    series, other = (each.transpose(1, 2).flatten(0, 1) for each in (states, changed))
    prototypes = block.prototypes.expand(len(series), -1, -1)
    different = (block.pooling(prototypes, series)[0] != block.pooling(prototypes, other)[0]).flatten(1).any(1)
    assert different.tolist() == [index == 2 for index in range(10)]


@pytest.mark.parametrize(("patches", "window", "order"), [(4, 2, [0, 1, 2, 3]), (5, 2, [0, 1, 2, 3, 4, 4]), (4, 3, [0, 1, 2, 3, 2, 3])])
def test_coarse_graining_pads_with_the_last_patches(patches, window, order):
    merge = STanHopCoarseGraining(STanHopConfig(**{**SMALL, "merge_window": window}))
    states = torch.randn(2, 3, patches, 8)
    groups = states[:, :, order].reshape(2, 3, len(order) // window, window * 8)
    assert_close(merge(states), merge.dense(merge.layernorm(groups)))
    assert merge(states[:, :, :1]).shape == (2, 3, 1, 8)


def test_a_window_is_continued_to_the_left():
    model = _model(context_length=18, scaling=None).model
    values = torch.randn(2, 18, 3)
    full = _model(context_length=20, scaling=None).model
    full.load_state_dict(model.state_dict())
    assert_close(model.embed(values), full.embed(torch.cat([values[:, :1].expand(-1, 2, -1), values], 1)))


@pytest.mark.parametrize("scaling", ["std", "mean", None])
def test_scaling_equals_the_formula(scaling):
    values = _windows(dtype=torch.float64)
    observed = torch.rand(values.shape) < 0.7
    observed[0, :, 1] = False
    values[1, :, 2] = 5.0
    loc, scale = location_and_scale(values * observed, observed, scaling, 1e-2)
    for window in range(2):
        for channel in range(3):
            seen = values[window, :, channel][observed[window, :, channel]].numpy()
            wanted = (0.0, 1.0)
            if scaling == "std" and len(seen) > 0:
                wanted = (seen.mean(), max(seen.std(), 1e-2))
            elif scaling == "mean" and len(seen) > 0:
                wanted = (0.0, max(np.abs(seen).mean(), 1e-2))
            assert_close(torch.stack([loc[window, 0, channel], scale[window, 0, channel]]), wanted)


@pytest.mark.parametrize("use_linear_skip", [False, True])
def test_a_forecast_scales_with_the_units_of_its_window(use_linear_skip):
    model = _model(use_linear_skip=use_linear_skip)
    past = _windows()
    first = model(past).prediction_outputs
    second = model(past * 10.0 + 7.0).prediction_outputs
    assert_close(second, first * 10.0 + 7.0, scale=100)


def test_the_forecast_is_the_sum_over_scales_and_the_skip():
    model = _model(use_linear_skip=True)
    past = _windows()
    outputs = model.model(past)
    states = model.decoder.position_embeddings.expand(2, -1, -1, -1)
    forecast = model.linear_skip(outputs.scaled_values.transpose(1, 2))
    for layer, scale in zip(model.decoder.layers, outputs.scales, strict=True):
        states = layer.block(states)
        states = torch.stack([layer.cross(states[:, c], scale[:, c]) for c in range(3)], 1)
        forecast = forecast + layer.head(states).flatten(2)[..., :10]
    assert_close(model(past).prediction_outputs, forecast.transpose(1, 2) * outputs.scale + outputs.loc, scale=10)


def test_unobserved_values_have_no_influence():
    model = _model(use_linear_skip=True)
    past, future = _windows(), _windows(length=10)
    mask, future_mask = torch.rand(past.shape) < 0.7, torch.rand(future.shape) < 0.7
    outputs = model(past, mask, future, future_mask)
    for filler in (torch.nan, 1e6, torch.inf):
        same = model(torch.where(mask, past, filler), mask, torch.where(future_mask, future, filler), future_mask)
        assert torch.equal(same.prediction_outputs, outputs.prediction_outputs)
        assert torch.equal(same.loss, outputs.loss)
    inferred = model(torch.where(mask, past, torch.nan), None, torch.where(future_mask, future, torch.nan))
    assert torch.equal(inferred.loss, outputs.loss)


@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_losses(loss):
    model = _model(loss=loss)
    past, future = _windows(), _windows(length=10)
    mask = torch.rand(future.shape) < 0.5
    outputs = model(past, future_values=future, future_observed_mask=mask)
    errors = (outputs.prediction_outputs - future)[mask]
    assert_close(outputs.loss, errors.abs().mean() if loss == "mae" else errors.square().mean(), scale=100)
    assert model(past, future_values=future, future_observed_mask=torch.zeros_like(mask)).loss == 0.0
    assert model(past, future_values=future, return_loss=False).loss is None
    assert model(past).loss is None
    future[1, 2, 0] = torch.inf
    with pytest.raises(ValueError, match="observed future_values must be finite, got 1 values that are not"):
        model(past, future_values=future)


def test_windows_without_values_or_variation_have_finite_forecasts():
    model = _model()
    past = _windows()
    past[0, :, 1] = torch.nan
    past[1, :, 0] = 4.0
    outputs = model.train()(past, future_values=_windows(length=10))
    outputs.loss.backward()
    assert outputs.prediction_outputs.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (outputs.scale[1, 0, 0], outputs.loc[1, 0, 0]) == (pytest.approx(1e-2), 4.0)
    everything = model.eval()(torch.full((2, 20, 3), torch.nan)).prediction_outputs
    assert everything.isfinite().all()
    assert_close(everything[0], everything[1])


def test_outputs():
    model = _model()
    past = _windows()
    outputs = model(past, output_hidden_states=True, output_attentions=True)
    base = model.model(past)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 3, 8)]
    for captured, scale in zip(outputs.hidden_states, base.scales[:2], strict=False):
        assert_close(captured, scale)
    shapes = [tuple(weights.shape) for weights in outputs.attentions]
    assert shapes == [(6, 2, 5, 5), (10, 2, 4, 3), (10, 2, 3, 4), (6, 2, 3, 3), (6, 2, 4, 3), (6, 2, 3, 4)]
    assert len(outputs.decoder_attentions) == 12
    assert [tuple(weights.shape) for weights in outputs.decoder_attentions[3::4]] == [(6, 2, 3, 5), (6, 2, 3, 5), (6, 2, 3, 3)]
    for weights in outputs.attentions + outputs.decoder_attentions:
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert isinstance(model(past, return_dict=False), tuple)
    generated = model.generate(past)
    assert torch.equal(generated.sequences[:, 0], model(past).prediction_outputs)


def test_memory_sets_are_what_the_layers_retrieve_from():
    model = _model()
    past = _windows()
    seen = []
    for module in model.modules():
        if type(module).__name__ == "HopfieldAttention":
            module.register_forward_pre_hook(lambda module, arguments: seen.append((module.feature_map, arguments[1])))
    model(past)
    expected, seen[:] = list(seen), []
    sets = list(model.memory_sets(past, future_values=None))
    assert len(sets) == len(list(model.model.memory_sets(past))) + 3 * 4 == 18
    assert len({id(memory_set.feature_map) for memory_set in sets}) == 18
    # Because the memories of the first decoder block are equal for both windows, they occur once.
    assert [len(memories) // len(each.memories) for each, (_, memories) in zip(sets, expected, strict=True)] == [1] * 6 + [2] * 3 + [1] * 9
    for memory_set, (feature_map, memories) in zip(sets, expected, strict=True):
        assert memory_set.feature_map is feature_map
        assert_close(memory_set.memories, memories[: len(memory_set.memories)])


def _trainer(folder, model, callback, **arguments) -> Trainer:
    examples = [{"past_values": _windows(1)[0], "future_values": _windows(1, 10)[0]} for _ in range(16)]
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    settings = TrainingArguments(str(folder), label_names=["future_values"], **quiet, **arguments)
    return Trainer(model, settings, train_dataset=examples, eval_dataset=examples, callbacks=[callback])


@pytest.mark.parametrize("parameters", ["feature_maps", "upstream"])
def test_training_with_stage_one(tmp_path, parameters):
    separation = SeparationCallback("step", kind="average", parameters=parameters, batch_size=4)
    model = _model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = _trainer(tmp_path, model, separation, max_steps=4, per_device_train_batch_size=4)
    trainer.train()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert np.isfinite([entry["separation_loss"] for entry in separation.history]).all()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("option", ["project", "normalize_rows"])
def test_only_feature_maps_that_are_separated_get_unit_rows(tmp_path, option):
    # Each series has a single output patch, so decoder blocks have a single memory over time.
    model = _model(patch_length=10, num_hidden_layers=1)
    maps = {name: parameter for name, parameter in model.named_parameters() if "feature_map" in name}
    for weight in maps.values():
        weight.data.mul_(3.0)
    before = {name: weight.detach().clone() for name, weight in maps.items()}
    separation = SeparationCallback(steps=5, parameters="feature_maps", batch_size=4, **{option: True})
    _trainer(tmp_path, model, separation, max_steps=1, learning_rate=0.0).train()
    alone = [name for name in maps if re.fullmatch(r"decoder\.layers\.\d\.block\.time\..*", name)]
    separated = set(maps) - set(alone)
    assert len(alone) == 2
    for name, weight in maps.items():
        if name in separated:
            assert_close(weight.norm(dim=-1), torch.ones(len(weight)))
        else:
            assert torch.equal(weight, before[name])


def test_stage_one_of_a_single_series(tmp_path):
    model = _model(num_input_channels=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "feature_map" in name}
    separation = SeparationCallback("train_begin", 5, kind="average", parameters="feature_maps", batch_size=4)
    trainer = _trainer(tmp_path, model, separation, max_steps=1, learning_rate=0.0)
    trainer.train_dataset = [{name: values[:, :1] for name, values in example.items()} for example in trainer.train_dataset]
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if name in before and not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "pooling" not in name}


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_recalled_futures_equal_the_loops(alpha):
    model = _model(memory_beta=3.0, memory_alpha=alpha, minimum_scale=0.5).double()
    past, future = _windows(7, dtype=torch.float64), _windows(7, 10, dtype=torch.float64)
    past[2, :, 1] = 4.0
    model.store(past, future)
    query = _windows(1, dtype=torch.float64)
    recalled = model.recall(query)[0]
    for channel in range(3):
        scaled, futures = [], []
        for stored, following in zip(past[:, :, channel].numpy(), future[:, :, channel].numpy(), strict=True):
            if stored.std() == 0:
                continue
            scale = max(stored.std(), 0.5)
            scaled.append((stored - stored.mean()) / scale)
            futures.append((following - stored.mean()) / scale)
        window = query[0, :, channel].numpy()
        mine = (window - window.mean()) / max(window.std(), 0.5)
        scores = [3.0 * (mine @ key) / (np.linalg.norm(mine) * np.linalg.norm(key)) for key in scaled]
        expected = reference.entmax(scores, alpha) @ np.stack(futures) * max(window.std(), 0.5) + window.mean()
        assert_close(recalled[:, channel], expected, scale=10)


@pytest.mark.parametrize("silent", [0.3, float("nan")])
def test_stored_windows_without_information_are_never_recalled(silent):
    model = _model()
    query, past, future = 1000.0 + _windows(3), 1000.0 + _windows(7), 1000.0 + _windows(7, 10)
    model.store(past[1:], future[1:])
    expected = model.recall(query)
    # Because of rounding, the mean of values 0.3 is not exactly 0.3.
    past[0], future[0] = silent, 2000.0
    model.store(past, future)
    assert model.config.num_memories == 7
    assert_close(model.recall(query), expected)
    model.store(past[:1], future[:1])
    with pytest.raises(ValueError, match="no window is stored"):
        model.recall(query)


def test_a_stored_window_is_recalled():
    model = _model(memory_beta=1e4)
    past, future = _windows(30), _windows(30, 10)
    model.store(past, future)
    assert model.config.num_memories == 30
    assert_close(model.recall(past * 2.0 + 1.0), future * 2.0 + 1.0, scale=100)


@pytest.mark.parametrize("memory_type", ["plug", "tune"])
def test_external_memory(memory_type, tmp_path):
    model, plain = _model(memory_type=memory_type), _model()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "memory_head.weight"})
    query, past, future = _windows(3), _windows(7), _windows(7, 10)
    expected = plain(query).prediction_outputs
    assert torch.equal(model(query).prediction_outputs, expected)
    model.store(past, future)
    scaled = model.model.scaled(query, None).values
    recalled_past, recalled_future = model.model.memory(scaled)
    outputs = model(query, future_values=_windows(3, 10))
    if memory_type == "plug":
        completed = torch.nn.functional.layer_norm((scaled + recalled_past).mT, (20,), eps=1e-5).mT
        unscaled = _model(scaling=None)
        unscaled.load_state_dict(plain.state_dict())
        assert_close(outputs.prediction_outputs, unscaled(completed).prediction_outputs * outputs.scale + outputs.loc, scale=100)
    else:
        assert torch.equal(outputs.prediction_outputs, expected)
        outputs.loss.backward()
        assert (model.memory_head.weight.grad != 0).any()
        torch.nn.init.eye_(model.memory_head.weight)
        tuned = model(query).prediction_outputs
        assert_close(tuned, expected + recalled_future * outputs.scale, scale=100)
    model.save_pretrained(tmp_path)
    loaded = STanHopForPrediction.from_pretrained(tmp_path)
    assert loaded.config.num_memories == 7
    assert torch.equal(loaded(query).prediction_outputs, model(query).prediction_outputs)
    assert torch.equal(loaded.recall(query), model.recall(query))


def test_bad_memories_are_refused():
    model = _model()
    with pytest.raises(ValueError, match="no window is stored"):
        model.recall(_windows())
    with pytest.raises(ValueError, match=r"of shape \(M, prediction_length, C\) = \(2, 10, 3\), got 2 windows and futures \(2, 9, 3\)"):
        model.store(_windows(), _windows(length=9))
    with pytest.raises(ValueError, match="store needs at least one window"):
        model.store(_windows(0), _windows(0, 10))
    with pytest.raises(ValueError, match="past_values must have shape"):
        model.store(_windows(length=19), _windows(length=10))
    with pytest.raises(ValueError, match="future_values must be finite, or NaN"):
        model.store(_windows(), torch.full_like(_windows(length=10), float("inf")))
    missing = _windows(length=10)
    missing[0, 2, 1] = float("nan")
    model.store(_windows(), missing)
    assert (model.model.memory.futures == 0).nonzero().tolist() == [[1, 0, 2]]


@pytest.mark.trains
def test_a_model_overfits():
    torch.manual_seed(0)
    model = _model(attention_dropout=0.0, ff_dropout=0.0).train()
    past, future = _windows(4), _windows(4, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(past, future_values=future).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_saving_and_loading(tmp_path):
    for fields in ({}, {"use_linear_skip": True, "use_feature_map": False, "learnable_alpha": False, "alpha": 1.0}):
        model, past = _model(**fields), _windows()
        model.save_pretrained(tmp_path)
        for loaded in (STanHopForPrediction.from_pretrained(tmp_path), AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path)):
            assert type(loaded) is STanHopForPrediction
            assert torch.equal(loaded(past).prediction_outputs, model(past).prediction_outputs)
        base = AutoModel.from_pretrained(tmp_path)
        assert type(base) is STanHopModel
        assert torch.equal(base(past).last_hidden_state, model.model(past).last_hidden_state)


def test_low_precision():
    model, past = _model(), _windows()
    expected = model(past).prediction_outputs
    actual = model.bfloat16()(past).prediction_outputs
    assert actual.dtype == torch.float32
    assert_close(actual.bfloat16(), expected, scale=40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "past_values is required"),
        ({"past_values": torch.zeros(2, 19, 3)}, r"\(B, context_length=20, num_input_channels=3\), got \(2, 19, 3\)"),
        ({"past_values": torch.zeros(2, 20, 4)}, r"got \(2, 20, 4\)"),
        ({"past_values": torch.full((2, 20, 3), torch.inf)}, "must be finite in torch.float32, but series 0 of window 0 is not"),
        ({"past_values": torch.zeros(2, 20, 3), "past_observed_mask": torch.ones(2, 20)}, "past_observed_mask must have the shape"),
        (
            {"past_values": torch.zeros(2, 20, 3), "future_values": torch.zeros(2, 11, 3)},
            r"future_values must have shape .* got \(2, 11, 3\)",
        ),
        (
            {"past_values": torch.zeros(2, 20, 3), "future_values": torch.zeros(2, 10, 3), "future_observed_mask": torch.ones(2, 10)},
            r"future_observed_mask must have shape .* got \(2, 10\)",
        ),
    ],
)
def test_bad_calls_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _model()(**arguments)


@pytest.mark.parametrize("name", ["past_observed_mask", "future_observed_mask"])
def test_masks_of_other_values_than_0_and_1_are_refused(name):
    model, inputs = _model(), {"past_values": torch.randn(2, 20, 3), "future_values": torch.randn(2, 10, 3)}
    shape = (2, 20, 3) if name == "past_observed_mask" else (2, 10, 3)
    mask = torch.rand(shape) < 0.7
    expected = model(**inputs, **{name: mask}).loss
    assert expected != model(**inputs).loss
    for right in (mask.long(), mask.float(), mask.half()):
        assert torch.equal(model(**inputs, **{name: right}).loss, expected)
    for value in (0.5, 2.0, -1.0, torch.nan):
        wrong = torch.ones(shape)
        wrong[1, 2, 0] = value
        with pytest.raises(ValueError, match=f"{name} must be 1 for observed values and 0 for others, .* such as {value}"):
            model(**inputs, **{name: wrong})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_varies_far_from_zero(dtype):
    model = _model(init_std=0.02, use_linear_skip=True)
    past, future = 70000.0 + torch.randn(2, 20, 3), 70000.0 + torch.randn(2, 10, 3)
    expected = model(past, future_values=future)
    actual = model.to(dtype)(past, future_values=future)
    assert_close(actual.loc, expected.loc)
    assert_close(actual.scale, expected.scale)
    # In bf16, numbers near 70,000 have a spacing of 512.
    assert (actual.prediction_outputs - expected.prediction_outputs).abs().max() < 0.1
    assert (actual.loss - expected.loss).abs() < 0.1
    model.store(past, future)
    recalled = model.recall(past)
    model.float()
    model.store(past, future)
    assert (model.recall(past) - recalled).abs().max() < 0.1


def test_values_in_double_precision_keep_their_differences():
    model = _model()
    past = torch.randn(2, 20, 3, dtype=torch.float64)
    near, far = (model(past + shift, future_values=past[:, :10] + shift) for shift in (0.0, 1.7e9))
    assert far.prediction_outputs.dtype == torch.float64
    # In double precision, numbers near 1.7e9 have a spacing of 2e-7.
    assert (far.prediction_outputs - 1.7e9 - near.prediction_outputs).abs().max() < 1e-5
    assert (far.scale - near.scale).abs().max() < 1e-6
    assert far.loss.item() == pytest.approx(near.loss.item(), rel=1e-5)
    far.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_alpha_1_equals_softmax_in_every_form():
    model = _model(alpha=1.0, learnable_alpha=False)
    assert model.config._attn_implementation == "hopfield"
    past = _windows()
    expected = model(past)
    for asked in (model(past, output_attentions=True), _model(alpha=1.0, learnable_alpha=False, output_attentions=True)(past)):
        assert (len(asked.attentions), len(asked.decoder_attentions)) == (6, 12)
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        assert_close(model(past).prediction_outputs, expected.prediction_outputs)


def test_values_beyond_half_precision_are_refused():
    model = _model(scaling=None).half()
    past, future = torch.full((2, 20, 3), 70000.0), torch.zeros(2, 10, 3)
    with pytest.raises(ValueError, match=r"past_values must be finite in torch.float16 after scaling, got values up to 7e\+04"):
        model(past)
    with pytest.raises(ValueError, match=r"future_values must be finite in torch.float16 after scaling"):
        model.store(future.new_ones(2, 20, 3), future + 70000.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scaling", ["std", "mean"])
@pytest.mark.parametrize("size", [1e19, 3e37, 1e-19, 1e-30])
def test_forecasts_and_recalled_futures_do_not_depend_on_the_size_of_values(dtype, scaling, size):
    model = _model(scaling=scaling, minimum_scale=1e-40).to(dtype)
    past, future = torch.randn(4, 20, 3), torch.randn(4, 10, 3)
    model.store(past, future)
    expected, recalled = model(past).prediction_outputs, model.recall(past)
    model.store(past * size, future * size)
    assert_close(model(past * size).prediction_outputs / size, expected, scale=3)
    assert_close(model.recall(past * size) / size, recalled, scale=3)
    if size > 1:
        with pytest.raises(ValueError, match=r"the mse loss must be finite in torch\.float32"):
            model(past * size, future_values=future * size)
        assert model(past.double() * size, future_values=future.double() * size).loss.isfinite()


def test_differences_of_the_largest_values_do_not_overflow():
    model = _model()
    past = torch.full((1, 20, 3), -3e38)
    past[:, 0] = 3e38
    scaled, loc, *_ = model.model.scaled(past, None)
    assert_close(loc / 3e38, torch.full((1, 1, 3), -0.9))
    assert_close(scaled[0, :2, 0], [1.9 / 0.19**0.5, -0.1 / 0.19**0.5], scale=3)


def test_values_that_leave_the_range_of_the_dtype_are_named():
    model = _model(minimum_scale=1e30)
    torch.nn.init.constant_(model.decoder.layers[0].head.bias, 1e9)
    with pytest.raises(ValueError, match=r"forecasts must be finite in torch.float32, but 60 are not, for windows with values up to"):
        model(_windows())
    with pytest.raises(ValueError, match=r"without scaling, past_values must be small enough for layer norms in torch.float32"):
        _model(scaling=None)(1e20 * torch.randn(2, 20, 3))


def test_stored_windows_that_become_constant_are_named():
    model = _model(minimum_scale=1.0).half()
    past = torch.randn(3, 20, 3)
    past[1, :, 2] *= 1e-12
    with pytest.warns(UserWarning, match=r"1 series of the windows become constant in .* \[\[1, 2\]\]"):
        model.store(past, torch.randn(3, 10, 3))


@pytest.mark.parametrize("memory_alpha", [1.0, 1.5])
def test_a_large_memory_beta_in_half_precision(memory_alpha):
    model = _model(memory_beta=1e6, memory_alpha=memory_alpha).half()
    past, future = torch.randn(5, 20, 3), torch.randn(5, 10, 3)
    model.store(past, future)
    assert_close(model.recall(past).half(), future, scale=3)


@pytest.mark.parametrize("wrong", [np.zeros((2, 20, 3), np.float32), [[0.0]]])
def test_inputs_that_are_not_tensors_are_named(wrong):
    model, past, future = _model(), _windows(), _windows(length=10)
    for name, call in (
        ("past_values", lambda: model(wrong)),
        ("past_values", lambda: model.generate(wrong)),
        ("past_values", lambda: model.recall(wrong)),
        ("past_values", lambda: model.store(wrong, future)),
        ("future_values", lambda: model.store(past, wrong)),
        ("past_observed_mask", lambda: model(past, wrong)),
        ("future_values", lambda: model(past, future_values=wrong)),
        ("future_observed_mask", lambda: model(past, future_values=future, future_observed_mask=wrong)),
    ):
        if name == "past_values" and "recall" in call.__code__.co_names:
            model.store(past, future)
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got (numpy.ndarray|builtins.list)"):
            call()


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
@pytest.mark.parametrize("kind", [STanHopForPrediction, STanHopModel])
@pytest.mark.parametrize(("held", "given"), [(0, 5), (3, 5), (5, 0)])
def test_a_state_dict_of_another_number_of_windows_loads(options, kind, held, given):
    models = []
    for count in (given, held):
        model = kind(STanHopConfig(**SMALL)).eval()
        if count > 0:
            model.store(_windows(count), _windows(count, 10))
        models.append(model)
    first, second = models
    outer = [torch.nn.Sequential(model) for model in models]
    outer[1].load_state_dict(outer[0].state_dict(), **options)
    assert second.config.num_memories == given
    assert second.state_dict().keys() == first.state_dict().keys()
    query = _windows()
    if given > 0:
        assert torch.equal(second.recall(query), first.recall(query))
    else:
        with pytest.raises(ValueError, match="no window is stored"):
            second.recall(query)


def test_a_partial_state_dict_keeps_stored_windows():
    model = _model()
    model.store(_windows(4), _windows(4, 10))
    model.load_state_dict(_model().decoder.state_dict(prefix="decoder."), strict=False)
    assert model.config.num_memories == 4
    longer = _model(context_length=24)
    longer.store(_windows(2, 24), _windows(2, 10))
    with pytest.raises(RuntimeError, match=r"size mismatch for model.memory.pasts: .*\[3, 2, 24\].*\[3, 2, 20\]"):
        _model().load_state_dict(longer.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("memory_type", ["plug", "tune", None])
def test_a_forecaster_exports_to_onnx_through_torchscript(tmp_path, memory_type):
    # Because the graph of a learnable alpha takes long to export, alpha is fixed.
    small = {"alpha": 1.0, "learnable_alpha": False, "num_hidden_layers": 1, "return_dict": False, "memory_type": memory_type}
    model = _model(**small).requires_grad_(False)
    model.store(_windows(4), _windows(4, 10))
    if memory_type == "tune":
        torch.nn.init.eye_(model.memory_head.weight)
    path, past = str(tmp_path / "forecaster.onnx"), _windows()
    torch.onnx.export(model, (past,), path, dynamo=False, opset_version=18, input_names=["past_values"])
    query = _windows()
    outputs = onnxruntime.InferenceSession(path).run(None, {"past_values": query.numpy()})
    assert_close(torch.from_numpy(outputs[0]), model(query)[0], scale=30)
