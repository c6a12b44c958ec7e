"""The adapter of PEFT that adds Phi: configuration, saving, several adapters, merging, and the separation step."""

import copy
import doctest
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainingArguments, ViTConfig, ViTModel
from transformers.pytorch_utils import Conv1D

import modeling_uhop
from modeling_uhop import (
    FeatureMap,
    Separation,
    SeparationCallback,
    StageOne,
    UHopAdapterConfig,
    UHopViTConfig,
    UHopViTForImageClassification,
    UHopViTModel,
    registration,
    separation_loss,
    use_hopfield_attention,
)
from modeling_uhop.attach.layer import UHopKeyProjection, UHopProjection
from modeling_uhop.attach.projections import LAYOUTS, Projections
from modeling_uhop.memories import memory_sets_of
from tests.conftest import CHECKPOINTING, assert_close


# peft 0.21 reads an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 60, "initializer_range": 0.2}
IMAGE: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 4, "initializer_range": 0.2}
PHI = "encoder.layer.{}.attention.self.query.uhop_phi.{}"


def _bert(cls: Any = BertModel, **fields: Any) -> Any:
    torch.manual_seed(0)
    return cls(BertConfig(**{**TEXT, **fields})).eval()


def _ids() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    return {"input_ids": torch.randint(3, 60, (2, 9)), "attention_mask": mask}


def _attach(model: Any, *, move: bool = True, **fields: Any) -> Any:
    """The model with an adapter whose Phi is not the identity."""
    model = get_peft_model(model, UHopAdapterConfig(**fields)).eval()
    if move:
        _move(model)
    return model


def _move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


@torch.no_grad()
def _states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs)[0]


def _maps(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FeatureMap)]


# What an adapter computes


def test_one_phi_maps_what_queries_and_keys_read():
    """Equation 3.1, written out for one layer of BERT."""
    model = _attach(_bert(num_hidden_layers=1))
    attention = model.get_submodule("base_model.model.encoder.layer.0.attention.self")
    (phi,) = _maps(model)
    states = torch.randn(2, 5, 32)
    projections = attention.query.base_layer, attention.key.base_layer, attention.value
    query, key, value = (
        layer(read).view(2, 5, 4, 8).transpose(1, 2)
        for layer, read in zip(projections, (states @ phi.weight.T, states @ phi.weight.T, states), strict=True)
    )
    weights = (query @ key.mT / 8**0.5).softmax(-1)
    assert_close(attention(states)[0], (weights @ value).transpose(1, 2).flatten(2))
    assert isinstance(attention.value, nn.Linear)
    assert attention.key.uhop_phi is attention.query.uhop_phi


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fields", [{}, {"rank": 3}], ids=["square", "low rank"])
def test_outputs_are_bitwise_those_of_the_model_at_the_start(dtype, fields):
    """A sum of one product with 1 and products with 0 is exact in every dtype, so an identity is too."""
    inputs = _ids()
    model = _attach(_bert().to(dtype), move=False, **fields)
    assert torch.equal(_states(model, inputs), _states(_bert().to(dtype), inputs))


@pytest.mark.parametrize("width", [1, 7, 32, 129, 768])
@pytest.mark.parametrize("rows", [1, 3, 197])
def test_the_identity_is_exact_at_every_width(width, rows):
    phi = FeatureMap(width, feature_init="identity")
    for scale in (1e-30, 1.0, 1e30):
        states = scale * torch.randn(rows, width)
        assert torch.equal(phi(states), states)


def test_low_rank_is_identity_plus_a_product():
    model = _attach(_bert(), rank=3)
    assert model.get_nb_trainable_parameters()[0] == 3 * 2 * 3 * 32
    for phi in _maps(model):
        states = torch.randn(4, 32)
        assert_close(phi(states), states + states @ phi.down.T @ phi.up.T)
        assert_close(phi(states), states @ phi.weight.T)
    assert "32 -> 32, rank=3" in repr(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv"])
@pytest.mark.parametrize("rows", ["last", "interleaved"])
def test_a_fused_projection_computes_the_same_by_rows_in_training(kind, rows, dtype):
    torch.manual_seed(0)
    base = Conv1D(15, 5) if kind == "conv" else nn.Linear(5, 15, bias=kind == "linear")
    values = torch.arange(15) >= 9 if rows == "last" else torch.tensor([1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1]).bool()
    projection = UHopKeyProjection(base.to(dtype).requires_grad_(False), value_rows=values)
    projection.add_map("default", 5, UHopAdapterConfig(init="normal"))
    projection.set_adapter("default")
    found = []
    for training in (True, False):
        x = torch.randn(2, 7, 5, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = projection.train(training)(x)
        weights = torch.linspace(-1, 1, 15, dtype=dtype)
        found.append((outputs, *torch.autograd.grad((outputs * weights).sum(), [x, projection.uhop_phi["default"].weight])))
    phi = projection.uhop_phi["default"].weight
    weight, bias = (base.weight.T if kind == "conv" else base.weight), (0.0 if base.bias is None else base.bias)
    for row, value in enumerate(values):
        read = x if value else x @ phi.T
        assert_close(found[0][0][..., row], (read @ weight[row]) + (bias if isinstance(bias, float) else bias[row]))
    for ours, whole in zip(*found, strict=True):
        assert_close(ours, whole)


def test_a_fused_projection_with_hooks_is_called_as_a_module():
    base = nn.Linear(4, 12)
    calls: list = []
    base.register_forward_hook(lambda *given: calls.append(None))
    projection = UHopKeyProjection(base, value_rows=torch.arange(12) >= 8)
    projection.add_map("default", 4, UHopAdapterConfig())
    projection.set_adapter("default")
    projection.train()(torch.randn(3, 4))
    assert len(calls) == 2


def _pair() -> tuple[UHopProjection, UHopKeyProjection, Any, list]:
    """A query and a key projection, their Phi, and a list that grows with each call of Phi."""
    torch.manual_seed(0)
    query = UHopProjection(nn.Linear(4, 6))
    key = UHopKeyProjection(nn.Linear(4, 6), query=query)
    query.add_map("default", 4, UHopAdapterConfig(init="normal"))
    for projection in (query, key):
        projection.set_adapter("default")
    phi: Any = query.uhop_phi["default"]
    calls: list = []
    phi.register_forward_hook(lambda *given: calls.append(None))
    return query, key, phi, calls


def test_a_training_step_computes_phi_once_for_queries_and_keys():
    query, key, phi, calls = _pair()
    x = torch.randn(2, 3, 4)
    found = []
    for training in (True, False):
        query.train(training), key.train(training)
        loss = query(x).square().sum() + key(x).pow(3).sum()
        found.append((loss, *torch.autograd.grad(loss, [phi.weight])))
    assert len(calls) == 1 + 2
    assert_close(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("change", ["Phi", "x", "another x", "no gradient"])
def test_phi_of_an_earlier_step_is_not_used_again(change):
    query, key, phi, _ = _pair()
    query.train(), key.train()
    x = torch.randn(2, 3, 4)
    query(x)
    with torch.no_grad():
        if change == "Phi":
            phi.weight.mul_(2.0)
        elif change == "x":
            x.mul_(2.0)
    x = x.clone() + 1.0 if change == "another x" else x
    with torch.set_grad_enabled(change != "no gradient"):
        outputs = key(x)
    assert outputs.requires_grad == (change != "no gradient")
    assert_close(outputs, key.base_layer(phi(x)))
    copy.deepcopy(query)


@pytest.mark.parametrize("init", ["orthogonal", "normal"])
def test_other_initial_values_change_the_model(init):
    inputs = _ids()
    model = _attach(_bert(), move=False, init=init)
    assert not torch.allclose(_states(model, inputs), _states(_bert(), inputs), atol=1e-3)


def test_layers_and_modules_are_selected():
    assert len(_maps(_attach(_bert(), layers=[0, 2]))) == 2
    model = _attach(_bert(), target_modules=r"encoder\.layer\.1\..*key")
    assert [name for name, module in model.named_modules() if isinstance(module, UHopProjection)] == [
        f"base_model.model.encoder.layer.1.attention.self.{name}" for name in ("query", "key")
    ]
    assert len(_maps(_attach(_bert(), target_modules=["layer.0.attention.self.query", "layer.2.attention.self.key"]))) == 2


class _Attention(nn.Module):
    """An attention layer with names of its own."""

    def __init__(self, memory_width: int = 8):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(memory_width, 8), nn.Linear(memory_width, 8)

    def forward(self, states: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        memory = states if memory is None else memory
        return nn.functional.scaled_dot_product_attention(self.to_q(states), self.to_k(memory), self.to_v(memory))


def test_projections_with_other_names_are_given_as_pairs():
    with pytest.raises(ValueError, match=r"not known: 0 \(_Attention\); name them, for example projections="):
        _attach(nn.Sequential(_Attention()))
    model = _attach(nn.Sequential(_Attention()), projections=[("to_q", "to_k")])
    states = torch.randn(2, 5, 8)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(merged(states), model(states))


def test_cross_attention_shares_phi_if_widths_agree():
    model = _attach(_bert(is_decoder=True, add_cross_attention=True))
    assert len(_maps(model)) == 6
    inputs = {**_ids(), "encoder_hidden_states": torch.randn(2, 4, 32)}
    before = _states(model, inputs)
    assert_close(_states(model.merge_and_unload(), inputs), before)
    with pytest.raises(ValueError, match="reads queries of width 8 and keys of width 6, which one Phi cannot map"):
        _attach(nn.Sequential(_Attention(6)), projections=[["to_q", "to_k"]])


def test_cross_attention_of_gpt2_has_keys_and_values_in_one_projection():
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    base = transformers.GPT2Model(transformers.GPT2Config(**sizes, add_cross_attention=True)).eval()
    inputs = {"input_ids": torch.randint(0, 60, (2, 5)), "encoder_hidden_states": torch.randn(2, 4, 32)}
    before = base.h[0].crossattention.c_attn(inputs["encoder_hidden_states"])
    model = _attach(base)
    after = model.get_submodule("base_model.model.h.0.crossattention.c_attn")(inputs["encoder_hidden_states"])
    assert torch.equal(before[..., 32:], after[..., 32:])
    assert not torch.allclose(before[..., :32], after[..., :32], atol=1e-3)
    expected = _states(model, inputs)
    assert_close(_states(model.merge_and_unload(), inputs), expected)


def test_value_rows_follow_the_layout():
    class BloomAttention(nn.Module):
        num_heads = 2

        def __init__(self, outputs: int):
            super().__init__()
            self.query_key_value = nn.Linear(4, outputs)

    rows = [
        Projections("a", BloomAttention(12), "query_key_value", "query_key_value", 4, layout).value_rows() for layout in ("heads", "blocks")
    ]
    assert [each.int().tolist() for each in rows if each is not None] == [[0, 0, 0, 0, 1, 1] * 2, [0] * 8 + [1] * 4]
    with pytest.raises(ValueError, match="has 13 outputs, which do not fit its 2 heads"):
        Projections("a", BloomAttention(13), "query_key_value", "query_key_value", 4, "heads").value_rows()


def test_every_listed_class_with_one_projection_exists():
    folder = Path(transformers.__file__).parent / "models"
    source = "".join(path.read_text() for path in folder.glob("*/modeling_*.py"))
    assert [name for names in LAYOUTS.values() for name in names if f"class {name}(" not in source] == []


def test_a_fused_projection_of_an_unknown_class_is_refused():
    class OtherAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

    with pytest.raises(ValueError, match=r"0 \(OtherAttention\) computes keys and values by one projection, qkv, and the order"):
        _attach(nn.Sequential(OtherAttention()))


# Configuration


def test_the_example_of_the_configuration_runs():
    outcome = doctest.testmod(importlib.import_module("modeling_uhop.attach.adapter_config"))
    assert (outcome.failed, outcome.attempted) == (0, 7)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"alpha": 2.5}, ValueError, r"alpha must be a number in \[1, 2\] or None, got 2.5"),
        ({"alpha": True}, ValueError, "alpha must be a number"),
        ({"feature_map": False}, ValueError, "nothing to add"),
        ({"rank": 0}, ValueError, "rank must be an integer of at least 1 or None, got 0"),
        ({"rank": 2, "init": "normal"}, ValueError, r"init must be one of \('identity',\) with a rank, got 'normal'"),
        ({"init": "ones"}, ValueError, "init must be one of .*, got 'ones'"),
        ({"layers": ["0"]}, ValueError, r"layers must be integers of at least 0, or None, got \['0'\]"),
        ({"layers": [-1]}, ValueError, "layers must be integers of at least 0"),
        ({"projections": ["to_q", "to_k"]}, TypeError, "projections must be a list of pairs"),
    ],
)
def test_wrong_fields_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        UHopAdapterConfig(**fields)


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (lambda: UHopViTModel(UHopViTConfig(**IMAGE)), {}, "UHopViTModel has feature maps of its own"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "Sequential has no attention with query and key projections"),
        (_bert, {"layers": [7]}, "no attention with query and key projections among the selected layers"),
        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), {}, r"not known: 0 \(MultiheadAttention\)"),
    ],
    ids=["uhop", "no attention", "no layer", "torch"],
)
def test_models_that_cannot_be_adapted_are_refused(build, fields, message):
    model = build()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        _attach(model, **fields)
    assert [name for name, _ in model.named_modules()] == before


def test_a_model_compiles_in_one_graph():
    model, inputs = _attach(_bert(num_hidden_layers=1), alpha=1.5), _ids()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(_states(compiled, inputs), _states(model, inputs), scale=20)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    inputs = _ids()
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = _attach(_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
        if checkpointed:
            getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**inputs)[0].square().mean().backward()
        gradients.append([phi.weight.grad for phi in _maps(model)])
        assert len(memory_sets_of(model, inputs)) == 3
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


# Saving and loading


def test_an_adapter_folder_holds_each_phi_once(tmp_path):
    model, inputs = _attach(_bert(BertForSequenceClassification), alpha=1.5, modules_to_save=["classifier"]), _ids()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("adapter*")) == ["adapter_config.json", "adapter_model.safetensors"]
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key.removeprefix("base_model.model.bert.") for key in keys if "uhop_phi" in key} == {PHI.format(i, "weight") for i in range(3)}
    assert len(keys) == 5
    loaded = PeftModel.from_pretrained(_bert(BertForSequenceClassification), tmp_path)
    assert torch.equal(_states(loaded, inputs), _states(model, inputs))
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, UHopAdapterConfig)
    assert (config.alpha, config.rank, config.init) == (1.5, None, "identity")


def test_an_adapter_without_phi_holds_alpha_alone(tmp_path):
    model, inputs = _attach(_bert(), alpha=1.5, feature_map=False), _ids()
    expected = _states(use_hopfield_attention(_bert(), 1.5), inputs)
    assert torch.equal(_states(model, inputs), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(_states(PeftModel.from_pretrained(_bert(), tmp_path), inputs), expected)
    assert len(memory_sets_of(model, inputs)) == 3


def test_low_rank_adapters_load_without_memory_for_random_weights(tmp_path):
    model, inputs = _attach(_bert(), rank=2), _ids()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_bert(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(_states(loaded, inputs), _states(model, inputs))


def test_methods_of_transformers_add_and_load_the_adapter(tmp_path):
    model, inputs = _bert(), _ids()
    model.add_adapter(UHopAdapterConfig())
    _move(model)
    model.save_pretrained(tmp_path)
    loaded = _bert()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(_states(loaded, inputs), _states(model, inputs))
    loaded.disable_adapters()
    assert torch.equal(_states(loaded, inputs), _states(_bert(), inputs))


@pytest.mark.process
def test_peft_knows_the_method_once_the_package_is_imported(tmp_path, monkeypatch):
    _attach(_bert()).save_pretrained(tmp_path)
    code = f"import modeling_uhop; from peft import PeftConfig; print(type(PeftConfig.from_pretrained({str(tmp_path)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "UHopAdapterConfig\n", done.stderr
    monkeypatch.delitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "MODELING_UHOP")
    with pytest.raises(KeyError, match="MODELING_UHOP"):
        PeftModel.from_pretrained(_bert(), tmp_path)


@pytest.mark.parametrize("installed", [None, "0.20.1"])
def test_without_a_recent_peft_an_error_says_what_to_install(monkeypatch, installed):
    if installed is None:
        monkeypatch.setitem(sys.modules, "peft", None)
    else:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    for name in ("modeling_uhop.attach", "modeling_uhop.attach.registry"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"modeling_uhop\.attach needs PEFT 0\.21 or later: pip install 'peft>=0\.21'"):
        importlib.import_module("modeling_uhop.attach")
    # Nothing is registered then, and no import fails.
    registration._adapter(None)
    assert "UHopAdapterConfig" not in modeling_uhop.__all__


# Several adapters, and alpha


def test_adapters_are_switched_with_their_alpha():
    inputs = _ids()
    stock = _states(_bert(), inputs)
    model = _attach(_bert(), alpha=1.5)
    sparse = _states(model, inputs)
    model.add_adapter("dense", UHopAdapterConfig())
    assert torch.equal(_states(model, inputs), sparse)
    model.set_adapter("dense")
    assert torch.equal(_states(model, inputs), stock)
    assert not hasattr(model.config, "hopfield_alpha")
    _move(model)
    dense = _states(model, inputs)
    model.set_adapter("default")
    assert torch.equal(_states(model, inputs), sparse)
    with model.disable_adapter():
        assert torch.equal(_states(model, inputs), stock)
        assert model.config._attn_implementation == _bert().config._attn_implementation
    assert torch.equal(_states(model, inputs), sparse)
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert torch.equal(_states(model, inputs), dense)
    assert len(_maps(model)) == 3


def test_maps_of_active_adapters_act_one_after_the_other():
    inputs = _ids()
    model = _attach(_bert())
    model.add_adapter("second", UHopAdapterConfig())
    model.base_model.set_adapter(["default", "second"])
    _move(model)
    query = model.get_submodule("base_model.model.encoder.layer.0.attention.self.query")
    first, second = (query.uhop_phi[name].weight for name in ("default", "second"))
    states = torch.randn(2, 4, 32)
    assert_close(query(states), query.base_layer(states @ first.T @ second.T))
    assert_close(memory_sets_of(model, inputs)[0].features(), memory_sets_of(model, inputs)[0].memories @ first.T @ second.T)
    expected = _states(model, inputs)
    model.merge_adapter()
    assert_close(_states(model, inputs), expected, scale=20)
    model.unmerge_adapter()
    assert torch.equal(_states(model, inputs), expected)
    model.add_adapter("sparse", UHopAdapterConfig(alpha=1.5))
    model.add_adapter("sparser", UHopAdapterConfig(alpha=2.0))
    with pytest.raises(ValueError, match=r"must have one alpha, got \{'sparse': 1.5, 'sparser': 2.0\}"):
        model.base_model.set_adapter(["sparse", "sparser"])


def test_alpha_of_the_model_itself_comes_back():
    inputs = _ids()
    base = use_hopfield_attention(_bert(), 1.2, kernel="hopfield_triton")
    before = _states(base, inputs)
    model = _attach(base, alpha=2.0, move=False)
    assert not torch.allclose(_states(model, inputs), before, atol=1e-3)
    assert model.config._attn_implementation == "hopfield_triton"
    unloaded = model.unload()
    assert torch.equal(_states(unloaded, inputs), before)
    assert unloaded.config.hopfield_alpha == 1.2
    learnable = use_hopfield_attention(_bert(), 1.5, learnable=True)
    with pytest.raises(ValueError, match="the model learns its own alpha; give the adapter alpha=None"):
        _attach(learnable, alpha=1.5)
    assert len(_maps(_attach(learnable))) == 3


def test_a_model_has_our_tags_while_it_has_the_adapter():
    base = _bert()
    base.add_model_tags(["mine"])
    model = _attach(base)
    assert base.model_tags == ["mine", "hopfield", "u-hop"]
    assert _attach(_bert()).merge_and_unload().model_tags == ["hopfield", "u-hop"]
    assert model.unload().model_tags == ["mine"]


def test_a_copy_of_the_model_is_independent():
    inputs = _ids()
    model = _attach(_bert(), alpha=1.5)
    expected = _states(model, inputs)
    other = copy.deepcopy(model)
    assert torch.equal(_states(other, inputs), expected)
    _move(other)
    other.disable_adapter_layers()
    assert torch.equal(_states(other, inputs), _states(_bert(), inputs))
    assert torch.equal(_states(model, inputs), expected)


# Beside LoRA, and quantized


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:All adapters are already merged, nothing to do:UserWarning")
@pytest.mark.filterwarnings("ignore:Already unmerged. Nothing to do:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_lora_below_phi_is_trained_saved_loaded_and_merged(tmp_path):
    inputs = _ids()
    lora = LoraConfig(target_modules=["query", "value"], r=2)
    model = _attach(get_peft_model(_bert(), lora, adapter_name="low").get_base_model(), alpha=1.5)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {kind: sum(kind in name for name in trained) for kind in ("uhop_phi", "lora_A", "lora_B")} == {
        "uhop_phi": 3,
        "lora_A": 6,
        "lora_B": 6,
    }
    expected = _states(model, inputs)
    query = model.get_submodule("base_model.model.encoder.layer.0.attention.self.query")
    states = torch.randn(3, 32)
    assert_close(query(states), query.base_layer(query.uhop_phi["default"](states)))
    model.save_pretrained(tmp_path)
    base = get_peft_model(_bert(), LoraConfig.from_pretrained(tmp_path / "low"), adapter_name="low").get_base_model()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    loaded.load_adapter(tmp_path / "low", "low")
    assert torch.equal(_states(loaded, inputs), expected)
    weight = query.get_base_layer().weight.clone()
    model.merge_adapter()
    assert_close(_states(model, inputs), expected)
    model.unmerge_adapter()
    assert_close(query.get_base_layer().weight, weight)
    assert_close(_states(model.merge_and_unload(), inputs), expected)


def test_peft_does_not_mix_outside_methods():
    with pytest.raises(ValueError, match="'MODELING_UHOP' is not compatible with the `PeftMixedModel`"):
        get_peft_model(_bert(), UHopAdapterConfig(), mixed=True)


class _Int8Linear(nn.Linear):
    """A linear layer whose weight is stored in eight bits."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features)
        self.scale = layer.weight.detach().abs().max() / 127
        self.bias = layer.bias
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, self.weight.to(states.dtype) * self.scale, self.bias)


def test_quantized_projections_are_adapted_but_not_merged():
    base, inputs = _bert(), _ids()
    for layer in base.encoder.layer:
        attention = layer.attention.self
        attention.query, attention.key = _Int8Linear(attention.query), _Int8Linear(attention.key)
    before = _states(base, inputs)
    model = _attach(base, move=False)
    assert torch.equal(_states(model, inputs), before)
    assert all(phi.weight.dtype == torch.float32 for phi in _maps(model))
    losses = StageOne(model, Separation.uhop(), steps=3).run([inputs], progress=False)
    assert losses[-1] < losses[0]
    with pytest.raises(
        ValueError, match=r"only into a plain nn.Linear or Conv1D, got _Int8Linear with a weight of Parameter in torch.int8"
    ):
        model.merge_and_unload()


def test_merging_refuses_values_that_are_not_finite():
    model = _attach(_bert())
    with torch.no_grad():
        _maps(model)[0].weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"the weight that \['default'\] would give is not finite"):
        model.merge_adapter(safe_merge=True)


# The separation step


def test_memories_are_what_the_key_projections_read_without_padding():
    model, inputs = _attach(_bert()), _ids()
    read: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, UHopKeyProjection):
            module.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    _states(model, inputs)
    sets = memory_sets_of(model, inputs)
    assert [each.feature_map for each in sets] == _maps(model)
    for each, expected in zip(sets, read[:3], strict=True):
        assert_close(each.memories, expected)
        assert torch.equal(each.mask, inputs["attention_mask"].bool())


def test_special_tokens_are_left_out():
    model, inputs = _attach(_bert()), _ids()
    inputs["input_ids"][:, 0] = 1
    special = torch.zeros(2, 9, dtype=torch.long)
    special[:, 4] = 1
    expected = inputs["attention_mask"].bool().clone()
    expected[:, 4] = False
    batch = {**inputs, "special_tokens_mask": special}
    assert torch.equal(memory_sets_of(model, batch)[0].mask, expected)
    expected[:, 0] = False
    assert torch.equal(memory_sets_of(model, batch, special_token_ids={1})[0].mask, expected)
    everything = memory_sets_of(model, batch, include_class_token=True, special_token_ids={1})[0].mask
    assert torch.equal(everything, inputs["attention_mask"].bool())
    losses = [StageOne(model, include_class_token=option).losses(batch, None, 0) for option in (False, True)]
    assert not torch.allclose(*losses)


@pytest.mark.parametrize(("name", "fields", "leading"), [("ViT", {}, 1), ("DeiT", {}, 2), ("DINOv3ViT", {"num_register_tokens": 3}, 4)])
def test_tokens_before_the_patches_are_left_out(name, fields, leading):
    base = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**IMAGE, **fields)).eval()
    (first, *_) = memory_sets_of(_attach(base), {"pixel_values": torch.randn(2, 3, 16, 16)})
    assert first.mask.sum(1).tolist() == [16, 16]
    assert not first.mask[:, :leading].any()
    assert first.memories.shape[1] == 16 + leading


def test_masks_of_both_sides_of_an_encoder_decoder():
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    model = _attach(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval())
    inputs = _ids()
    decoder = torch.ones(2, 9, dtype=torch.long)
    decoder[1, 3:] = 0
    batch = {**inputs, "decoder_input_ids": inputs["input_ids"], "decoder_attention_mask": decoder}
    masks = [each.mask for each in memory_sets_of(model, batch)]
    expected = [inputs["attention_mask"].bool(), decoder.bool(), inputs["attention_mask"].bool()]
    assert all(torch.equal(mask, given) for mask, given in zip(masks, expected, strict=True))
    labels = {**inputs, "labels": inputs["input_ids"]}
    assert len(memory_sets_of(model, labels)) == 3


def test_the_mask_of_a_text_is_not_applied_to_an_image_of_the_same_length():
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16)
    model = _attach(transformers.CLIPModel(config).eval())
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[:, 5:] = 0
    batch = {"input_ids": torch.randint(3, 60, (2, 17)), "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16)}
    counts = sorted(each.mask.sum().item() for each in memory_sets_of(model, batch))
    assert counts == [10, 10, 10, 32, 32, 32]


def test_a_model_without_adapter_has_nothing_to_observe():
    with pytest.raises(ValueError, match="BertModel has no Hopfield layer whose memories can be observed"):
        memory_sets_of(_bert(), _ids())
    with pytest.raises(ValueError, match="BertModel has none; UHopAdapterConfig adds them"):
        StageOne(_bert())


def test_separation_equals_a_loop_over_the_same_loss():
    model, inputs = _attach(_bert(), move=False), _ids()
    phi = _maps(model)[0]
    memories = memory_sets_of(model, inputs)[0].memories.detach()
    loss = separation_loss(memories @ phi.weight.T, mask=inputs["attention_mask"].bool())
    (gradient,) = torch.autograd.grad(loss, phi.weight)
    before = phi.weight.detach().clone()
    StageOne(model, parameters="feature_maps", lr=0.5).step(inputs)
    assert_close(phi.weight, before - 0.5 * gradient)


def test_rows_of_a_low_rank_map_cannot_be_scaled():
    StageOne(_attach(_bert()), project=True).step(_ids())
    with pytest.raises(ValueError, match="an adapter or a map of low rank is trained instead of W"):
        StageOne(_attach(_bert(), rank=2), project=True)


def test_noise_is_not_added_to_ids():
    model, inputs = _attach(_bert()), _ids()
    with pytest.raises(ValueError, match="noise cannot be added to input_ids"):
        StageOne(model, Separation.denoising()).step(inputs)
    stage = StageOne(model, Separation.denoising(), corruption=lambda ids: ids.roll(1, 1))
    assert torch.equal(stage.views(inputs)[1]["input_ids"], inputs["input_ids"].roll(1, 1))
    stage.step(inputs)


def _trained(folder: Path, callbacks: list, **fields: Any) -> Any:
    examples = [
        {"input_ids": torch.randint(3, 60, (9,)), "attention_mask": torch.ones(9, dtype=torch.long), "labels": i % 2} for i in range(8)
    ]
    model = _attach(_bert(BertForSequenceClassification), move=False, modules_to_save=["classifier"], **fields)
    arguments = TrainingArguments(str(folder), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=examples, callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_the_callback_separates_inside_the_trainer(tmp_path):
    runs = {}
    for name, callbacks in {
        "plain": [],
        "idle": [SeparationCallback(steps=2, parameters="feature_maps", lr=0.0)],
        "separated": [SeparationCallback(steps=5, parameters="feature_maps", lr=0.1)],
    }.items():
        torch.manual_seed(0)
        trainer = _trained(tmp_path, callbacks, alpha=1.5)
        runs[name] = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters() if parameter.requires_grad])
    assert torch.equal(runs["plain"], runs["idle"])
    assert not torch.allclose(runs["plain"], runs["separated"], atol=1e-4)
    first = trainer.state.log_history[0]
    assert first["separation_loss"] < first["separation_loss_before"]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_special_tokens_of_a_data_set_of_stage_one_are_left_out(tmp_path):
    rows = torch.randint(3, 60, (8, 9))
    special = torch.zeros(9, dtype=torch.long)
    special[:4] = 1
    losses = []
    for more in ({}, {"special_tokens_mask": special}):
        callback = SeparationCallback(parameters="feature_maps", steps=1, dataset=[{"input_ids": row, **more} for row in rows])
        model = _trained(tmp_path, [callback]).model
        losses.append(callback.history[0]["separation_loss"])
    batch = {"input_ids": rows}
    untrained = StageOne(_attach(_bert(BertForSequenceClassification), move=False), parameters="feature_maps")
    assert_close(torch.tensor(losses[0]), untrained.losses(batch, None, 0).mean(), scale=10)
    batch["special_tokens_mask"] = special.expand(8, 9)
    assert_close(torch.tensor(losses[1]), untrained.losses(batch, None, 0).mean(), scale=10)
    assert abs(losses[0] - losses[1]) > 1e-3
    assert len(_maps(model)) == 3


# The same as a model of this package


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_attaching_to_a_vit_equals_from_vit(alpha):
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**IMAGE)).eval()
    hopfield = UHopViTModel.from_vit(copy.deepcopy(vit), alpha=alpha, use_feature_map=True)
    model = _attach(vit, alpha=alpha)
    with torch.no_grad():
        for ours, theirs in zip(_maps(model), _maps(hopfield), strict=True):
            theirs.weight.copy_(ours.weight)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    torch.testing.assert_close(_states(model, inputs), _states(hopfield, inputs), atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(memory_sets_of(model, inputs), hopfield.memory_sets(**inputs), strict=True):
        torch.testing.assert_close(ours.memories[ours.mask].view_as(theirs.memories), theirs.memories, atol=1e-6, rtol=1e-6)
    if alpha == 1.0:
        torch.testing.assert_close(_states(model.merge_and_unload(), inputs), _states(hopfield.to_vit(), inputs), atol=1e-6, rtol=1e-6)


def test_a_model_of_this_package_keeps_its_own_memories():
    model = UHopViTForImageClassification(UHopViTConfig(**IMAGE))
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    for ours, theirs in zip(memory_sets_of(model, batch), model.memory_sets(**batch), strict=True):
        assert torch.equal(ours.memories, theirs.memories)
