"""Kernelized modern Hopfield models as Hugging Face models.

The package implements U-Hop (arXiv 2404.03827) and U-Hop+ (arXiv 2410.23126).
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .registration import register_when_imported
from .version import __version__


if TYPE_CHECKING:
    from .attach.adapter_config import UHopAdapterConfig as UHopAdapterConfig
    from .attention_interface import hopfield_attention, plain_hopfield_attention
    from .attention_models import use_hopfield_attention
    from .bag_collator import DataCollatorForBags
    from .capacity import MemoryReport, metastable_sizes
    from .configuration_stanhop import STanHopConfig
    from .configuration_uhop_memory import UHopMemoryConfig
    from .configuration_uhop_mil import UHopMILConfig
    from .configuration_uhop_vit import UHopViTConfig
    from .corruption import add_noise, mask_patterns
    from .energy import association, energy, retrieve, similarity_scores
    from .feature_extraction_uhop_mil import UHopMILFeatureExtractor
    from .feature_map import FeatureMap
    from .hopfield import HopfieldAttention, HopfieldPooling
    from .image_pipeline import UHopImageClassificationPipeline
    from .memories import MemorySet
    from .modeling_stanhop import STanHopForPrediction, STanHopModel
    from .modeling_uhop_memory import UHopMemoryModel
    from .modeling_uhop_mil import UHopMILForBagClassification, UHopMILModel
    from .modeling_uhop_vit import UHopViTForImageClassification, UHopViTModel
    from .pipelines import MultipleInstanceClassificationPipeline
    from .separation import Separation, StageOne, maximize_separation
    from .separation_loss import denoising_loss, separation_loss
    from .simplex import simplex_conjugate, simplex_map
    from .spherical import spherical_code
    from .trainer.callback import SeparationCallback
    from .view_losses import koleo_loss, sigreg_loss, supervised_loss, vicreg_loss
    from .views import BagViews, ImageViews, WindowViews

# The file of each public name. As in transformers, a file is loaded when one of its names is first used.
_FILES = {
    "attach.adapter_config": ["UHopAdapterConfig"],
    "attention_interface": ["hopfield_attention", "plain_hopfield_attention"],
    "attention_models": ["use_hopfield_attention"],
    "bag_collator": ["DataCollatorForBags"],
    "capacity": ["MemoryReport", "metastable_sizes"],
    "configuration_stanhop": ["STanHopConfig"],
    "configuration_uhop_memory": ["UHopMemoryConfig"],
    "configuration_uhop_mil": ["UHopMILConfig"],
    "configuration_uhop_vit": ["UHopViTConfig"],
    "corruption": ["add_noise", "mask_patterns"],
    "energy": ["association", "energy", "retrieve", "similarity_scores"],
    "feature_extraction_uhop_mil": ["UHopMILFeatureExtractor"],
    "feature_map": ["FeatureMap"],
    "hopfield": ["HopfieldAttention", "HopfieldPooling"],
    "image_pipeline": ["UHopImageClassificationPipeline"],
    "memories": ["MemorySet"],
    "modeling_stanhop": ["STanHopForPrediction", "STanHopModel"],
    "modeling_uhop_memory": ["UHopMemoryModel"],
    "modeling_uhop_mil": ["UHopMILForBagClassification", "UHopMILModel"],
    "modeling_uhop_vit": ["UHopViTForImageClassification", "UHopViTModel"],
    "pipelines": ["MultipleInstanceClassificationPipeline"],
    "separation": ["Separation", "StageOne", "maximize_separation"],
    "separation_loss": ["denoising_loss", "separation_loss"],
    "simplex": ["simplex_conjugate", "simplex_map"],
    "spherical": ["spherical_code"],
    "trainer.callback": ["SeparationCallback"],
    "view_losses": ["koleo_loss", "sigreg_loss", "supervised_loss", "vicreg_loss"],
    "views": ["BagViews", "ImageViews", "WindowViews"],
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}

# Because `from modeling_uhop import *` must work without PEFT, `UHopAdapterConfig` is not in this list.
__all__ = [
    "BagViews",
    "DataCollatorForBags",
    "FeatureMap",
    "HopfieldAttention",
    "HopfieldPooling",
    "ImageViews",
    "MemoryReport",
    "MemorySet",
    "MultipleInstanceClassificationPipeline",
    "STanHopConfig",
    "STanHopForPrediction",
    "STanHopModel",
    "Separation",
    "SeparationCallback",
    "StageOne",
    "UHopImageClassificationPipeline",
    "UHopMILConfig",
    "UHopMILFeatureExtractor",
    "UHopMILForBagClassification",
    "UHopMILModel",
    "UHopMemoryConfig",
    "UHopMemoryModel",
    "UHopViTConfig",
    "UHopViTForImageClassification",
    "UHopViTModel",
    "WindowViews",
    "__version__",
    "add_noise",
    "association",
    "denoising_loss",
    "energy",
    "hopfield_attention",
    "koleo_loss",
    "mask_patterns",
    "maximize_separation",
    "metastable_sizes",
    "plain_hopfield_attention",
    "retrieve",
    "separation_loss",
    "sigreg_loss",
    "similarity_scores",
    "simplex_conjugate",
    "simplex_map",
    "spherical_code",
    "supervised_loss",
    "use_hopfield_attention",
    "vicreg_loss",
]


class _Package(ModuleType):
    """A module that loads its public names, and its files, when they are first used."""

    def __getattr__(self, name: str) -> Any:
        if name in _FILE_OF:
            self.__dict__[name] = getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
            return self.__dict__[name]
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Because Python sets a loaded file as an attribute, the file energy.py would hide the function `energy`.
        if not (name in _FILE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
register_when_imported()
