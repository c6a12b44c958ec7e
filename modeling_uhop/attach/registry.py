"""Make UHopAdapterConfig known to PEFT."""

from typing import Any

from peft import mapping

from .adapter_config import AdapterType, UHopAdapterConfig
from .tuner import UHopModel


def register() -> None:
    """Add the method to the tables in which PEFT looks a method up.

    `peft.utils.register_peft_method` fills the same tables, but accepts only members of the enum
    `PeftType`, which an enum of Python does not let other packages extend. The keys of the tables
    are compared as strings, so a member of an enum of our own is found by PEFT under its name, also
    after it has been read from a file.
    """
    name: Any = AdapterType.MODELING_UHOP
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = UHopAdapterConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = UHopModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = UHopModel.prefix
