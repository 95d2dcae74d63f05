"""Features of actions for the networks."""

import torch


def action_features(
    actions: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, frequencies: int
) -> torch.Tensor:
    """Compute `(action - offset) * scale` and its sines and cosines.

    Args:
        actions: Actions (..., A) in raw units.
        scale: Scale, one number or (A,), float32.
        offset: Offset, one number or (A,), float32.
        frequencies: Number of octaves, the lowest with a wavelength of 16 scaled units; 0 disables the sines and cosines.

    Returns:
        Features (..., A (1 + 2 frequencies)), float32.
    """
    actions = (actions.float() - offset) * scale  # a 16-bit type would lose digits of raw actions
    if not frequencies:
        return actions
    octaves = 2.0 ** torch.arange(frequencies, device=actions.device)
    phases = (actions.unsqueeze(-1) * octaves * (torch.pi / 8)).flatten(-2)
    return torch.cat([actions, phases.sin(), phases.cos()], dim=-1)
