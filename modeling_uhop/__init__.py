"""Kernelized modern Hopfield models as Hugging Face models.

The package implements U-Hop (arXiv 2404.03827) and U-Hop+ (arXiv 2410.23126).
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
)

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


AutoConfig.register("uhop_memory", UHopMemoryConfig, exist_ok=True)
AutoModel.register(UHopMemoryConfig, UHopMemoryModel, exist_ok=True)
AutoConfig.register("uhop_vit", UHopViTConfig, exist_ok=True)
AutoModel.register(UHopViTConfig, UHopViTModel, exist_ok=True)
AutoModelForImageClassification.register(UHopViTConfig, UHopViTForImageClassification, exist_ok=True)
register_image_pipeline()
AutoConfig.register("uhop_mil", UHopMILConfig, exist_ok=True)
AutoModel.register(UHopMILConfig, UHopMILModel, exist_ok=True)
AutoModelForSequenceClassification.register(UHopMILConfig, UHopMILForBagClassification, exist_ok=True)
AutoFeatureExtractor.register(UHopMILConfig, UHopMILFeatureExtractor, exist_ok=True)
register()
AutoConfig.register("stanhop", STanHopConfig, exist_ok=True)
AutoModel.register(STanHopConfig, STanHopModel, exist_ok=True)
AutoModelForTimeSeriesPrediction.register(STanHopConfig, STanHopForPrediction, exist_ok=True)

UHopMemoryConfig.register_for_auto_class()
UHopMemoryModel.register_for_auto_class("AutoModel")
UHopViTConfig.register_for_auto_class()
UHopViTModel.register_for_auto_class("AutoModel")
UHopViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
UHopMILConfig.register_for_auto_class()
UHopMILModel.register_for_auto_class("AutoModel")
UHopMILForBagClassification.register_for_auto_class("AutoModelForSequenceClassification")
UHopMILFeatureExtractor.register_for_auto_class()
STanHopConfig.register_for_auto_class()
STanHopModel.register_for_auto_class("AutoModel")
STanHopForPrediction.register_for_auto_class("AutoModelForTimeSeriesPrediction")

__all__ = [
    "DataCollatorForBags",
    "FeatureMap",
    "HopfieldAttention",
    "HopfieldPooling",
    "MemoryReport",
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
