"""UHopModel: the tuner that PEFT makes of a UHopAdapterConfig."""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..distributed import reshard
from .adapter_config import UHopAdapterConfig
from .alpha import AttentionSwitch
from .layer import UHopKeyProjection, UHopProjection
from .projections import Projections, find_projections


# What a card of the Hub says of a model with an adapter, as our own cards do.
TAGS = ("hopfield", "u-hop")


class UHopModel(BaseTuner):
    """Phi on what query and key projections read, and Hopfield attention; see `UHopAdapterConfig`.

    It replaces the query and the key projection of each attention layer. PEFT saves, loads,
    switches and merges the adapters.
    """

    prefix = "uhop_"
    tuner_layer_cls = UHopProjection
    target_module_mapping: dict[str, list[str]] = {}

    _found: dict[str, Projections]
    _enabled = True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model; nothing has changed if this raises an error.

        Raises:
            ValueError: If FSDP2 shards the model and the adapter is to be trained; as
                `find_projections` and `use_hopfield_attention`.
        """
        config: Any = self.peft_config[adapter_name]
        if config.feature_map and not config.inference_mode and reshard(model):
            raise ValueError(
                f"FSDP2 shards {type(model).__name__} already, and would not average the gradients of Phi over processes; "
                "attach the adapter before the model is sharded"
            )
        if not hasattr(self, "_switch"):
            self._switch = AttentionSwitch(model)
        self._found = {each.query_name: each for each in find_projections(model, config)}
        self._switch.set(model, self._alpha([adapter_name]))
        # Because the file of an adapter has no entry for a key projection, which shares its Phi, the
        # layers are found by the configuration and not by the state dict.
        super().inject_adapter(model, adapter_name, *args, **{**kwargs, "state_dict": None})
        self._set_alpha()
        add_tags: Any = getattr(model, "add_model_tags", None)
        if add_tags is not None:
            add_tags(list(TAGS))

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._found

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Add Phi to the query projection of an attention layer and to the key projection beside it."""
        found = self._found[current_key]
        query = target
        if not isinstance(target, UHopProjection):
            values = found.value_rows()
            if found.query == found.key:
                query = UHopKeyProjection(target, value_rows=values)
            else:
                query, key = UHopProjection(target), getattr(parent, found.key)
                self._replace_module(parent, found.key, UHopKeyProjection(key, query=query, value_rows=values), key)
            self._replace_module(parent, target_name, query, target)
        if peft_config.feature_map:
            query.add_map(adapter_name, found.width, peft_config)
            if adapter_name not in self.active_adapters:
                query.uhop_phi[adapter_name].requires_grad_(False)

    def _alpha(self, adapter_names: list[str]) -> float | None:
        """The alpha of some adapters together.

        Raises:
            ValueError: If they differ.
        """
        configs = {name: self.peft_config.get(name) for name in adapter_names}
        alphas = {name: config.alpha for name, config in configs.items() if isinstance(config, UHopAdapterConfig)}
        given = {alpha for alpha in alphas.values() if alpha is not None}
        if len(given) > 1:
            raise ValueError(f"adapters that are active together must have one alpha, got {alphas}")
        return next(iter(given), None)

    def _set_alpha(self) -> None:
        self._switch.set(self.model, self._alpha(self.active_adapters) if self._enabled else None)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._enabled = enabled
        self._set_alpha()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or several, whose feature maps act one after the other."""
        self._alpha([adapter_name] if isinstance(adapter_name, str) else list(adapter_name))
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._set_alpha()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter."""
        super().delete_adapter(adapter_name)
        self._set_alpha()

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        alpha = self._alpha(self.active_adapters if adapter_names is None else adapter_names) if merge else None
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self._switch.set(self.model, alpha)
        if not merge and getattr(model, "model_tags", None):
            model.model_tags = [tag for tag in model.model_tags if tag not in TAGS]
        return model
