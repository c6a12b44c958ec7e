"""Phi and Hopfield attention for any model of transformers, as a method of PEFT."""

from importlib.util import find_spec


if find_spec("peft") is None:
    raise ImportError("modeling_uhop.attach needs PEFT: pip install peft")
