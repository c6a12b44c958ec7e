"""Phi attached to tiny models of transformers: what each model computes, trains, saves and merges."""

from typing import Any

import peft
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_uhop import StageOne
from modeling_uhop.feature_map import FeatureMap
from tests.attach_table import CASES, MARKS, PAGE, attached, model_of, row
from tests.conftest import assert_close
from tests.test_attention_models import _answer, _relative


# peft 0.21 reads an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROWS = {line.split("`")[1]: line for line in PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0].splitlines()[2:]}
ATTACHED = [case for case in CASES if "refused" not in ROWS.get(case[0], "refused").split("|")[2]]
SPARSE = [case for case in ATTACHED if ROWS[case[0]].endswith("| yes |")]


def _ids(cases: list) -> dict[str, Any]:
    return {"ids": [case[0] for case in cases]}


def _maps(model: torch.nn.Module) -> list[FeatureMap]:
    return [module for module in model.modules() if isinstance(module, FeatureMap)]


def _randomize(model: torch.nn.Module) -> None:
    """Move every Phi away from the identity."""
    with torch.no_grad():
        for phi in _maps(model):
            for parameter in phi.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


@pytest.mark.parametrize("case", CASES, **_ids(CASES))
def test_the_table_of_the_guide_says_what_is_adapted(case):
    assert row(case) == ROWS.get(case[0]), "python -m tests.attach_table writes the table"


def test_the_table_has_many_models():
    assert len(ATTACHED) >= 35
    assert [name for name, line in ROWS.items() if "refused" in line.split("|")[2]] != []
    assert len(ROWS) == len(CASES)


@pytest.mark.parametrize("case", ATTACHED, **_ids(ATTACHED))
def test_a_model_computes_the_same_until_phi_moves_and_after_it_is_merged(case, tmp_path):
    base, inputs = model_of(case), case[2]()
    with torch.no_grad():
        expected = _answer(base, inputs)
        model = attached(case)
        assert torch.equal(_answer(model, inputs), expected)
        _randomize(model)
        changed = _answer(model, inputs)
        assert _relative(changed, expected) > 0.01
        with model.disable_adapter():
            assert torch.equal(_answer(model, inputs), expected)
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(model_of(case), tmp_path).eval()
        assert torch.equal(_answer(loaded, inputs), changed)
        model.merge_adapter()
        assert _relative(_answer(model, inputs), changed) < 1e-5
        model.unmerge_adapter()
        assert torch.equal(_answer(model, inputs), changed)
        merged = model.merge_and_unload()
        assert type(merged) is type(base)
        assert merged.state_dict().keys() == base.state_dict().keys()
        assert _relative(_answer(merged, inputs), changed) < 1e-5


@pytest.mark.parametrize("case", ATTACHED, **_ids(ATTACHED))
def test_the_separation_step_moves_every_map_and_nothing_else(case):
    model, inputs = attached(case), case[2]()
    maps = [phi.weight.detach().clone() for phi in _maps(model)]
    others = {name: parameter.clone() for name, parameter in model.named_parameters() if "uhop_phi" not in name}
    stage = StageOne(model, parameters="feature_maps", lr=0.0)
    assert len(stage.step(inputs)) == len(maps)
    assert all(torch.equal(phi.weight, before) for phi, before in zip(_maps(model), maps, strict=True))
    stage = StageOne(model, parameters="feature_maps", lr=0.1)
    before = stage.losses(inputs, None, 0)
    stage.step(inputs)
    assert stage.losses(inputs, None, 0).sum() < before.sum()
    assert not any(torch.equal(phi.weight, before) for phi, before in zip(_maps(model), maps, strict=True))
    assert all(torch.equal(model.get_parameter(name), before) for name, before in others.items())


@pytest.mark.parametrize("case", SPARSE, **_ids(SPARSE))
def test_phi_trains_under_sparse_attention(case):
    model, inputs = attached(case, alpha=1.5), case[2]()
    first = _answer(model, inputs)
    assert _relative(first, _answer(model_of(case), inputs)) > 1e-3
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    first.square().mean().backward()
    gradients = [parameter.grad for phi in _maps(model) for parameter in phi.parameters()]
    # A query that finds one key, as one of CLIP does, gives Phi no gradient.
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    optimizer.step()
    with torch.no_grad():
        trained = _answer(model, inputs)
        assert trained.isfinite().all()
        assert not torch.equal(trained, first)
        merged = model.merge_and_unload()
        assert merged.config.hopfield_alpha == 1.5
        assert _relative(_answer(merged, inputs), trained) < 1e-4


class _Stop(Exception):
    """Ends a forward pass."""


@pytest.mark.parametrize("case", SPARSE, **_ids(SPARSE))
def test_values_are_computed_without_phi(case, monkeypatch):
    seen = []

    def record(module, query, key, value, *args, **kwargs):
        seen.append((query, key, value))
        raise _Stop

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "hopfield", record)
    model, inputs = attached(case, alpha=1.5), case[2]()
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(_Stop):
                model(**inputs)
            _randomize(model)
    (query, key, value), (other_query, other_key, other_value) = seen
    assert_close(other_value, value)
    assert not torch.allclose(query, other_query, atol=1e-3)
    assert not torch.allclose(key, other_key, atol=1e-3)


def test_values_of_bloom_are_computed_without_phi(monkeypatch):
    """BLOOM interleaves queries, keys and values, and does not use the attention interface."""
    case = next(case for case in CASES if case[0] == "BloomForCausalLM")
    model, inputs = attached(case), case[2]()
    attention = model.get_submodule("base_model.model.transformer.h.0.self_attention")
    original, seen = attention._reshape, []

    def record(fused):
        seen.append(original(fused))
        return seen[-1]

    monkeypatch.setattr(attention, "_reshape", record)
    with torch.no_grad():
        model(**inputs)
        _randomize(model)
        model(**inputs)
    (query, key, value), (other_query, other_key, other_value) = seen
    assert torch.equal(other_value, value)
    assert not torch.allclose(query, other_query, atol=1e-3)
    assert not torch.allclose(key, other_key, atol=1e-3)
