"""Phi and Hopfield attention for any model of transformers, as a method of PEFT."""

from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version


if find_spec("peft") is None or Version(version("peft")) < Version("0.21"):
    raise ImportError("modeling_uhop.attach needs PEFT 0.21 or later: pip install 'peft>=0.21'")
