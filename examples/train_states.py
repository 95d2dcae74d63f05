"""Train a track of poses: a reader of the history's latents, a network that follows bodies under actions, and one that sketches.

    accelerate launch examples/train_states.py --dataset data/pusht-train --vae runs/pusht-vae --output_dir runs/pusht-states \
        --state_keys observation.state observation.environment_state --bodies point pose --extent 0 0 512 512

A network that follows, trained alone (`--parts follow`), learns from states, and pictures of the training data are not read.
`train.py --state_track runs/pusht-states` gives it to a world model, whose tokens then see the sketch of their frame. It is for
scenes seen from above, in which bodies move in the plane of the picture, and whose data record where they are. Latents are
encoded once, in float32, and shared with `train.py --mixed_precision no` by `--cache_dir`. The same command run again goes on
from the last checkpoint.
"""

import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, send_to_device, set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch.nn.functional import smooth_l1_loss
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from irasim_diffusers.data import LatentClips, PreparedEpisodes, cache_latents, episode_states, open_dataset
from irasim_diffusers.models import StateTrack
from irasim_diffusers.models.state_track import KINDS
from irasim_diffusers.training import load_state_track, newest_checkpoint, remove_leftovers, save_checkpoint

PARTS = ("read", "follow", "draw")
OWN = ("state_keys", "bodies", "extent", "action_space", "action_scale")  # what a trained track has
MAY_CHANGE = (
    *("output_dir", "cache_dir", "max_train_steps", "checkpointing_steps"),
    *("validation_dataset", "validation_split", "validation_steps", "max_validation_episodes"),
)


@dataclass
class StatesArguments:
    dataset: str = field(metadata={"help": "LeRobotDataset, IRASim-format or `datasets` folder, or Hub id"})
    vae: str = field(metadata={"help": "the world model's autoencoder: folder or Hub id"})
    output_dir: str = field(metadata={"help": "where checkpoints and, at the end, the track are written"})
    state_keys: list[str] = field(
        default_factory=list, metadata={"help": "vector features that make up the state, one after the other"}
    )
    bodies: list[str] = field(
        default_factory=list,
        metadata={
            "help": "kind of each body in the order of the state: point (x, y) or pose (x, y, angle in radians)"
        },
    )
    extent: list[float] = field(
        default_factory=list,
        metadata={"help": "the picture's left, top, right and bottom in the units of the states"},
    )
    pretrained: str | None = field(
        default=None,
        metadata={
            "help": "track or pipeline to start from, folder or Hub id; it says what states, bodies, extent and actions are"
        },
    )
    validation_dataset: str | None = field(default=None, metadata={"help": "held-out data set"})
    cache_dir: str | None = field(default=None, metadata={"help": "where latents go (default: in the output)"})
    split: str = field(default="train", metadata={"help": "split of the data, or a part of one as train[:90%%]"})
    validation_split: str = field(default="train", metadata={"help": "split of the validation data"})
    cameras: list[str] = field(
        default_factory=list,
        metadata={"help": "cameras, stacked into one picture; left,right makes a row (default: the only one)"},
    )
    max_train_episodes: int | None = field(default=None, metadata={"help": "use this many episodes"})
    max_validation_episodes: int = 50
    action_space: str | None = field(
        default=None,
        metadata={"help": "absolute (default) where actions are places in the units of the states, or relative"},
    )
    action_scale: float | None = field(
        default=None, metadata={"help": "what relative actions are multiplied with (default: 1)"}
    )
    max_follow: int = field(default=15, metadata={"help": "most frames that bodies are followed in training"})
    train_batch_size: int = field(default=512, metadata={"help": "windows that are followed per step and process"})
    read_batch_size: int = field(default=64, metadata={"help": "frames that are read per step and process"})
    draw_batch_size: int = field(default=64, metadata={"help": "frames that are sketched per step and process"})
    draw_pixels: int = field(
        default=256, metadata={"help": "latent pixels drawn of each of these, most where something moves"}
    )
    parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": "networks to train; the others stay as they are"}
    )
    state_noise: float = field(
        default=0.02,
        metadata={"help": "deviation of the poses that are followed or drawn from, in sixteenths of the picture"},
    )
    max_train_steps: int = 3000
    learning_rate: float = 1e-3
    lr_warmup_steps: int = 100
    checkpointing_steps: int = 500
    validation_steps: int = 500
    seed: int = 0


@dataclass
class Recorded:
    """What is learned from: all frames of all episodes one after the other."""

    latents: torch.Tensor  # (N, C, h, w), scaled, float16; empty where nobody looks at pictures
    actions: torch.Tensor  # (N, A), raw units
    states: torch.Tensor  # (N, S), raw units
    lengths: torch.Tensor  # (N,), frames that follow in the same episode
    names: list[str]  # of the components of the state, where the data have them

    def starts(self, ahead: int, number: int, rng: np.random.Generator) -> torch.Tensor:
        """Some frames (number,), drawn at random, that so many follow in the same episode."""
        return torch.from_numpy(rng.choice(torch.nonzero(self.lengths >= ahead)[:, 0].numpy(), size=number))

    def window(self, first: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, frames, S), and the actions (B, frames - 1, A) between them, from some frames on."""
        chosen = first[:, None] + torch.arange(frames)
        return self.states[chosen], self.actions[chosen[:, :-1]]


class Training(torch.nn.Module):
    """One forward pass through the networks that are trained, which distributed wrappers need."""

    def __init__(self, track: StateTrack) -> None:
        super().__init__()
        self.track = track

    def forward(self, **batches: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Sum of the errors of poses that are read and followed, and of what is drawn; see `batch`."""
        track, losses = self.track, []
        with torch.autocast(track.device.type, enabled=False):  # as when sampling
            if "read" in batches:
                latents, states = batches["read"]
                losses.append(_error(track.errors(track.read(latents)[:, 0], track.normalise(states))))
            if "follow" in batches:
                seen, actions, followed = batches["follow"]
                losses.append(_error(track.errors(track.follow(seen, actions), track.normalise(followed))))
        if "draw" in batches:
            latents, states, pixels = batches["draw"]
            drawn = track.draw_pixels(track.pixel_features(latents[:, 0], states, pixels))  # (B, n, P, C)
            true = (latents[:, 1:] - latents[:, :1]).flatten(3).mT
            true = true.gather(2, pixels[:, None, :, None].expand_as(drawn))
            losses.append((drawn - true).square().mean() / VARIANCE)
        return torch.stack(losses).sum()


def _error(differences: torch.Tensor) -> torch.Tensor:
    return smooth_l1_loss(differences, torch.zeros_like(differences), beta=0.05)


SKETCHED = 3
"""Frames that are sketched of each frame seen."""

VARIANCE = 0.05
"""About that of relative latents, so that errors of all networks are of like size."""


def batch(
    data: Recorded, arguments: StatesArguments, step: int, process: int, track: StateTrack
) -> dict[str, tuple[torch.Tensor, ...]]:
    """What a step learns from, fixed by the flags, step and process, so that a resumed run sees the same."""
    rng = np.random.default_rng([arguments.seed, step, process])
    batches: dict[str, tuple[torch.Tensor, ...]] = {}
    if "read" in arguments.parts:
        read = torch.from_numpy(rng.integers(len(data.latents), size=arguments.read_batch_size))
        batches["read"] = data.latents[read].float()[:, :, None], data.states[read]
    if "follow" in arguments.parts:
        frames = _follow_length(step / arguments.max_train_steps, arguments.max_follow)
        history = int(rng.integers(1, 3))
        several = max(arguments.train_batch_size * 4 // max(frames, 4), 1)  # short windows are many
        states, actions = data.window(data.starts(history + frames - 1, several, rng), history + frames)
        seen = track.normalise(states[:, :history])
        seen = seen + arguments.state_noise * torch.from_numpy(rng.standard_normal(seen.shape, np.float32))
        batches["follow"] = seen, actions[:, history - 1 :], states[:, history:]
    if "draw" in arguments.parts:
        ahead = torch.from_numpy(rng.integers(1, arguments.max_follow + 1, size=SKETCHED))
        first = data.starts(int(ahead.max()), max(arguments.draw_batch_size // SKETCHED, 1), rng)
        chosen = first[:, None] + torch.cat([torch.zeros_like(ahead[:1]), ahead])
        latents = data.latents[chosen].float()
        share = _interest(latents[:, 0], latents[:, 1:]).double().cumsum(1)
        drawn = torch.from_numpy(rng.random((len(first), arguments.draw_pixels))) * share[:, -1:]
        pixels = torch.searchsorted(share, drawn).clamp_max(share.shape[1] - 1)
        states = track.normalise(data.states[chosen])
        states = states + arguments.state_noise * torch.from_numpy(
            rng.standard_normal(states[:, :1].shape, np.float32)
        )
        batches["draw"] = latents, states, pixels
    return batches


def _interest(seen: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Weights (B, H W) of pixels to draw: most where something moves, and there over what differs from most of the picture."""
    change = (after - seen[:, None]).abs().mean((1, 2)).flatten(1)
    difference = (seen - seen.mean((2, 3), keepdim=True)).abs().mean(1).flatten(1)
    return (change + 0.3 * change.mean(1, keepdim=True)) * (difference + difference.mean(1, keepdim=True)) + 1e-4


def load(
    arguments: StatesArguments,
    name: str,
    split: str,
    episodes: int | None,
    vae: AutoencoderKL | None,
    track: StateTrack | None,
) -> Recorded:
    """Latents, actions and states of a data set; latents are encoded where they are not cached yet, if by anything."""
    source = PreparedEpisodes(open_dataset(name, arguments.cameras or None, split=split, max_episodes=episodes))
    known = source.vectors(0)
    missing = [key for key in arguments.state_keys if key not in known]
    if missing:
        raise ValueError(f"{source.name!r} has no vector feature {missing[0]!r}; it has {sorted(known)}.")
    number = sum(known[key].shape[1] for key in arguments.state_keys)
    wanted = sum(KINDS[kind] for kind in arguments.bodies)
    if number != wanted:
        raise ValueError(
            f"`bodies` must make up the {number} components of {arguments.state_keys}, got {arguments.bodies} with {wanted}."
        )
    if track is not None and known["action"].shape[1] != track.config.action_dim:
        raise ValueError(
            f"`pretrained` must have the {known['action'].shape[1]} action components of {source.name!r}, got "
            f"{track.config.action_dim}."
        )
    height, width = source.window(0, 0, 1).frames.shape[1:3]
    left, top, right, bottom = arguments.extent
    if abs((right - left) * height - (bottom - top) * width) > 0.02 * (right - left) * height:
        raise ValueError(f"`extent` must have square pixels in pictures of {width}x{height}, got {arguments.extent}.")
    numbers = range(len(source))
    states = [
        torch.from_numpy(part).float() for part in episode_states(source, arguments.state_keys, (), numbers).values()
    ]
    if max(map(len, states)) < arguments.max_follow + 2:
        raise ValueError(f"{source.name!r} has no episode of `max_follow` + 2 = {arguments.max_follow + 2} frames.")
    actions = [torch.from_numpy(source.vectors(number)["action"]).float() for number in numbers]
    lengths = [torch.arange(len(part) - 1, -1, -1) for part in states]
    latents = torch.empty(0)
    if vae is not None:
        cache = cache_latents(source, vae, arguments.cache_dir or Path(arguments.output_dir) / "latents")
        encoded = LatentClips(cache, sample_frames=1).episodes
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scaled = [((encoded[number][0].float() - shift) * vae.config.scaling_factor).half() for number in numbers]
        latents = torch.cat(scaled)
    names = [name for key in arguments.state_keys for name in source.component_names(key) or []]
    return Recorded(latents, torch.cat(actions), torch.cat(states), torch.cat(lengths), names)


@torch.no_grad()
def validate(track: StateTrack, data: Recorded, frames: int, number: int = 1000) -> str:
    """Median errors of poses that are read, and of those followed from read ones where the bodies move most."""
    rng = np.random.default_rng(0)
    starts = torch.nonzero(data.lengths >= frames + 1)[:, 0]
    moves = (track.normalise(data.states[starts + frames + 1]) - track.normalise(data.states[starts])).abs().amax(1)
    starts = starts[moves >= moves.median()]
    starts = starts[torch.from_numpy(rng.permutation(len(starts))[:number])]
    device = track.device
    states, actions = data.window(starts, frames + 2)
    latents = torch.stack([data.latents[starts], data.latents[starts + 1]], dim=2).to(device).float()
    seen = torch.cat([track.read(part) for part in latents.split(100)])
    follows = track.follow(seen, actions[:, 1:].to(device))
    texts = []
    for what, found, true in (
        ("read", seen[:, 1], states[:, 1]),
        (f"after {frames} frames", follows[:, -1], states[:, -1]),
    ):
        difference = (found - track.normalise(true.to(device))).cpu()
        parts = []
        for start, kind in zip(track.body_starts, track.config.bodies, strict=True):
            distance = difference[:, start : start + 2].norm(dim=1).median() * track.unit
            parts.append(f"{distance:.3g}")
            if kind == "pose":
                turn = difference[:, start + 2]
                parts[-1] += f" and {torch.atan2(turn.sin(), turn.cos()).abs().median().rad2deg():.3g} degrees"
        texts.append(f"{what}: {', '.join(parts)}")
    poses = track.denormalise(torch.cat([seen[:, 1:], follows[:, -1:]], dim=1))
    last = data.latents[starts + frames + 1].to(device).float()
    errors = [
        (track.draw(seen[:, :, None], given.to(device))[:, :, 0] - (after - seen)).square().mean().cpu()
        for seen, after, given in zip(latents[:, :, 1].split(100), last.split(100), poses.split(100), strict=True)
    ]
    change = (last - latents[:, :, 1]).square().mean().cpu()
    texts.append(f"sketched there: {torch.stack(errors).mean() / change:.3g} of the change is wrong")
    return "; ".join(texts)


def load_pretrained(arguments: StatesArguments) -> StateTrack | None:
    """The track to start from, whose bodies and coordinates the arguments take over; None for a new one."""
    if arguments.pretrained is None:
        if not (arguments.state_keys and arguments.bodies and arguments.extent):
            raise ValueError("`state_keys`, `bodies` and `extent` must be given for a new track.")
        arguments.action_space = arguments.action_space or "absolute"
        arguments.action_scale = 1.0 if arguments.action_scale is None else arguments.action_scale
        StateTrack(  # refuses what cannot be
            bodies=arguments.bodies, extent=arguments.extent, action_space=arguments.action_space
        )
        return None
    given = [name for name in OWN if getattr(arguments, name) not in (None, [])]
    if given:
        raise ValueError(f"`{given[0]}` must be left out with `pretrained`, which has its own.")
    track = load_state_track(arguments.pretrained)
    config = track.config
    if not config.state_keys:
        raise ValueError(f"`pretrained` {arguments.pretrained!r} does not say from which `state_keys` it has learned.")
    for name in OWN:
        setattr(arguments, name, config[name])
    return track


def run_settings(arguments: StatesArguments, processes: int) -> dict[str, Any]:
    """What a run must keep to be the same run when it is resumed."""
    flags = {name: value for name, value in asdict(arguments).items() if name not in MAY_CHANGE}
    return flags | {"processes": processes}


def main() -> None:
    (arguments,) = HfArgumentParser(StatesArguments).parse_args_into_dataclasses()
    if not arguments.parts or not set(arguments.parts) <= set(PARTS):
        raise ValueError(f"`parts` must be some of {', '.join(PARTS)}, got {arguments.parts}.")
    if arguments.max_follow < 1:
        raise ValueError(f"`max_follow` must be at least 1, got {arguments.max_follow}.")
    track = load_pretrained(arguments)
    output = Path(arguments.output_dir)
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))]  # one may encode for long
    )
    set_seed(arguments.seed)
    vae = AutoencoderKL.from_pretrained(arguments.vae).to(accelerator.device).requires_grad_(False)
    if track is not None and track.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"`vae` must have the {track.config.in_channels} channels that `pretrained` reads, got {vae.config.latent_channels}."
        )
    settings = run_settings(arguments, accelerator.num_processes)
    newest = newest_checkpoint(output, settings)
    output.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_leftovers(output)
    with accelerator.main_process_first():
        looks = set(arguments.parts) != {"follow"}  # motion is learned from states alone
        episodes = (arguments.max_train_episodes, arguments.max_validation_episodes)
        data = load(arguments, arguments.dataset, arguments.split, episodes[0], vae if looks else None, track)
        held_out = None
        if arguments.validation_dataset:
            name, split = arguments.validation_dataset, arguments.validation_split
            held_out = load(arguments, name, split, episodes[1], vae, track)
    track = track or StateTrack(
        bodies=arguments.bodies,
        extent=arguments.extent,
        state_keys=arguments.state_keys,
        state_names=data.names or None,
        in_channels=vae.config.latent_channels,
        action_dim=data.actions.shape[1],
        action_space=str(arguments.action_space),
        action_scale=arguments.action_scale,
    )
    for name, parameter in track.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(arguments.parts)))
    trained = [parameter for parameter in track.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate)
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=arguments.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=arguments.max_train_steps * accelerator.num_processes,
    )
    model, optimizer, schedule = accelerator.prepare(Training(track), optimizer, schedule)
    step = 0
    if newest:
        accelerator.load_state(str(newest))
        step = int(newest.name.split("-")[1])

    bar = tqdm(total=arguments.max_train_steps, initial=step, disable=not accelerator.is_main_process, unit="step")
    start = time.perf_counter()
    while step < arguments.max_train_steps:
        batches = batch(data, arguments, step, accelerator.process_index, track)
        loss = model(**send_to_device(batches, accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if step % arguments.checkpointing_steps == 0 and step < arguments.max_train_steps:
            save_checkpoint(accelerator, output, step, limit=2, settings=settings)
        if held_out and accelerator.is_main_process and step % arguments.validation_steps == 0:
            bar.write(
                f"step {step}, {time.perf_counter() - start:.0f} s: {validate(track, held_out, arguments.max_follow)}"
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        track.save_pretrained(output)
        if held_out:
            print(f"held out: {validate(track, held_out, arguments.max_follow)}; {output}")


def _follow_length(progress: float, longest: int) -> int:
    """Frames that are followed at a progress in [0, 1): few at first, since errors of many frames say little then."""
    return min(4 if progress < 0.3 else 8 if progress < 0.5 else longest, longest)


if __name__ == "__main__":
    main()
