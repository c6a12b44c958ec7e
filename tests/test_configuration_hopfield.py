"""Tests of what the configurations of all families share: a field that does not exist is named when a
configuration is built, and kept without a word when a saved one is loaded."""

import json

import pytest
from transformers import AutoConfig
from transformers.utils import logging

from modeling_uhop import STanHopConfig, UHopMemoryConfig, UHopMILConfig, UHopViTConfig


FAMILIES = [UHopMemoryConfig, UHopViTConfig, UHopMILConfig, STanHopConfig]


@pytest.fixture
def warned(caplog):
    """What transformers and this package log."""
    names = ("transformers", "modeling_uhop")
    before = [logging.get_logger(name).propagate for name in names]
    for name in names:
        logging.get_logger(name).propagate = True
    yield caplog
    for name, propagate in zip(names, before, strict=True):
        logging.get_logger(name).propagate = propagate


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    ("given", "hint"),
    [({"betta": 3.0}, "; did you mean beta?"), ({"atn_implementation": "eager"}, "; did you mean attn_implementation?"), ({"zzz": 1}, "")],
)
def test_a_field_that_does_not_exist_is_named_with_the_closest_one(kind, given, hint, warned):
    (name,) = given
    config = kind(**given)
    expected = f"{name} is not a field of {kind.__name__} and does not change the model{hint}"
    assert [record.message for record in warned.records] == [expected]
    assert getattr(config, name) == given[name]


def test_the_closest_name_may_be_another_name_of_a_field(warned):
    STanHopConfig(hiden_size=32)
    assert "did you mean hidden_size?" in warned.text


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_every_configuration_of_transformers_accepts_gives_no_warning(kind, warned):
    options = {"num_labels": 3, "problem_type": "regression", "dtype": "float32", "name_or_path": "here", "output_hidden_states": True}
    kind(**options, attn_implementation="eager", output_attentions=True)
    kind(**{name: getattr(kind(), name) for name in kind.attribute_map})
    assert warned.text == ""


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_field_that_does_not_exist_is_kept_without_a_warning(kind, tmp_path, warned):
    kind().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "betta": 3.0}))
    for loaded in (kind.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path), kind.from_json_file(path)):
        assert loaded.betta == 3.0
        assert kind(**loaded.to_dict()).betta == 3.0
        loaded.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text())["betta"] == 3.0
    assert warned.text == ""
