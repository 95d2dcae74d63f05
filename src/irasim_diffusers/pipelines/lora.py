"""Load LoRA weights, optionally together with a fully trained action encoder."""

import re
from typing import Any

import torch
from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.utils.torch_utils import unwrap_module
from peft.tuners.tuners_utils import BaseTunerLayer

from ..models.transformer_irasim import ACTION_ENCODER

PATTERNS = ("exclude_modules", "layers_pattern", "layers_to_transform")
"""Entries of a PEFT config that select modules, in addition to `target_modules`."""
MODULE_NAME = re.compile(r"\^?[\w.]+\$?")
MAX_RANK, MAX_ALPHA = 1 << 16, 1e6


class IRASimLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """Load, fuse and save LoRA layers of the transformer, and load a trained action encoder.

    The methods are those of diffusers for CogVideoX, whose pipelines also have LoRA layers only in the transformer.
    """

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        low_cpu_mem_usage: bool = True,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load LoRA weights like `~loaders.StableDiffusionLoraLoaderMixin.load_lora_weights` of diffusers.

        If the file contains the action encoder and the null action, they replace those of the model until `unload_lora_weights`;
        the last loaded file takes precedence. `disable_lora`, `set_adapters` and `delete_adapters` affect the LoRA layers only.
        A `.bin` file is read only if the path or `weight_name` names it, or `use_safetensors` is passed as False or None.

        Raises:
            ValueError: If LoRA layers are missing or invalid, metadata is invalid or (for keys of PEFT) missing, there are other
                weights, or the action encoder does not fit, or cannot be replaced because it is quantized or offloaded, or layers are fused.
            OSError: If the file is not found.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, dict) or not str(source).endswith(".bin"):
            kwargs.setdefault("use_safetensors", True)
        state_dict, metadata = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        self._check_alpha(state_dict, metadata)
        state_dict = {_standard_key(key): value for key, value in state_dict.items()}
        layers = {key: value for key, value in state_dict.items() if "lora" in key}
        self._check_layers(layers)
        if metadata is not None:
            metadata = _checked_metadata({_standard_key(key): value for key, value in metadata.items()}, layers)
        encoder = {key.removeprefix("transformer."): value for key, value in state_dict.items() if key not in layers}
        if (unknown := [key for key in encoder if not key.startswith(ACTION_ENCODER)]) or not layers:
            raise ValueError(
                "the file must contain LoRA layers of the pipeline's transformer and may contain its action encoder, got other "
                f"keys {unknown[:3]} and {len(layers)} LoRA tensors."
            )
        if encoder and self._is_fused():
            raise ValueError(
                "the file contains an action encoder, but LoRA layers are fused into the current one: call "
                "`unfuse_lora()`, or `unload_lora_weights()`, which keeps the fused weights."
            )
        own = self._writable_weights() if encoder else {}
        misshapen = [key for key, value in encoder.items() if key not in own or own[key].shape != value.shape]
        if misshapen:
            raise ValueError(
                f"the action encoder in the file must have the names and shapes of this model's, which differ for {misshapen}."
            )
        self.load_lora_into_transformer(
            layers,
            transformer=self.transformer,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )
        if encoder:
            transformer = unwrap_module(self.transformer)  # several pipelines may share it
            kept = {key: own[key].clone() for key in encoder} | getattr(transformer, "_own_action_encoder", {})
            transformer._own_action_encoder = kept
            self._set_weights(encoder)

    @staticmethod
    def _check_alpha(state_dict: dict[str, torch.Tensor], metadata: dict[str, Any] | None) -> None:
        """Raise ValueError for LoRA files saved by PEFT, whose `lora_alpha` is in a separate file."""
        if metadata is None and any(key.startswith("base_model.model.") for key in state_dict):
            raise ValueError(
                "a LoRA file with keys `base_model.model.` needs the `lora_alpha` of its adapter_config.json: load it with PEFT "
                "and save it with `pipe.save_lora_weights(..., transformer_lora_adapter_metadata=config.to_dict())`."
            )

    def _check_layers(self, layers: dict[str, torch.Tensor]) -> None:
        """Raise ValueError for LoRA layers of unknown modules, or with weights that are not floating-point."""
        modules = {
            name.replace(".base_layer", "") for name, _ in unwrap_module(self.transformer).named_modules() if name
        }
        unknown = [key for key in layers if key.removeprefix("transformer.").split(".lora")[0] not in modules]
        if unknown:
            raise ValueError(f"the LoRA weights do not match this model: no modules for {unknown[:3]}.")
        for key, value in layers.items():
            if not value.is_floating_point():
                raise ValueError(f"LoRA weights must be floating-point, got {value.dtype} for {key!r}.")

    def unload_lora_weights(self) -> None:
        """Remove all LoRA layers and restore the model's own action encoder, unless the layers are fused.

        Fused layers and the action encoder of their file are kept: `fuse_lora()` followed by this method merges them
        permanently.
        """
        transformer = unwrap_module(self.transformer)
        own = {} if self._is_fused() else getattr(transformer, "_own_action_encoder", {})
        if own:
            self._set_weights(own)
        super().unload_lora_weights()
        if transformer is not self.transformer:
            transformer.unload_lora()  # diffusers skips modules that `torch.compile` has wrapped
        transformer._own_action_encoder = {}

    def _is_fused(self) -> bool:
        return any(isinstance(module, BaseTunerLayer) and module.merged for module in self.transformer.modules())

    def _writable_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of the transformer's own action encoder, under their names without LoRA.

        Raises:
            ValueError: If a weight is quantized or not in memory.
        """
        transformer = unwrap_module(self.transformer)
        own = {
            key.replace(".base_layer.", "."): value
            for key, value in transformer.state_dict().items()
            if key.startswith(ACTION_ENCODER) and "lora_" not in key
        }
        plain = (type(value) is torch.Tensor and value.is_floating_point() for value in own.values())
        offload = _get_top_level_group_offload_hook(transformer)
        on_disk = offload is not None and offload.config.offload_to_disk_path is not None
        if not all(plain) or on_disk or any(value.is_meta for value in own.values()):
            raise ValueError(
                "the action encoder can be replaced only if it is in memory and not quantized: `remove_all_hooks()` ends "
                "sequential offload, which can be enabled again afterward; load LoRA before enabling group offload to disk; "
                "set `modules_to_not_convert=['action_embed', 'trajectory_embed']` in the quantization config."
            )
        return own

    def _set_weights(self, values: dict[str, torch.Tensor]) -> None:
        own = self._writable_weights()
        with torch.no_grad():
            for key, value in values.items():
                own[key].copy_(value)


def _checked_metadata(metadata: dict[str, Any], layers: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Check the stored PEFT config, and replace its patterns with the modules in the file.

    PEFT matches `target_modules` and other strings as regular expressions, which can take unlimited time.

    Raises:
        ValueError: If a rank or scale is out of range, or the key of a pattern is not a module name.
    """
    prefix = "transformer."
    safe = metadata | {
        f"{prefix}target_modules": sorted({key.removeprefix(prefix).split(".lora")[0] for key in layers}),
        **{f"{prefix}{name}": None for name in PATTERNS if f"{prefix}{name}" in metadata},
    }
    for name, kind, most in (("r", int, MAX_RANK), ("lora_alpha", int | float, MAX_ALPHA)):
        pattern = f"{'rank' if name == 'r' else 'alpha'}_pattern"
        patterns = safe.get(f"{prefix}{pattern}") or {}
        if not isinstance(patterns, dict) or not all(MODULE_NAME.fullmatch(key) for key in patterns):
            raise ValueError(f"`{pattern}` of the LoRA file must have module names as keys, got {patterns!r:.100}.")
        for value in [safe.get(f"{prefix}{name}", 1), *patterns.values()]:
            if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= most:
                raise ValueError(
                    f"`{name}` of the LoRA file must be a positive {'integer' if kind is int else 'number'} of at most {most:g}, "
                    f"got {value!r:.60}."
                )
    return safe


def _standard_key(key: str) -> str:
    """Return a key with diffusers' prefix `transformer.`; other libraries write another prefix or none."""
    return "transformer." + key.removeprefix("diffusion_model.").removeprefix("transformer.")
