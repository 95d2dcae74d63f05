"""Layers of the last history frame that are moved to predict the next frames."""

import math

import torch
from torch import nn
from torch.nn import functional as F

GAIN = 16.0
"""Factor of the mask logits, so that masks become almost binary within a few hundred training steps."""
INITIAL_LOGIT = -2.3
"""Initial logit of the mask of a single layer, so that layers are almost empty at first."""
INITIAL_DEVIATION = 1.0
"""Initial standard deviation of the mask logits."""
GRID = 2
"""Rows and columns of mask logits and of background colors per patch; they are interpolated bilinearly."""
RADIANS = 0.5
"""Angle of a motion of one unit; a translation by one unit is one patch."""
CUT_LENGTH = 0.5
"""Number of edge pixels, relative to the square root of its area, above which the edge cuts off a layer."""
VISIBLE_AREA = 4
"""Minimum area of a visible layer, in pixels."""
# These values were chosen for 96x96 pixels and not tuned, except for `CUT_LENGTH` (examples/pusht/EXPERIMENTS.md).


class MovingLayers(nn.Module):
    """Divides the last history frame into layers, and moves each layer rigidly for every predicted frame.

    A network that generates every pixel loses the shape of moving objects in long rollouts. Here, moving objects consist of pixels
    of the last history frame, in a layered representation (Wang and Adelson 1994) that is predicted as in the spatial transformer
    predictors of Finn et al. (https://arxiv.org/abs/1605.07157, section 3). The background is static. Each layer is rotated
    about its center and translated, and occludes the background and the layers behind it. The smallest layer is in front: a
    larger one would hide it, and what is hidden in one frame is lost for the next one. Background pixels that a layer occluded,
    including a border of one pixel, are filled at a low resolution. Pixels of a layer that another layer occluded are filled
    with the mean color of its visible pixels nearby.

    The masks are computed from tokens of the last history frame that have not received any action. These tokens depend on the
    timestep unless `history_timestep="zero"`, so that masks may differ between sampling steps; the layers were tested with one
    step, in pixel space. The motion of a layer is a mean of the motions that the tokens of a predicted frame propose, weighted by
    the area of the layer in each patch and by a softmax over scores of the tokens. Its gradient does not reach the masks.

    Layers cannot show what the last history frame does not show, such as the hidden part of an object at the edge of the frame.
    If the edge of the last history frame cuts off a layer, the prediction therefore consists of the generated frame, the output
    of the usual output layer, in the patches of the old and the new position of the layer and in the adjacent ones. If any
    layer is not visible, the whole prediction is the generated frame: use at most as many layers as there are objects that are
    always visible.

    The moved layers and the generated frame are trained with separate losses, as complete predictions: with a joint loss, the
    generated frame is learned first, and the layers remain unused. No states are required.

    Args:
        dim: Number of channels of the tokens.
        in_channels: Number of channels C of a frame.
        patch_size: Side length of a patch.
        num_layers: Number L of moving layers.
    """

    def __init__(self, dim: int, in_channels: int, patch_size: int, num_layers: int) -> None:
        super().__init__()
        self.num_layers, self.patch_size = num_layers, patch_size
        self.masks = nn.Linear(dim, num_layers * (GRID**2 + in_channels))
        self.motions = nn.Linear(dim, num_layers * 4)  # x, y, angle and score
        self.fill = nn.Linear(dim, GRID**2 * in_channels)

    def initialize_weights(self) -> None:
        """Initialize masks that are almost empty but differ between layers, and motions of zero."""
        for linear in (self.motions, self.fill):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.masks.weight, std=INITIAL_DEVIATION / GAIN / self.masks.in_features**0.5)
        nn.init.zeros_(self.masks.bias)
        logit = (INITIAL_LOGIT - math.log(self.num_layers)) / GAIN
        with torch.no_grad():
            self.masks.bias.unflatten(0, (self.num_layers, -1))[:, : GRID**2] = logit

    def forward(
        self,
        frame: torch.Tensor,
        frame_tokens: torch.Tensor,
        tokens: torch.Tensor,
        grid: tuple[int, int],
        generated: torch.Tensor,
        motion_noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict frames.

        Args:
            frame: The last history frame (B, C, H, W).
            frame_tokens: Its normalized tokens (B, S, D), without actions.
            tokens: Tokens of the predicted frames (B, n, S, D).
            grid: Rows and columns of patches.
            generated: The frames (B, C, n, H, W) of the usual output layer.
            motion_noise: Noise (B, L, 3) that is added to the motions of all frames; see `IRASimTransformer3DModel.forward`.

        Returns:
            The predicted frames and the moved layers without generated parts, both (B, C, n, H, W) and float32.
        """
        frame, generated = frame.float(), generated.float()
        masks = self.segment(frame, frame_tokens, grid)  # (B, L, H, W)
        motions = self._pool(masks, self.motions(tokens).float())  # (B, n, L, 3)
        if motion_noise is not None:
            motions = motions + motion_noise.to(motions).unsqueeze(1)
        order = masks.mean((2, 3)).argsort(dim=1, descending=True)  # from back to front
        masks = masks.gather(1, order[:, :, None, None].expand_as(masks))
        motions = motions.gather(2, order[:, None, :, None].expand_as(motions))
        layers = self._move_layers(frame, masks, motions)
        moved = self._background(frame, masks, layers, self._interpolate(self.fill(tokens), grid))
        for layer in layers:
            moved = moved * (1 - layer[:, :1]) + layer[:, 1:]
        return torch.where(self._generated_area(masks, layers), generated, moved), moved

    def segment(self, frame: torch.Tensor, frame_tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return the masks of the layers (B, L, H, W), including parts that other layers cover.

        The logits of a pixel are the sum of a value at its position, and a weight per channel and patch times the color of the
        pixel. The tokens predict the weights, and the values at a low resolution, so that masks have edges only where the
        color changes.
        """
        size = self.patch_size
        logits = self.masks(frame_tokens).float().unflatten(2, (self.num_layers, -1))  # (B, S, L, ...)
        positions, colors = logits.split([GRID**2, frame.shape[1]], dim=-1)
        positions = self._interpolate(positions.mT.flatten(2).unsqueeze(1), grid).squeeze(2)  # (B, L, H, W)
        patches = frame.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, rows, size, columns, size)
        colors = colors.unflatten(1, grid).permute(0, 3, 4, 1, 2)[:, :, :, :, None, :, None]
        colors = (colors * patches.unsqueeze(1)).sum(2)  # not a matrix product, whose precision autocast would reduce
        return (GAIN * (positions + colors.flatten(4, 5).flatten(2, 3))).sigmoid()

    def _move_layers(self, frame: torch.Tensor, masks: torch.Tensor, motions: torch.Tensor) -> list[torch.Tensor]:
        """Move the layers of a frame (B, C, H, W) with masks (B, L, H, W) by motions (B, n, L, 3).

        Masks and layers are ordered from back to front. Each returned layer is (B, 1 + C, n, H, W): its opacity, and its color
        times the opacity.
        """
        seen = torch.ones_like(masks[:, :1])  # (B, 1, H, W)
        centers = _centers(masks)
        layers: list[torch.Tensor] = []
        for index in reversed(range(self.num_layers)):
            mask = masks[:, index, None]
            color = mask * frame
            if index < self.num_layers - 1:
                # where a layer in front may cover this one, it has the mean color of its visible pixels nearby
                color = seen * color + (1 - seen) * mask * self._mean_color(frame, mask * seen)
            layers.insert(0, self._move(torch.cat([mask, color], dim=1), centers[:, index], motions[:, :, index]))
            seen = seen * (1 - mask)
        return layers

    def _background(
        self, frame: torch.Tensor, masks: torch.Tensor, layers: list[torch.Tensor], fill: torch.Tensor
    ) -> torch.Tensor:
        """Return a frame (B, C, H, W) without its layers (B, C, n, H, W), which are replaced by `fill`.

        The border of a layer is not replaced where the moved layer covers it.
        """
        static = torch.ones_like(masks[:, None, :1])  # (B, 1, 1, H, W)
        for mask, layer in zip(masks.split(1, dim=1), layers, strict=True):
            border = (2 * _dilate(mask) - 1).relu().unsqueeze(2)  # 0 around a faint mask, as in a new model
            left = 1 - _dilate(layer[:, :1].clamp(0, 1))
            static = static * (1 - mask.unsqueeze(2)) * (1 - border * left)
        return static * frame.unsqueeze(2) + (1 - static) * fill

    def _generated_area(self, masks: torch.Tensor, layers: list[torch.Tensor]) -> torch.Tensor:
        """Return where layers with masks (B, L, H, W) are not fully visible, as booleans (B, 1, n, H, W).

        The edge of the frame cuts off a layer if many of its pixels are on the edge, relative to its size.
        """
        shapes = (masks > 0.5).float()
        area = shapes.sum((2, 3))  # (B, L)
        edge = area - shapes[..., 1:-1, 1:-1].sum((2, 3))
        cut = edge > CUT_LENGTH * area.sqrt()
        moved = torch.stack([layer[:, 0] > 0.5 for layer in layers], dim=1).float()  # (B, L, n, H, W)
        near = torch.maximum(moved, shapes.unsqueeze(2)) * cut[:, :, None, None, None]
        size = self.patch_size
        near = F.max_pool2d(near.amax(1), size)  # (B, n, rows, columns)
        near = _dilate(near).repeat_interleave(size, 2).repeat_interleave(size, 3)  # (B, n, H, W)
        hidden = (area < VISIBLE_AREA).any(1)
        return (near > 0).unsqueeze(1) | hidden.view(-1, 1, 1, 1, 1)

    def _pool(self, masks: torch.Tensor, proposals: torch.Tensor) -> torch.Tensor:
        """Average the proposals (B, n, S, 4 L) over the areas of masks (B, L, H, W); return (B, n, L, 3)."""
        areas = F.avg_pool2d(masks.detach(), self.patch_size).flatten(2).mT + 1e-5  # (B, S, L)
        motions, scores = proposals.unflatten(3, (self.num_layers, 4)).split([3, 1], dim=-1)
        weights = (areas.log()[:, None, ..., None] + scores).softmax(2)  # (B, n, S, L, 1)
        return (weights * motions).sum(2)

    def _interpolate(self, values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Interpolate GRID x GRID values per token (B, n, S, GRID GRID C) bilinearly; return (B, C, n, H, W)."""
        values = values.float().unflatten(3, (GRID, GRID, -1)).unflatten(2, grid)
        values = values.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # (B, n, C, rows GRID, columns GRID)
        size = [side * self.patch_size for side in grid]
        enlarged = F.interpolate(values.flatten(0, 1), size=size, mode="bilinear")
        return enlarged.unflatten(0, values.shape[:2]).transpose(1, 2)

    def _mean_color(self, frame: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Return the mean color (B, C, H, W) of visible pixels (B, 1, H, W) in the 3 x 3 patches around."""
        sums = F.avg_pool2d(torch.cat([visible, visible * frame], dim=1), self.patch_size)
        sums = F.interpolate(F.avg_pool2d(sums, 3, stride=1, padding=1), scale_factor=self.patch_size, mode="bilinear")
        return sums[:, 1:] / (sums[:, :1] + 1e-5)

    def _move(self, layer: torch.Tensor, centers: torch.Tensor, motions: torch.Tensor) -> torch.Tensor:
        """Move a layer (B, 1 + C, H, W) with center x, y (B, 2) by motions; return (B, 1 + C, n, H, W).

        The motions (B, n, 3) are x, y and the angle. The first channel is the opacity, the others are the color times the
        opacity. Bicubic interpolation exceeds their range at edges. This keeps small objects from shrinking: they are lost
        earlier in rollouts if the opacity is limited to [0, 1].
        """
        height, width = layer.shape[-2:]
        y, x = torch.meshgrid(
            torch.arange(height, device=layer.device), torch.arange(width, device=layer.device), indexing="ij"
        )
        shift, angle = motions[..., :2] * self.patch_size, motions[..., 2:] * RADIANS
        centers = centers[:, None]
        x = x.flatten() - (centers[..., :1] + shift[..., :1])  # (B, n, H W)
        y = y.flatten() - (centers[..., 1:] + shift[..., 1:])
        cos, sin = angle.cos(), angle.sin()
        x, y = centers[..., :1] + cos * x + sin * y, centers[..., 1:] - sin * x + cos * y
        points = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)  # (B, n, H W, 2)
        device = layer.device
        if device.type == "mps":  # PyTorch has no bicubic sampling for Apple GPUs
            layer, points = layer.cpu(), points.cpu()
        moved = F.grid_sample(layer, points, mode="bicubic", padding_mode="zeros", align_corners=False)
        return moved.to(device).unflatten(3, (height, width))


def _dilate(masks: torch.Tensor) -> torch.Tensor:
    """Extend masks (..., H, W) with values of at least 0 by one pixel; on a CPU faster than pooling."""
    padded = F.pad(masks, (1, 1, 1, 1))
    rows = torch.maximum(torch.maximum(padded[..., :-2, :], padded[..., 1:-1, :]), padded[..., 2:, :])
    return torch.maximum(torch.maximum(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:])


def _centers(masks: torch.Tensor) -> torch.Tensor:
    """Return the centers of mass x, y (B, L, 2) of masks (B, L, H, W), without gradients."""
    masks = masks.detach()
    mass = masks.sum((2, 3)) + 1e-3
    x = (masks.sum(2) * torch.arange(masks.shape[3], device=masks.device)).sum(2)
    y = (masks.sum(3) * torch.arange(masks.shape[2], device=masks.device)).sum(2)
    return torch.stack([x / mass, y / mass], dim=-1)
