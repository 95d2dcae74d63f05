"""Layers of an earlier frame that are moved to predict the next frames."""

import math
from collections.abc import Mapping

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

Memory = Mapping[str, torch.Tensor]
"""What `MovingLayers` keep from chunk to chunk, float32.

- `layers` (B, L, 1 + C, H, W): the layers of the keyframe, their opacity and their color times the opacity.
- `motions` (B, L, 3): the motion of each layer since the keyframe.
- `background` (B, 1 + L + C, H, W): where the background is known, where it is the border of each layer, and its color.

A row of zeros is empty: the next frame becomes its keyframe.
"""


class MovingLayers(nn.Module):
    """Divides a frame into layers, and moves each layer rigidly for every predicted frame.

    A network that generates every pixel loses the shape of moving objects in long rollouts. Here, moving objects consist of pixels
    of an earlier frame, in a layered representation (Wang and Adelson 1994) that is predicted as in the spatial transformer
    predictors of Finn et al. (https://arxiv.org/abs/1605.07157, section 3). The background is static. Each layer is rotated
    about its center and translated, and occludes the background and the layers behind it. The smallest layer is in front: a
    larger one would hide it. Background pixels that a layer occluded, including a border of one pixel, are filled at a low
    resolution. Pixels of a layer that another layer occluded are filled with the mean color of its visible pixels nearby.

    The masks are computed from tokens of the last history frame that have not received any action. These tokens depend on the
    timestep unless `history_timestep="zero"`, so that masks may differ between sampling steps; the layers were tested with one
    step, in pixel space. The motion of a layer is a mean of the motions that the tokens of a predicted frame propose, weighted by
    the area of the layer in each patch and by a softmax over scores of the tokens. Its gradient does not reach the masks.

    In a rollout, a memory keeps the keyframe in which the layers were segmented, and their motion since then. So a layer is
    resampled once, however long the rollout, and what is occluded or leaves the frame is not lost. The network predicts the next
    motion from the predicted frames; therefore the center of a layer stays in the frame.

    If the edge of the frame cuts off a layer, its keyframe does not show the whole object. The layer is then segmented again for
    the next chunk, and the prediction consists of the generated frame, the output of the usual output layer, in the patches of
    the old and the new position of the layer and in the adjacent ones. If such a layer is not visible, the whole prediction is the
    generated frame: use at most as many layers as there are objects.

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
        memory: Memory | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Memory]:
        """Predict frames.

        Args:
            frame: The last history frame (B, C, H, W).
            frame_tokens: Its normalized tokens (B, S, D), without actions.
            tokens: Tokens of the predicted frames (B, n, S, D).
            grid: Rows and columns of patches.
            generated: The frames (B, C, n, H, W) of the usual output layer.
            motion_noise: Noise (B, L, 3) that is added to the motions of all frames; see `IRASimTransformer3DModel.forward`.
            memory: The memory after the last history frame, or None; see `Memory`.

        Returns:
            The predicted frames and the moved layers without generated parts, both (B, C, n, H, W) and float32, and the memory
            after the last predicted frame.
        """
        frame, generated = frame.float(), generated.float()
        memory, masks = self._recall(frame, self.segment(frame, frame_tokens, grid), memory)
        layers = memory["layers"]
        motions = self._pool(masks, self.motions(tokens).float())  # (B, n, L, 3)
        if motion_noise is not None:
            motions = motions + motion_noise.to(motions).unsqueeze(1)
        motions = self._keep_inside(layers, memory["motions"].unsqueeze(1) + motions)
        layers = self._move(layers, motions)  # (B, L, 1 + C, n, H, W)
        moved, background = self._background(memory["background"], layers, self._interpolate(self.fill(tokens), grid))
        for layer in _sort(layers, _order(memory["layers"])).unbind(1):
            moved = moved * (1 - layer[:, :1]) + layer[:, 1:]
        area = self._generated_area(masks, layers[:, :, 0], _is_whole(memory["layers"][:, :, 0]))
        memory = {"layers": memory["layers"], "motions": motions[:, -1], "background": background}
        return torch.where(area, generated, moved), moved, memory

    def segment(self, frame: torch.Tensor, frame_tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return the masks of the layers of a frame (B, L, H, W), including parts that other layers cover.

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

    def _recall(
        self, frame: torch.Tensor, masks: torch.Tensor, memory: Memory | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Keep the layers of a memory that are whole, and cut the others out of a frame.

        Args:
            frame: The frame (B, C, H, W).
            masks: The masks of its layers (B, L, H, W).
            memory: The memory, or None.

        Returns:
            The memory, and the opacities of its layers in the frame (B, L, H, W).
        """
        layers, motions = self._cut_out(frame, masks), masks.new_zeros(*masks.shape[:2], 3)
        if memory is None:
            return {"layers": layers, "motions": motions, "background": self._static(frame, masks)}, masks
        known = {name: tensor.to(frame) for name, tensor in memory.items()}
        moved = self._move(known["layers"][:, :, :1], known["motions"].unsqueeze(1))[:, :, 0, 0].clamp(0, 1)
        kept = _is_whole(known["layers"][:, :, 0])  # (B, L)
        layers = torch.where(_like(kept, layers), known["layers"], layers)
        motions = torch.where(_like(kept, motions), known["motions"], motions)
        masks = torch.where(_like(kept, masks), moved, masks)
        background = self._static(frame, masks)
        background = torch.where(_like(kept.all(1), background), known["background"], background)
        return {"layers": layers, "motions": motions, "background": background}, masks

    def _cut_out(self, frame: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Return the layers (B, L, 1 + C, H, W) of a frame (B, C, H, W) with masks (B, L, H, W); see `Memory`."""
        order = _order(masks.unsqueeze(2))
        seen = torch.ones_like(masks[:, :1])  # (B, 1, H, W)
        layers: list[torch.Tensor] = []
        for mask in reversed(_sort(masks, order).split(1, dim=1)):  # from front to back
            color = mask * frame
            if layers:
                # where a layer in front may cover this one, it has the mean color of its visible pixels nearby
                color = seen * color + (1 - seen) * mask * self._mean_color(frame, mask * seen)
            layers.insert(0, torch.cat([mask, color], dim=1))
            seen = seen * (1 - mask)
        return _sort(torch.stack(layers, dim=1), order.argsort(1))

    def _static(self, frame: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Return the background (B, 1 + L + C, H, W) of a frame with masks (B, L, H, W); see `Memory`."""
        border = (2 * _dilate(masks) - 1).relu()  # 0 around a faint mask, as in a new model
        return torch.cat([(1 - masks).prod(1, keepdim=True), border, frame], dim=1)

    def _background(
        self, background: torch.Tensor, layers: torch.Tensor, fill: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill the background of predicted frames.

        Args:
            background: The background (B, 1 + L + C, H, W) of the memory.
            layers: The moved layers (B, L, 1 + C, n, H, W).
            fill: The colors (B, C, n, H, W) where the background is unknown.

        Returns:
            The predicted background (B, C, n, H, W), and the background of the memory after the last frame.
        """
        known, border, color = background.unsqueeze(2).split([1, self.num_layers, fill.shape[1]], dim=1)
        left = 1 - _dilate(layers[:, :, 0].clamp(0, 1))  # (B, L, n, H, W)
        # the border of a layer is kept until the layer has left
        known = known * (1 - border * left).prod(1, keepdim=True)
        color = known * color + (1 - known) * fill
        last = left[:, :, -1]
        filled = torch.cat([torch.ones_like(last[:, :1]), torch.zeros_like(last), color[:, :, -1]], dim=1)
        return color, torch.where(last.amin(1, keepdim=True) > 0.5, filled, background)

    def _generated_area(self, masks: torch.Tensor, moved: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Return where the frames are generated, as booleans (B, 1, n, H, W).

        Args:
            masks: Opacities of the layers in the last history frame (B, L, H, W).
            moved: Opacities of the layers in the predicted frames (B, L, n, H, W).
            whole: Which layers were whole in the keyframe (B, L).
        """
        shapes = masks > 0.5
        hidden = ((shapes.sum((2, 3)) < VISIBLE_AREA) & ~whole).any(1)
        near = ((moved > 0.5) | shapes.unsqueeze(2)) & ~_like(whole, moved)
        size = self.patch_size
        near = F.max_pool2d(near.any(1).float(), size)  # (B, n, rows, columns)
        near = _dilate(near).repeat_interleave(size, 2).repeat_interleave(size, 3)  # (B, n, H, W)
        return (near > 0).unsqueeze(1) | hidden.view(-1, 1, 1, 1, 1)

    def _pool(self, masks: torch.Tensor, proposals: torch.Tensor) -> torch.Tensor:
        """Average the proposals (B, n, S, 4 L) over the areas of masks (B, L, H, W); return (B, n, L, 3)."""
        areas = F.avg_pool2d(masks.detach(), self.patch_size).flatten(2).mT + 1e-5  # (B, S, L)
        motions, scores = proposals.unflatten(3, (self.num_layers, 4)).split([3, 1], dim=-1)
        weights = (areas.log()[:, None, ..., None] + scores).softmax(2)  # (B, n, S, L, 1)
        return (weights * motions).sum(2)

    def _keep_inside(self, layers: torch.Tensor, motions: torch.Tensor) -> torch.Tensor:
        """Limit motions (B, n, L, 3) so that the centers of layers (B, L, 1 + C, H, W) stay in the frame."""
        height, width = layers.shape[-2:]
        centers = _centers(layers[:, :, 0]).unsqueeze(1)  # (B, 1, L, 2)
        corner = torch.tensor([width - 1, height - 1], device=layers.device)
        low, high = -centers / self.patch_size, (corner - centers) / self.patch_size
        return torch.cat([motions[..., :2].clamp(low, high), motions[..., 2:]], dim=-1)

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

    def _move(self, layers: torch.Tensor, motions: torch.Tensor) -> torch.Tensor:
        """Move layers (B, L, 1 + C, H, W) by motions (B, n, L, 3); return (B, L, 1 + C, n, H, W).

        The first channel is the opacity. The motions are x, y and the angle. Bicubic interpolation exceeds the range of
        opacities and colors at edges. This keeps small objects from shrinking.
        """
        height, width = layers.shape[-2:]
        device = layers.device
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        centers = _centers(layers[:, :, 0]).flatten(0, 1).unsqueeze(1)  # (B L, 1, 2)
        motions = motions.transpose(1, 2).flatten(0, 1)  # (B L, n, 3)
        shift, angle = motions[..., :2] * self.patch_size, motions[..., 2:] * RADIANS
        x = x.flatten() - (centers[..., :1] + shift[..., :1])  # (B L, n, H W)
        y = y.flatten() - (centers[..., 1:] + shift[..., 1:])
        cos, sin = angle.cos(), angle.sin()
        x, y = centers[..., :1] + cos * x + sin * y, centers[..., 1:] - sin * x + cos * y
        points = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)  # (B L, n, H W, 2)
        flat = layers.flatten(0, 1)
        if device.type == "mps":  # PyTorch has no bicubic sampling for Apple GPUs
            flat, points = flat.cpu(), points.cpu()
        moved = F.grid_sample(flat, points, mode="bicubic", padding_mode="zeros", align_corners=False)
        return moved.to(device).unflatten(0, layers.shape[:2]).unflatten(4, (height, width))


def _like(values: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Append dimensions of size 1, so that values broadcast to another tensor."""
    return values.view(*values.shape, *[1] * (other.ndim - values.ndim))


def _order(layers: torch.Tensor) -> torch.Tensor:
    """Return the indices (B, L) of layers (B, L, 1 + C, H, W) from back to front, the largest first."""
    return layers[:, :, 0].mean((2, 3)).argsort(dim=1, descending=True)


def _sort(layers: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return layers (B, L, ...) in an order (B, L)."""
    return layers.gather(1, _like(order, layers).expand_as(layers))


def _is_whole(masks: torch.Tensor) -> torch.Tensor:
    """Return which layers with masks (B, L, H, W) are visible and not cut off, as booleans (B, L).

    The edge of the frame cuts off a layer if many of its pixels are on the edge, relative to its size.
    """
    shapes = (masks > 0.5).float()
    area = shapes.sum((2, 3))
    edge = area - shapes[..., 1:-1, 1:-1].sum((2, 3))
    return (edge <= CUT_LENGTH * area.sqrt()) & (area >= VISIBLE_AREA)


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
