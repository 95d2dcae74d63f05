"""The autoencoders of latent-space models."""

from typing import Any, TypeAlias

from diffusers import AutoencoderKL, AutoencoderTiny

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny


def load(name: str, **options: Any) -> Autoencoder:
    """Load an autoencoder of the class that its config names.

    Args:
        name: Folder or Hub id.
        options: Options of `from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        OSError: If the autoencoder is not found.
    """
    place = {key: options[key] for key in ("subfolder", "revision") if key in options}
    is_tiny = AutoencoderKL.load_config(name, **place).get("_class_name") == "AutoencoderTiny"
    return (AutoencoderTiny if is_tiny else AutoencoderKL).from_pretrained(name, **options)
