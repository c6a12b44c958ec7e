"""Make this package's classes, pipelines and attention kernels known to transformers and PEFT.

To register a class, both the class and the auto classes must be loaded. This takes seconds and
loads PyTorch. Therefore `import modeling_uhop` only watches imports: what it adds is registered
when a program first imports the part of transformers or PEFT that it is added to, for example by
`from transformers import AutoModel`.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _configurations(auto: Any) -> None:
    from .configuration_stanhop import STanHopConfig
    from .configuration_uhop_memory import UHopMemoryConfig
    from .configuration_uhop_mil import UHopMILConfig
    from .configuration_uhop_vit import UHopViTConfig

    for config in (STanHopConfig, UHopMemoryConfig, UHopMILConfig, UHopViTConfig):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _models(auto: Any) -> None:
    from .modeling_stanhop import STanHopForPrediction, STanHopModel
    from .modeling_uhop_memory import UHopMemoryModel
    from .modeling_uhop_mil import UHopMILForBagClassification, UHopMILModel
    from .modeling_uhop_vit import UHopViTForImageClassification, UHopViTModel

    models = (STanHopModel, UHopMemoryModel, UHopMILModel, UHopViTModel)
    heads = (STanHopForPrediction, UHopMILForBagClassification, UHopViTForImageClassification)
    for model in (*models, *heads):
        getattr(auto, model._auto_class).register(model.config_class, model, exist_ok=True)


def _feature_extractors(auto: Any) -> None:
    from .configuration_uhop_mil import UHopMILConfig
    from .feature_extraction_uhop_mil import UHopMILFeatureExtractor

    auto.AutoFeatureExtractor.register(UHopMILConfig, UHopMILFeatureExtractor, exist_ok=True)


def _pipelines(_: Any) -> None:
    from .image_pipeline import register as register_for_images
    from .pipelines import register as register_for_bags

    register_for_images()
    register_for_bags()


def _attention(_: Any) -> None:
    import_module(".attention_models", __package__)


def _adapter(_: Any) -> None:
    # Because an old PEFT must not break an import of transformers, the error is left to those who
    # import UHopAdapterConfig.
    with suppress(ImportError):
        import_module(".attach.registry", __package__).register()


# What is registered after transformers has loaded a module. An entry is removed when it is done.
_waiting: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _configurations,
    "transformers.models.auto.modeling_auto": _models,
    "transformers.models.auto.feature_extraction_auto": _feature_extractors,
    "transformers.pipelines": _pipelines,
    "transformers.modeling_utils": _attention,
    "peft.mapping": _adapter,
}


class _Watch(MetaPathFinder):
    """Finder that runs the waiting registrations after an import of transformers, PEFT or this package.

    Because modules of both packages import the auto classes while they are themselves half loaded,
    a registration waits for the end of the outermost import.
    """

    depth = 0

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in ("transformers", "peft", __package__):
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(spec.loader)
        return spec

    def register(self) -> None:
        """Run each registration whose module is loaded."""
        self.depth += 1
        try:
            while name := next((name for name in _waiting if name in sys.modules), None):
                _waiting[name](sys.modules[name])
                del _waiting[name]
        finally:
            self.depth -= 1


class _Watched(Loader):
    """Loader that counts how deep an import is, and otherwise is the loader that it wraps."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        _watch.depth += 1
        try:
            self.loader.exec_module(module)
        finally:
            _watch.depth -= 1
        if _watch.depth == 0:
            _watch.register()


_watch = _Watch()


def register_when_imported() -> None:
    """Register what this package adds to a part of transformers when that part is loaded, or at once
    if it is."""
    if _watch not in sys.meta_path:
        sys.meta_path.insert(0, _watch)
        _watch.register()
