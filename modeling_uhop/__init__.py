"""Kernelized modern Hopfield models as Hugging Face models.

The package implements U-Hop (arXiv 2404.03827) and U-Hop+ (arXiv 2410.23126).
"""

import transformers

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
from .image_pipeline import register as register_image_pipeline
from .memories import MemorySet
from .modeling_stanhop import STanHopForPrediction, STanHopModel
from .modeling_uhop_memory import UHopMemoryModel
from .modeling_uhop_mil import UHopMILForBagClassification, UHopMILModel
from .modeling_uhop_vit import UHopViTForImageClassification, UHopViTModel
from .pipelines import MultipleInstanceClassificationPipeline, register
from .separation import Separation, StageOne, maximize_separation
from .separation_loss import denoising_loss, separation_loss
from .simplex import simplex_conjugate, simplex_map
from .spherical import spherical_code
from .trainer.callback import SeparationCallback
from .version import __version__


for _config in (UHopMemoryConfig, UHopViTConfig, UHopMILConfig, STanHopConfig):
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _config.register_for_auto_class()
for _model in (
    UHopMemoryModel,
    UHopViTModel,
    UHopViTForImageClassification,
    UHopMILModel,
    UHopMILForBagClassification,
    STanHopModel,
    STanHopForPrediction,
):
    _auto_class = next(name for name, entry in _model._auto_classes.items() if entry.endswith(f".{_model.__name__}"))
    getattr(transformers, _auto_class).register(_model.config_class, _model, exist_ok=True)
    _model.register_for_auto_class(_auto_class)
transformers.AutoFeatureExtractor.register(UHopMILConfig, UHopMILFeatureExtractor, exist_ok=True)
UHopMILFeatureExtractor.register_for_auto_class()
register_image_pipeline()
register()

__all__ = [
    "DataCollatorForBags",
    "FeatureMap",
    "HopfieldAttention",
    "HopfieldPooling",
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
    "__version__",
    "add_noise",
    "association",
    "denoising_loss",
    "energy",
    "hopfield_attention",
    "mask_patterns",
    "maximize_separation",
    "metastable_sizes",
    "plain_hopfield_attention",
    "retrieve",
    "separation_loss",
    "similarity_scores",
    "simplex_conjugate",
    "simplex_map",
    "spherical_code",
    "use_hopfield_attention",
]
