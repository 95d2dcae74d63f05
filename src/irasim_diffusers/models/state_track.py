"""Poses of the bodies in a planar scene, read from the history and followed under the actions.

A network that draws frames in one pass has to foresee every contact of a window at once, which it learns slowly. Poses are
few numbers, their motion is simple where it is described from the body that is pushed, and once they are known, a frame is easy
to draw. So a track of poses is learned beside the video, from poses that the data record, and a sketch drawn from the
poses of a frame is shown to the tokens of that frame.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

KINDS = {"point": 2, "pose": 3}
"""Kinds of bodies and the components of their states: x and y, and the angle of a pose in radians, from x towards y."""

WIDTH = 16.0
"""Width of the picture in the coordinates that the networks see."""


class StateTrack(ModelMixin, ConfigMixin):
    """Reads the poses of bodies from latents of the history, follows them under actions, and sketches the frames.

    The reader is a small convolutional network: for each body a map of where it is, whose centre of mass is its position.
    Poses are then followed step by step by a recurrent network that sees positions, actions and velocities from the first
    body that has an angle, and predicts in that body's frame by how much all bodies move. A frame is sketched pixel by pixel, by
    a network that knows where the pixel lies seen from each body.

    Args:
        bodies: Kind of each body in the order of the state's components: `"point"` (x, y) or `"pose"` (x, y, angle).
        extent: Coordinates of the picture's left, top, right and bottom borders, in the units of the states. The picture must be
            seen from above, its pixels square.
        state_keys: Names of the data set's features that make up the state, one after the other.
        state_names: Names of the components.
        in_channels: Channels of the latents.
        action_dim: Components of an action; the first two are a target or a motion in the plane of the bodies.
        action_space: `"absolute"` for targets in the units of the states, `"relative"` for motions.
        action_scale: What further components, and motions, are multiplied with.
        read_channels: Channels of the network that reads.
        follow_width: Width of the network that follows.
        follow_layers: Layers of the network that follows.
        memory: Size of its memory, for what poses do not show.
        draw_width: Width of the network that draws.

    Raises:
        ValueError: If bodies, extent, action space or action dimension are no such things.
    """

    _no_split_modules = ["StateTrack"]

    @register_to_config
    def __init__(
        self,
        bodies: Sequence[str] = ("point",),
        extent: Sequence[float] = (0.0, 0.0, 1.0, 1.0),
        state_keys: Sequence[str] | None = None,
        state_names: Sequence[str] | None = None,
        in_channels: int = 4,
        action_dim: int = 2,
        action_space: str = "absolute",
        action_scale: float = 1.0,
        read_channels: int = 64,
        follow_width: int = 256,
        follow_layers: int = 3,
        memory: int = 32,
        draw_width: int = 192,
    ) -> None:
        super().__init__()
        if not bodies or not set(bodies) <= KINDS.keys():
            raise ValueError(f"`bodies` must be some of {sorted(KINDS)}, one for each body, got {list(bodies)}.")
        if len(extent) != 4 or extent[2] <= extent[0] or extent[3] <= extent[1]:
            raise ValueError(
                f"`extent` must be the picture's left, top, right and bottom, right and bottom the greater, got {list(extent)}."
            )
        if action_space not in ("absolute", "relative"):
            raise ValueError(f"`action_space` must be 'absolute' or 'relative', got {action_space!r}.")
        if action_dim < 2:
            raise ValueError(f"`action_dim` must be at least 2, a place or a motion in the plane, got {action_dim}.")
        self.state_dim = sum(KINDS[kind] for kind in bodies)
        self.num_poses = sum(kind == "pose" for kind in bodies)
        self.unit = (extent[2] - extent[0]) / WIDTH
        kinds = [KINDS[kind] for kind in bodies]
        starts = [sum(kinds[:index]) for index in range(len(kinds))]
        self.body_starts = starts
        self._angle = [start + 2 for start, kind in zip(starts, bodies, strict=True) if kind == "pose"]
        self._reference = list(bodies).index("pose") if self.num_poses else 0

        channels, number = read_channels, len(bodies)
        self.read_in = nn.Conv2d(in_channels, channels, kernel_size=2, stride=2)
        self.read_blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, channels),
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, padding=2 ** (index % 3), dilation=2 ** (index % 3)),
            )
            for index in range(6)
        )
        self.read_out = nn.Sequential(nn.GroupNorm(1, channels), nn.SiLU(), nn.Conv2d(channels, channels + number, 1))
        self.read_pose = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, 2 * channels), nn.SiLU(), nn.Linear(2 * channels, 4)) for _ in bodies
        )

        features = 26 * (2 * number - 1) + 4 * number + 5 * self.num_poses + 1 + action_dim - 2 + memory
        self.follow_in = nn.Linear(features, follow_width)
        self.follow_blocks = _residual_blocks(follow_width, follow_layers)
        self.follow_out = nn.Sequential(nn.LayerNorm(follow_width), nn.Linear(follow_width, self.state_dim + memory))

        features = 26 + 9 * in_channels + 2 * (26 * number + 2 * self.num_poses)
        self.draw_in = nn.Linear(features, draw_width)
        self.draw_blocks = _residual_blocks(draw_width, 2)
        self.draw_out = nn.Sequential(nn.LayerNorm(draw_width), nn.Linear(draw_width, in_channels, bias=False))
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialise every layer as torch does; bodies lie still at first, and sketches are empty."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
        for module in (self.follow_out[1], self.draw_out[1]):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def device_for(self, device: torch.device) -> torch.device:
        """Where to compute for `device`: where the weights lie, unless they come by themselves, from meta or in groups."""
        own = self.read_in.weight.device
        return device if own.type == "meta" or _get_top_level_group_offload_hook(self) is not None else own

    @property
    def dtype_of_layers(self) -> torch.dtype:
        """Type in which layers compute: that of a convolution, since weights of linear layers may be quantised."""
        return self.read_in.weight.dtype

    def normalise(self, states: torch.Tensor) -> torch.Tensor:
        """States (..., S) in raw units to those of the networks: the picture is 16 wide, its middle the origin."""
        return self._scaled(states.float(), 1 / self.unit, self._middle(states) / -self.unit)

    def denormalise(self, states: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalise`."""
        return self._scaled(states, self.unit, self._middle(states))

    def _middle(self, states: torch.Tensor) -> torch.Tensor:
        left, top, right, bottom = self.config.extent
        return torch.tensor([(left + right) / 2, (top + bottom) / 2], dtype=torch.float32, device=states.device)

    def _scaled(self, states: torch.Tensor, scale: float, offset: torch.Tensor) -> torch.Tensor:
        parts = []
        for start, kind in zip(self.body_starts, self.config.bodies, strict=True):
            parts.append(states[..., start : start + 2] * scale + offset)
            if kind == "pose":
                parts.append(states[..., start + 2 : start + 3])
        return torch.cat(parts, dim=-1)

    def errors(self, states: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Differences (..., E) of normalised states, an angle's as those of points at a distance of 4, a quarter picture."""
        parts = []
        for start, kind in zip(self.body_starts, self.config.bodies, strict=True):
            parts.append(states[..., start : start + 2] - truth[..., start : start + 2])
            if kind == "pose":
                angle, true = states[..., start + 2 : start + 3], truth[..., start + 2 : start + 3]
                parts += [4 * (angle.cos() - true.cos()), 4 * (angle.sin() - true.sin())]
        return torch.cat(parts, dim=-1)

    def read(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised states (B, F, S), float32, in clean latents (B, C, F, H, W)."""
        batch_size, _, frames, height, width = latents.shape
        hidden = latents.transpose(1, 2).flatten(0, 1).to(self.dtype_of_layers)
        if height % 2 or width % 2:
            hidden = nn.functional.pad(hidden, (0, width % 2, 0, height % 2), mode="replicate")
        hidden = self.read_in(hidden)
        for block in self.read_blocks:
            hidden = hidden + block(hidden)
        hidden = self.read_out(hidden).float().flatten(2)  # (B F, channels + bodies, S)
        features, maps = hidden.split([self.config.read_channels, len(self.config.bodies)], dim=1)
        shares = maps.softmax(-1)  # (B F, bodies, S)
        grid = self._grid((height + 1) // 2, (width + 1) // 2, 2 * WIDTH / width, latents.device)
        places = shares @ grid  # (B F, bodies, 2)
        pooled = (shares @ features.mT).to(self.dtype_of_layers)  # (B F, bodies, channels)
        states = []
        for index, (head, kind) in enumerate(zip(self.read_pose, self.config.bodies, strict=True)):
            more = head(pooled[:, index]).float()
            states.append(places[:, index] + more[:, :2])
            if kind == "pose":
                states.append(torch.atan2(more[:, 3:], more[:, 2:3]))
        return torch.cat(states, dim=-1).unflatten(0, (batch_size, frames))

    @staticmethod
    def _grid(rows: int, columns: int, side: float, device: torch.device) -> torch.Tensor:
        """Middles (rows columns, 2), x and y, of squares that divide the picture."""
        down, across = (torch.arange(number, device=device) + 0.5 for number in (rows, columns))
        down, across = (down - rows / 2) * side, (across - columns / 2) * side
        grid = torch.meshgrid(across, down, indexing="xy")
        return torch.stack(grid, dim=-1).flatten(0, 1)

    def follow(self, history: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Follow bodies under actions.

        Args:
            history: Normalised states (B, h, S) of the frames seen, h >= 1; velocities come from the last two.
            actions: Actions (B, n, A) in raw units.

        Returns:
            Normalised states (B, n, S) of the n frames after them, float32.
        """
        state = history[:, -1].float()
        velocity, known = torch.zeros_like(state), torch.zeros_like(state[:, :1])
        if history.shape[1] > 1:
            velocity, known = state - history[:, -2].float(), known + 1
            velocity = self._turns_within_a_half(velocity)
        if self.config.action_space == "absolute":
            aims = (actions[..., :2].float() - self._middle(actions)) / self.unit
        else:
            aims = actions[..., :2].float() * self.config.action_scale
        others = actions[..., 2:].float() * self.config.action_scale
        memory = state.new_zeros(len(state), self.config.memory)
        states = []
        for step in range(actions.shape[1]):
            change, memory = self._step(state, velocity, known, aims[:, step], others[:, step], memory)
            state, velocity, known = state + change, change, torch.ones_like(known)
            states.append(state)
        return torch.stack(states, dim=1) if states else history[:, :0].float()

    def _turns_within_a_half(self, change: torch.Tensor) -> torch.Tensor:
        for column in self._angle:
            turn = change[:, column : column + 1]
            turn = torch.atan2(turn.sin(), turn.cos())
            change = torch.cat([change[:, :column], turn, change[:, column + 1 :]], dim=1)
        return change

    def _step(
        self,
        state: torch.Tensor,
        velocity: torch.Tensor,
        known: torch.Tensor,
        aim: torch.Tensor,
        others: torch.Tensor,
        memory: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much states (B, S) change in a step, and the new memory."""
        places = [state[:, start : start + 2] for start in self.body_starts]
        angles = [state[:, column] for column in self._angle]
        facing = angles[0] if angles else torch.zeros_like(state[:, 0])
        cos, sin, centre = facing.cos(), facing.sin(), places[self._reference]

        def inward(vector: torch.Tensor) -> torch.Tensor:
            return torch.stack([cos * vector[:, 0] + sin * vector[:, 1], cos * vector[:, 1] - sin * vector[:, 0]], -1)

        def outward(vector: torch.Tensor) -> torch.Tensor:
            return torch.stack([cos * vector[:, 0] - sin * vector[:, 1], cos * vector[:, 1] + sin * vector[:, 0]], -1)

        near = [inward(place - centre) for index, place in enumerate(places) if index != self._reference]
        near += [inward(aim - place if self.config.action_space == "absolute" else aim) for place in places]
        features = [_waves(torch.cat(near, dim=-1)), *(place / 4 for place in places)]
        features += [torch.stack([angle.cos(), angle.sin()], -1) for angle in angles]
        features += [torch.stack([(angle - facing).cos(), (angle - facing).sin()], -1) for angle in angles]
        features += [inward(velocity[:, start : start + 2]) for start in self.body_starts]
        features += [4 * velocity[:, column : column + 1] for column in self._angle]
        features += [known, others, memory]
        hidden = self.follow_in(torch.cat(features, dim=-1).to(self.dtype_of_layers))
        for block in self.follow_blocks:
            hidden = hidden + block(hidden)
        moved, memory = self.follow_out(hidden).float().split([self.state_dim, self.config.memory], dim=-1)
        parts = []
        for start, kind in zip(self.body_starts, self.config.bodies, strict=True):
            parts.append(outward(moved[:, start : start + 2]))
            if kind == "pose":
                parts.append(moved[:, start + 2 : start + 3])
        return torch.cat(parts, dim=-1), memory.tanh()

    def forward(
        self, history: torch.Tensor, actions: torch.Tensor, states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States of a window.

        Args:
            history: Clean latents (B, C, h, H, W) of the frames seen.
            actions: Actions (B, n, A) in raw units.
            states: States (B, h, S) in raw units of the history, where they are known; None to read them.

        Returns:
            States (B, h + n, S) in raw units, those of the history and those that follow, float32.
        """
        with torch.autocast(history.device.type, enabled=False):
            seen = self.read(history) if states is None else self.normalise(states)
            return self.denormalise(torch.cat([seen, self.follow(seen, actions)], dim=1))

    def draw(self, history: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Sketch the frames of a window from the poses in them and from the last frame seen.

        Args:
            history: Clean latents (B, C, h, H, W) of the frames seen.
            states: States (B, h + n, S) in raw units of all frames.

        Returns:
            Latents (B, C, n, H, W) of the n frames after them, relative to the last frame of the history.
        """
        seen, (height, width) = history[:, :, -1], history.shape[-2:]
        features = self.pixel_features(seen, self.normalise(states[:, history.shape[2] - 1 :]))
        return self.draw_pixels(features).mT.unflatten(-1, (height, width)).transpose(1, 2)

    def draw_pixels(self, features: torch.Tensor) -> torch.Tensor:
        """Latents (B, n, P, C) relative to the frame seen, from `pixel_features` (B, 1 + n, P, D).

        The frame seen is drawn too, and taken away: where nothing moves, nothing changes.
        """
        hidden = self.draw_in(features.to(self.dtype_of_layers))
        for block in self.draw_blocks:
            hidden = hidden + block(hidden)
        drawn = self.draw_out(hidden)
        return drawn[:, 1:] - drawn[:, :1]

    def pixel_features(
        self, seen: torch.Tensor, states: torch.Tensor, pixels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What is known of each latent pixel before it is drawn.

        Args:
            seen: Latents (B, C, H, W) of the last frame seen.
            states: Normalised states (B, 1 + n, S) in it and in the n frames to draw.
            pixels: Numbers (B, P) of the pixels wanted, row by row; None for all H W.

        Returns:
            Features (B, 1 + n, P, D): where the pixel lies in the picture, seen from the bodies of the frame, and of the
            frame seen, and what was seen there.
        """
        height, width = seen.shape[-2:]
        grid = self._grid(height, width, WIDTH / width, seen.device).expand(len(seen), -1, -1)  # (B, H W, 2)
        around = nn.functional.unfold(nn.functional.pad(seen, (1, 1, 1, 1), mode="replicate"), 3).mT  # (B, H W, 9 C)
        if pixels is not None:
            grid, around = (
                values.gather(1, pixels.unsqueeze(-1).expand(-1, -1, values.shape[-1])) for values in (grid, around)
            )
        places = self._seen_from_bodies(states, grid)
        same = torch.cat([_waves(grid), around.to(places), places[:, 0]], dim=-1)  # in all frames
        return torch.cat([places, same.unsqueeze(1).expand(-1, places.shape[1], -1, -1)], dim=-1)

    def _seen_from_bodies(self, states: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Places `grid` (B, P, 2) as seen from the bodies of each frame (B, F, P, E)."""
        features = []
        for start, kind in zip(self.body_starts, self.config.bodies, strict=True):
            across, down = (grid.unsqueeze(1) - states[..., None, start : start + 2]).unbind(-1)  # (B, F, P) each
            if kind == "pose":
                angle = states[..., start + 2 : start + 3]
                cos, sin = angle.cos().expand_as(across), angle.sin().expand_as(across)
                across, down = cos * across + sin * down, cos * down - sin * across
                features += [cos.unsqueeze(-1), sin.unsqueeze(-1)]
            features.append(_waves(torch.stack([across, down], -1)))
        return torch.cat(features, dim=-1)


def _residual_blocks(width: int, number: int) -> nn.ModuleList:
    """Blocks whose outputs are added to their inputs."""
    return nn.ModuleList(
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        for _ in range(number)
    )


def _waves(places: torch.Tensor, octaves: int = 6) -> torch.Tensor:
    """Places (..., P) with their sines and cosines (..., 13 P), the longest wave as long as the picture is wide."""
    phases = (
        places.unsqueeze(-1) * 2.0 ** torch.arange(octaves, device=places.device) * (2 * torch.pi / WIDTH)
    ).flatten(-2)
    return torch.cat([places / 4, phases.sin(), phases.cos()], dim=-1)
