"""The pipeline: history frames and actions in, the video of those actions out."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PNDMScheduler,
    PyramidAttentionBroadcastConfig,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from huggingface_hub import file_exists

from ..action_space import ActionSpace
from ..models import IRASimTransformer3DModel, UNetTrajectoryModel, noise_process
from ..pictures import resize as resize_frames
from ..rollout import RolloutState, chain_windows, roll
from .lora import IRASimLoraLoaderMixin
from .model_card import PIPELINE_FILE, write_model_card
from .pipeline_output import IRASimPipelineOutput

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import numpy as np
        >>> from diffusers.utils import load_image
        >>> from irasim_diffusers import IRASimPipeline, embedded_checkpoint

        >>> pipe = IRASimPipeline.from_pretrained(embedded_checkpoint())
        >>> frame = load_image("push_t.png")  # 96x96
        >>> actions = np.linspace([100.0, 100.0], [400.0, 300.0], 15)  # targets of the pusher, (15, 2)
        >>> video = pipe(frame, actions).frames[0]
        >>> video[0].save("future.gif", save_all=True, append_images=video[1:], duration=100)
        ```
"""


WITHOUT_SAMPLE = ("PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler")
"""Schedulers that take no predicted samples; the pipeline gives them velocities instead."""


class IRASimPipeline(DiffusionPipeline, IRASimLoraLoaderMixin):
    """Predicts the video of a robot that executes given actions, from the frames seen so far.

    LoRA of the transformer is loaded, set, fused and saved as in any pipeline of diffusers. A LoRA file may hold the
    action encoder whole, where that was trained with it.

    Args:
        vae: Per-frame autoencoder; None for a model in pixel space, whose latents are the frames in [-1, 1].
        transformer: The denoiser, a transformer or the baselines' U-Net; its config holds the action space, the window and
            the noise process.
        scheduler: Any diffusers scheduler of the checkpoint's prediction type and noise process; one of velocities where the
            checkpoint predicts samples.
        num_inference_steps: Steps that suit model and scheduler, taken where a call names none; part of the checkpoint.
        window_length: Frames of the windows of a rollout, history and predicted, taken where a call names none; None for the
            model's `sample_frames`.
        timesteps: Timesteps that suit the model, `num_inference_steps` of them, in place of the scheduler's own spacing where
            a call asks for as many steps and the scheduler takes custom ones.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]
    _interrupt = False

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny | None,
        transformer: IRASimTransformer3DModel | UNetTrajectoryModel,
        scheduler: SchedulerMixin,
        num_inference_steps: int = 50,
        window_length: int | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        super().__init__()
        if timesteps is not None and len(timesteps) != num_inference_steps:
            raise ValueError(
                f"`timesteps` must be `num_inference_steps` = {num_inference_steps} numbers, got {len(timesteps)}."
            )
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            num_inference_steps=num_inference_steps, window_length=window_length, timesteps=timesteps
        )
        config = self.vae.config if getattr(self, "vae", None) else {}
        levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (None,)
        self.vae_scale_factor = 2 ** (len(levels) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def guidance_scale(self) -> float:
        """Weight of the actions against the null action; up to 1 there is no guidance. A callback may change it."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the network is evaluated twice a step."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of a call, over all its windows."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor:
        """The timestep being denoised."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """What the transformer's attention was given in this call."""
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Whether denoising shall stop: a callback sets `pipe._interrupt = True`. Later windows are left out."""
        return self._interrupt

    @property
    def window_length(self) -> int:
        """Frames of the windows of a rollout, history and predicted, where a call names no other number."""
        return self.config.window_length or self.transformer.config.sample_frames

    @property
    def action_space(self) -> ActionSpace:
        """The checkpoint's action space."""
        return ActionSpace.from_config(self.transformer.config)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the frames the checkpoint was trained on."""
        config = self.transformer.config
        return config.sample_height * self.vae_scale_factor, config.sample_width * self.vae_scale_factor

    @property
    def fps(self) -> float | None:
        """Frames per second that the checkpoint was trained on, if known."""
        return self.transformer.config.fps

    @property
    def max_chunk(self) -> int:
        """Maximum number of actions per call of `advance`."""
        return self.transformer.config.sample_frames - self.transformer.config.num_history_frames

    def check_inputs(
        self,
        actions: torch.Tensor,
        histories: torch.Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        num_videos_per_trajectory: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        fps: float | None = None,
    ) -> None:
        """Refuse what cannot be generated, before anything is computed.

        Raises:
            ValueError: Names the argument, what was wanted, what came and the remedy.
        """
        if len(histories) not in (1, len(actions)) and len(actions) != 1:
            raise ValueError(
                f"`frames` and `actions` must agree: got {len(histories)} histories and {len(actions)} action "
                "sequences; give one of either, or as many of both."
            )
        if num_inference_steps < 1 or num_videos_per_trajectory < 1:
            raise ValueError(
                f"`num_inference_steps` and `num_videos_per_trajectory` must be at least 1, got {num_inference_steps} "
                f"and {num_videos_per_trajectory}."
            )
        batch_size = max(len(histories), len(actions)) * num_videos_per_trajectory
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` must be one, or a list of {batch_size}, got a list of {len(generator)}.")
        shape = (batch_size, self.transformer.config.in_channels, actions.shape[1], *self._latent_size(histories))
        if latents is not None and latents.shape != shape:
            raise ValueError(f"`latents` must be {shape}, got {tuple(latents.shape)}.")
        config = self.transformer.config
        uses_fps = config.get("use_fps")
        if fps is not None and not uses_fps:
            raise ValueError(
                f"`fps` must be None for this checkpoint, which does not embed frames a second, got {fps}."
            )
        rate = config.fps if fps is None else fps
        if uses_fps and (rate is None or not 0 < rate < float("inf")):
            raise ValueError(
                f"`fps` must be the positive number of frames a second, which this model embeds, got {rate}: give it, or "
                "set it in the config."
            )
        cache = getattr(self.transformer, "_cache_config", None)
        if guidance_scale > 1 and isinstance(cache, (PyramidAttentionBroadcastConfig, FasterCacheConfig)):
            raise ValueError(
                f"`guidance_scale` must be at most 1 with {type(cache).__name__}, got {guidance_scale}: this cache keeps "
                "one state for both evaluations of a step; take the first-block cache."
            )
        if isinstance(cache, FasterCacheConfig) and not cache.is_guidance_distilled:
            raise ValueError(
                "`FasterCacheConfig` must have is_guidance_distilled=True, got False: it takes half of each batch for "
                "one without actions."
            )
        if isinstance(cache, FirstBlockCacheConfig) and self.transformer._parallel_config is not None:
            raise ValueError(
                "`FirstBlockCacheConfig` does not go with context parallelism: processes would disagree on what to skip; "
                "take another cache."
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be pil, np, pt or latent, got {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}."
            )
        self.check_scheduler()
        runge_kutta = isinstance(self.scheduler, PNDMScheduler) and not self.scheduler.config.skip_prk_steps
        if runge_kutta and num_inference_steps < 4:
            raise ValueError(
                f"`num_inference_steps` must be at least 4 for PNDMScheduler with its Runge-Kutta warm-up, got "
                f"{num_inference_steps}: take more, or another scheduler."
            )

    def check_window(self, window_length: int) -> None:
        """Refuse windows that the checkpoint cannot take.

        Raises:
            ValueError: If a window has no room for the history and a predicted frame, or Video-Ada is to take another number.
        """
        config = self.transformer.config
        shortest = config.sample_frames if config.conditioning == "video" else config.num_history_frames + 1
        if not shortest <= window_length <= config.sample_frames:
            raise ValueError(
                f"`window_length` must be in [{shortest}, {config.sample_frames}] for this checkpoint, got {window_length}."
            )

    def check_scheduler(self) -> None:
        """Refuse a scheduler that does not fit the checkpoint.

        Raises:
            ValueError: If prediction type or noise process differ from those in the transformer's config, or if it clips.
        """
        name, config = type(self.scheduler).__name__, self.transformer.config
        process = ("prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        settings = ", ".join(f"{key}={config[key]!r}" for key in process)
        remedy = f"make it with `{name}.from_config(pipe.scheduler.config, {settings}, clip_sample=False)`."
        found = getattr(self.scheduler.config, "prediction_type", None)
        flows = hasattr(self.scheduler, "scale_noise") or getattr(self.scheduler.config, "use_flow_sigmas", False)
        if config.prediction_type == "flow_prediction":
            number = getattr(self.scheduler.config, "num_train_timesteps", None)
            if not flows or found not in (None, "flow_prediction") or number != config.num_train_timesteps:
                raise ValueError(
                    f"`scheduler` must be one of rectified flow in {config.num_train_timesteps} steps for this checkpoint, "
                    f"got {name} with {found!r} and {number} steps: take "
                    "`irasim_diffusers.models.noise_process(pipe.transformer.config)`."
                )
            return
        alphas_cumprod = getattr(self.scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None or flows:
            raise ValueError(
                f"`scheduler` must have the checkpoint's noise process ({settings}), got {name} with a flow or "
                "continuous process: take a scheduler with betas."
            )
        if name == "DPMSolverSDEScheduler":
            raise ValueError(f"`scheduler` must draw its noise from the given generator, which {name} does not.")
        sample = config.prediction_type == "sample"
        if found != config.prediction_type and not (sample and found == "v_prediction"):
            raise ValueError(
                f"`scheduler` must have the checkpoint's prediction type {config.prediction_type!r}, got {name} with "
                f"{found!r}: {remedy}"
            )
        if found == "sample" and name in WITHOUT_SAMPLE:
            raise ValueError(
                f"`scheduler` must take predicted samples, which {name} does not: make it with "
                f"`{name}.from_config(pipe.scheduler.config, prediction_type='v_prediction')`; the pipeline converts."
            )
        trained = noise_process(config).alphas_cumprod
        alphas_cumprod = alphas_cumprod.cpu().float()
        if alphas_cumprod.shape != trained.shape or not torch.allclose(alphas_cumprod, trained, atol=1e-6):
            raise ValueError(
                f"`scheduler` must have the checkpoint's noise process ({settings}), got {name} with other betas: {remedy}"
            )
        if getattr(self.scheduler.config, "clip_sample", False):
            raise ValueError(
                f"`scheduler` must not clip samples, got {name} with clip_sample=True: latents leave [-1, 1]; {remedy}"
            )

    def preprocess_frames(self, frames: Any, resize: bool = False) -> torch.Tensor:
        """Bring history frames of any accepted form into one.

        Args:
            frames: See `__call__`.
            resize: Resize to the checkpoint's frame size instead of refusing another one.

        Returns:
            Histories (B, h, 3, H, W) in [-1, 1], float32.

        Raises:
            ValueError: If there is no frame or too many, or frames are not RGB, out of range, or of another size.
        """
        self._check_autoencoder()
        pixels = _stack_frames(frames)  # (B, h, 3, H, W) in [0, 1]
        most = self.transformer.config.num_history_frames
        if pixels.shape[1] > most:
            raise ValueError(
                f"`frames` must hold 1 to {most} history frames for this checkpoint, got {pixels.shape[1]}: give the last "
                f"{most} (a list of lists is a batch)."
            )
        if self.transformer.config.conditioning == "video" and pixels.shape[1] != most:
            raise ValueError(
                f"`frames` must hold {most} history frames for a model of whole trajectories, got {pixels.shape[1]}."
            )
        size = tuple(pixels.shape[-2:])
        if size != self.frame_size and resize:
            pixels = resize_frames(pixels, self.frame_size)
        elif size != self.frame_size:
            raise ValueError(
                f"`frames` must be {self.frame_size[0]}x{self.frame_size[1]} (height x width) for this checkpoint, got "
                f"{size[0]}x{size[1]}: pass resize=True (--resize on the command line) to resize them."
            )
        return self.video_processor.normalize(pixels)

    def _check_autoencoder(self) -> None:
        channels = self.transformer.config.in_channels
        if self.vae is None and channels != 3:
            raise ValueError(
                f"`vae` must be the autoencoder of this model, whose latents have {channels} channels, got None: only a model of "
                "RGB frames (3 channels) works without one."
            )

    def encode_history(self, pixels: torch.Tensor, chunk_size: int = 16) -> torch.Tensor:
        """Encode histories (B, h, 3, H, W) in [-1, 1] to scaled latents (B, C, h, H / f, W / f), float32."""
        if self.vae is None:
            return pixels.to(self._execution_device).float().transpose(1, 2)
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        flat = pixels.flatten(0, 1).to(memory_format=torch.channels_last)  # in which convolutions are faster
        latents = torch.cat([self._encode(chunk) for chunk in flat.split(chunk_size)])
        latents = latents.to(self._execution_device, torch.float32)  # the autoencoder may be on another one
        self._check_overflow(latents)
        latents = (latents - (getattr(self.vae.config, "shift_factor", None) or 0.0)) * self.vae.config.scaling_factor
        return latents.unflatten(0, pixels.shape[:2]).transpose(1, 2)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        encoded = self.vae.encode(pixels)
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents

    def decode_latents(self, latents: torch.Tensor, chunk_size: int = 16) -> torch.Tensor:
        """Decode scaled latents (B, C, F, h, w) to pixels (B, 3, F, H, W) in [-1, 1], `chunk_size` frames at a time."""
        if self.vae is None:
            return latents
        latents = latents / self.vae.config.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        flat = latents.transpose(1, 2).flatten(0, 1).to(self.vae.dtype, memory_format=torch.channels_last)
        pixels = torch.cat([self.vae.decode(chunk).sample.float() for chunk in flat.split(chunk_size)])
        self._check_overflow(pixels)
        return pixels.unflatten(0, (latents.shape[0], latents.shape[2])).transpose(1, 2)

    def _check_overflow(self, values: torch.Tensor) -> None:
        if self.vae.dtype == torch.float16 and not torch.isfinite(values).all():
            raise ValueError(
                "the autoencoder overflows in float16, as SDXL's does: load with `dtype={'default': torch.float16, 'vae': "
                "torch.float32}`, or in bfloat16."
            )

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise of `shape` (B, C, n, h, w) and unit variance, float32: the given one, and drawn for frames after it.

        These fill a window, and other frames see them: beside given noise without a generator they are always the same.
        """
        device, given = self._execution_device, 0 if latents is None else latents.shape[2]
        if given and generator is None:
            generator = torch.Generator().manual_seed(0)
        drawn = (*shape[:2], shape[2] - given, *shape[3:])
        noise = [] if latents is None else [latents.to(device, torch.float32)]
        if given < shape[2]:
            noise.append(randn_tensor(drawn, generator=generator, device=device, dtype=torch.float32))
        return torch.cat(noise, dim=2)

    def denoise_window(
        self,
        history: torch.Tensor,
        actions: torch.Tensor,
        latents: torch.Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        attention_kwargs: dict[str, Any] | None = None,
        fps: float | None = None,
        on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Denoise the future of one window; the history stays clean and is never stepped.

        Args:
            history: Clean history (B, C, h, H, W), scaled latents.
            actions: Actions (B, n, A) in raw units.
            latents: Noise (B, C, n, H, W) of unit variance, from `prepare_latents`; scaled here as the scheduler wants.
            num_inference_steps: Steps of the scheduler.
            guidance_scale: Above 1 the network is evaluated twice a step, with and without actions.
            generator: For schedulers that draw noise.
            timesteps: Custom timesteps, for schedulers that take them.
            sigmas: Custom sigmas, for schedulers that take them.
            eta: DDIM's eta.
            attention_kwargs: Passed to the transformer.
            fps: Frames a second, for checkpoints that embed it; None takes the config's.
            on_step_end: Called with step, timestep and latents after each step; returns the latents to go on with. They are
                relative to the last history frame where the checkpoint's are.

        Returns:
            The future (B, C, n, H, W), scaled latents, float32.
        """
        schedule = self._set_timesteps(num_inference_steps, timesteps, sigmas)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)  # which depends on the timesteps
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        step_kwargs = self._step_kwargs(generator, eta)
        num_history_frames = history.shape[2]
        self.transformer._reset_stateful_cache()  # what the window before left in a cache is another video's

        nothing = torch.zeros(actions.shape[:2], dtype=torch.bool, device=actions.device)

        def predict(noisy: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            window = torch.cat([history, noisy], dim=2).to(self.transformer.dtype)
            prediction = self.transformer(
                window,
                timestep,
                actions,
                action_mask=mask,
                attention_kwargs=attention_kwargs,
                return_dict=False,
                **({} if fps is None else {"fps": fps}),
            )[0]
            return prediction[:, :, num_history_frames:].float()

        for index, t in enumerate(schedule):
            if self.interrupt:
                break
            self._current_timestep = t
            scale = getattr(self.scheduler, "scale_model_input", None)  # those of flows have none
            noisy = latents if scale is None else scale(latents, t)
            timestep = t.expand(len(latents)).to(latents.device)
            with self.transformer.cache_context("cond"):
                prediction = predict(noisy, timestep)
            if self.do_classifier_free_guidance:
                with self.transformer.cache_context("uncond"):
                    unconditional = predict(noisy, timestep, nothing)
                prediction = unconditional + self.guidance_scale * (prediction - unconditional)
            if self.transformer.config.prediction_type == "sample":
                prediction = self._as_scheduler_takes(prediction, noisy, float(t))
            latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]
            if on_step_end is not None:
                latents = on_step_end(index, t, latents)
        return latents + history[:, :, -1:] if self.transformer.config.relative_latents else latents

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        frames: Any,
        actions: Any,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        num_videos_per_trajectory: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        resize: bool = False,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        chunk_size: int = 16,
        window_length: int | None = None,
        fps: float | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[["IRASimPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> IRASimPipelineOutput | tuple:
        """Generate the video of the given actions.

        Args:
            frames: History in time order: a PIL image, a list of PIL images, uint8 or [0, 1] arrays (H, W, 3),
                (h, H, W, 3) or (B, h, H, W, 3), tensors (3, H, W), (h, 3, H, W) or (B, h, 3, H, W), or a list of
                histories, each one of those.
            actions: Actions (n, A) or (B, n, A) in the units of the checkpoint's action space. One history with
                several action sequences gives their futures from one encoding. More actions than the window holds
                are rolled out: each window starts from the last frames of the one before.
            num_inference_steps: Denoising steps of each window; None takes the checkpoint's own number.
            guidance_scale: Weight of the actions against none; up to 1 (the paper's) there is no guidance, and one
                evaluation of the network a step.
            num_videos_per_trajectory: Samples of each trajectory; those of one follow each other in the output.
            generator: Seeded generator, or one for each video: then a video is the same alone and in a batch.
            latents: Initial noise (B, C, n, h, w) of unit variance.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: Return an `IRASimPipelineOutput` instead of a tuple.
            resize: Resize frames of another size instead of refusing them.
            timesteps: Custom timesteps, for schedulers that take them.
            sigmas: Custom sigmas, for schedulers that take them.
            eta: DDIM's eta, in [0, 1].
            chunk_size: Frames that the autoencoder encodes or decodes at a time; bounds its memory.
            window_length: Frames of each window, history and predicted: fewer than the model's `sample_frames` are predicted
                from nearer, in more windows; None takes the checkpoint's own number.
            fps: Frames a second of history and actions, for checkpoints that embed it, as Open-Sora; None takes the
                config's.
            attention_kwargs: `{"scale": s}` scales LoRA layers.
            callback_on_step_end: Called as `callback(pipe, step, timestep, {name: tensor})` after each step; returns a
                dict whose `latents`, if any, replace the current ones. Steps count on over windows. Or a
                `PipelineCallback` of diffusers, or several.
            callback_on_step_end_tensor_inputs: What `callback` is given: `latents`, the default, or nothing.

        Returns:
            The predicted frames of each trajectory, exactly as many as it has actions.

        Raises:
            ValueError: On any input that cannot be served, before anything is computed.

        Examples:
        """  # noqa: D414 (filled by the decorator)
        config = self.transformer.config
        tensor_inputs = callback_on_step_end_tensor_inputs
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback_on_step_end.tensor_inputs
        tensor_inputs = ["latents"] if tensor_inputs is None else tensor_inputs
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        if window_length is None:
            window_length = self.window_length
        actions = self.action_space.prepare(actions)
        histories = self.preprocess_frames(frames, resize)
        self.check_window(window_length)
        self.check_inputs(
            actions,
            histories,
            num_inference_steps,
            guidance_scale,
            num_videos_per_trajectory,
            generator,
            latents,
            output_type,
            tensor_inputs,
            fps,
        )
        steps_per_window = len(self._set_timesteps(num_inference_steps, timesteps, sigmas))
        self._guidance_scale = guidance_scale
        self._current_timestep = None
        self._interrupt = False

        batch_size = max(len(histories), len(actions)) * num_videos_per_trajectory
        history = _repeat_to(self.encode_history(histories, chunk_size), batch_size)
        actions = _repeat_to(actions, batch_size).to(self._execution_device)
        chunk_length = window_length - config.num_history_frames  # also from a shorter history, as in training
        self._num_timesteps = -(-actions.shape[1] // chunk_length) * steps_per_window
        started = 0  # actions whose windows have begun
        steps = 0  # steps over all windows

        with self.progress_bar(total=self.num_timesteps) as progress_bar:

            def on_step_end(_: int, t: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
                nonlocal steps
                if callback_on_step_end is not None:
                    tensors = {"latents": current} if tensor_inputs else {}
                    outputs = callback_on_step_end(self, steps, t, tensors)
                    current = outputs.pop("latents", current)
                steps += 1
                progress_bar.update()
                return current

            def predict_window(window_history: torch.Tensor, window_actions: torch.Tensor) -> torch.Tensor:
                nonlocal started
                if self.interrupt:
                    return window_history[:, :, :0]
                wanted = window_actions.shape[1]
                given = None if latents is None else latents[:, :, started : started + wanted]
                shape = (batch_size, config.in_channels, chunk_length, *window_history.shape[-2:])
                started += wanted
                future = self.denoise_window(
                    window_history,
                    self._pad_actions(window_actions, chunk_length),
                    self.prepare_latents(shape, generator, given),
                    num_inference_steps,
                    self.guidance_scale,  # as a callback left it
                    generator,
                    timesteps,
                    sigmas,
                    eta,
                    attention_kwargs,
                    fps,
                    on_step_end,
                )
                return future[:, :, :wanted]

            try:
                future = chain_windows(predict_window, history, actions, chunk_length, config.num_history_frames)
            finally:
                self._interrupt = False  # a later `denoise_window` of its own shall run
        self._current_timestep = None

        if output_type == "latent":
            video = future
        else:
            video = self.video_processor.postprocess_video(self.decode_latents(future, chunk_size), output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (video,)
        return IRASimPipelineOutput(frames=video)

    @torch.no_grad()
    def start(self, frames: Any, seeds: Sequence[int], resize: bool = False) -> RolloutState:
        """Encode histories as the state of a rollout.

        Args:
            frames: One history, or one per seed; see `__call__`. One history is encoded once for all seeds.
            seeds: Non-negative seeds, one per row of the state.
            resize: Resize frames of another size instead of raising an error.

        Returns:
            The state of `len(seeds)` rollouts.

        Raises:
            ValueError: If the frames do not suit the checkpoint, or their number does not match that of the seeds.
        """
        seeds = [int(seed) for seed in seeds]
        if not seeds or min(seeds) < 0:
            raise ValueError(f"`seeds` must be at least one non-negative integer, got {seeds}.")
        pixels = self.preprocess_frames(frames, resize)
        if len(pixels) not in (1, len(seeds)):
            raise ValueError(f"`frames` must be one history, or {len(seeds)} as there are seeds, got {len(pixels)}.")
        return RolloutState.first(_repeat_to(self.encode_history(pixels), len(seeds)), seeds)

    def advance(
        self,
        state: RolloutState,
        actions: torch.Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        fps: float | None = None,
    ) -> tuple[RolloutState, torch.Tensor]:
        """Predict one chunk. Gradients flow to the actions and the history unless the caller disables them.

        Args:
            state: The state of B rollouts.
            actions: Actions (B, n, A) in raw units, 1 to `max_chunk` of them.
            num_inference_steps: Denoising steps; None takes the checkpoint's own number.
            guidance_scale: See `__call__`.
            generator: Source of the noise instead of the seeds of the state.
            attention_kwargs: See `__call__`.
            fps: See `__call__`.

        Returns:
            The state after the chunk, and its scaled latents (B, C, n, H, W), float32.

        Raises:
            ValueError: If the actions are too many, or not one sequence per row.
        """
        config = self.transformer.config
        if actions.ndim != 3 or len(actions) != len(state) or not 1 <= actions.shape[1] <= self.max_chunk:
            raise ValueError(
                f"`actions` must be ({len(state)}, n, {config.action_dim}) with n in [1, {self.max_chunk}], got "
                f"{tuple(actions.shape)}: `roll` splits longer sequences."
            )
        history, length = state.latents.to(self._execution_device), actions.shape[1]
        actions = actions.to(self._execution_device)
        if config.conditioning == "video":  # takes one number of actions
            actions = self._pad_actions(actions, self.max_chunk)
        shape = (len(state), config.in_channels, actions.shape[1], *history.shape[-2:])
        if generator is None:
            sources = [state.generators(index) for index in range(shape[2])]
            frame = (*shape[:2], 1, *shape[3:])
            noise = torch.cat([self.prepare_latents(frame, source) for source in sources], dim=2)
            generator = sources[0]  # which a stochastic scheduler continues
        else:
            noise = self.prepare_latents(shape, generator)
        future = self.denoise_window(
            history,
            actions,
            noise,
            self.config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale,
            generator,
            attention_kwargs=attention_kwargs,
            fps=fps,
        )[:, :, :length]
        return state.append(future, config.num_history_frames), future

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents (B, C, n, h, w) to frames (B, n, 3, H, W) in [0, 1]."""
        return self.video_processor.postprocess_video(self.decode_latents(latents), "pt")

    def predict_latents(
        self,
        history: torch.Tensor | RolloutState,
        actions: torch.Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        fps: float | None = None,
    ) -> torch.Tensor:
        """Predict the latents of any number of actions in one call, chunk by chunk; see `roll`.

        Args:
            history: The state of a rollout, or a clean history (B, C, h, H, W), which takes random seeds.
            actions: Actions (B, n, A) in raw units.
            num_inference_steps: Denoising steps; None takes the checkpoint's own number.
            guidance_scale: See `__call__`.
            generator: Source of the noise instead of the seeds: one, or one per row.
            attention_kwargs: See `__call__`.
            fps: See `__call__`.

        Returns:
            The future (B, C, n, H, W), scaled latents, float32.
        """
        state = history
        if not isinstance(state, RolloutState):
            state = RolloutState.first(state, _random_seeds(len(state)))
        chunks = roll(
            self,
            state,
            actions,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            attention_kwargs=attention_kwargs,
            fps=fps,
        )
        return torch.cat([latents for _, latents in chunks], dim=2)

    def predict(self, frames: Any, actions: Any, **kwargs: Any) -> torch.Tensor:
        """Call the pipeline with `output_type="pt"` by default: returns frames (B, n, 3, H, W) in [0, 1]."""
        return self(frames, actions, **{"output_type": "pt"} | kwargs).frames

    def stream(
        self,
        frames: Any,
        actions: Iterable[Any],
        chunk_length: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        resize: bool = False,
        fps: float | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Iterator[PIL.Image.Image | np.ndarray | torch.Tensor]:
        """Predict one trajectory while its actions come.

        As soon as `chunk_length` actions are there, their frames are predicted and yielded; a next action is asked for
        only when the frames before it are consumed. So latency is that of one short window, and whoever yields the
        actions may first look at the frames. The history is carried in latents, never decoded and encoded again.

        Args:
            frames: The history; see `__call__`.
            actions: Any iterable of actions (A,) in the units of the action space, finite or not.
            chunk_length: Actions whose frames are predicted before the first of them is yielded; the last chunk may be shorter.
                None for 4, or as many as the window holds where they are fewer, or for Video-Ada and the U-Net, which take no
                other number.
            num_inference_steps: Denoising steps of each chunk; None takes the checkpoint's own number.
            guidance_scale: See `__call__`.
            generator: Seeded generator.
            output_type: `"pil"` for images, `"np"` (H, W, 3) or `"pt"` (3, H, W) in [0, 1], `"latent"` (C, h, w).
            resize: Resize frames of another size instead of refusing them.
            fps: See `__call__`.
            attention_kwargs: See `__call__`.

        Returns:
            An iterator over predicted frames, one for each action.

        Raises:
            ValueError: On bad input: at once, but for a bad action, which raises when it comes.

        Examples:
            ```py
            >>> for frame in pipe.stream(first_frame, gamepad_targets()):
            ...     show(frame)
            ```
        """
        config = self.transformer.config
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        longest, video_ada = self.max_chunk, config.conditioning == "video"
        if chunk_length is None:
            chunk_length = longest if video_ada else min(4, longest)
        if chunk_length < 1:
            raise ValueError(f"`chunk_length` must be at least 1, got {chunk_length}.")
        if video_ada and chunk_length != longest:
            raise ValueError(
                f"`chunk_length` must be {longest} for a model of whole trajectories, got {chunk_length}."
            )
        histories = self.preprocess_frames(frames, resize)
        hold = torch.zeros(1, chunk_length, config.action_dim)
        self.check_inputs(
            hold, histories, num_inference_steps, guidance_scale, 1, generator, None, output_type, [], fps
        )
        if len(histories) != 1:
            raise ValueError(f"`frames` must be one history, got {len(histories)}: stream each trajectory by itself.")

        sampling: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "generator": generator,
            "attention_kwargs": attention_kwargs,
            "fps": fps,
        }

        @torch.no_grad()
        def predict_chunks(length: int) -> Iterator[Any]:
            self._interrupt = False
            coming = iter(actions)
            try:
                state = RolloutState.first(self.encode_history(histories), _random_seeds(1))
                while not self.interrupt and (chunk := list(islice(coming, length))):
                    chunk_actions = self.action_space.prepare(chunk)
                    futures = []
                    for after, latents in roll(self, state, chunk_actions, **sampling):
                        state = after
                        futures.append(latents)
                    if self.interrupt:
                        break
                    future = torch.cat(futures, dim=2)
                    if output_type == "latent":
                        yield from future[0].unbind(1)
                    else:
                        yield from self.video_processor.postprocess_video(self.decode_latents(future), output_type)[0]
            finally:
                self._interrupt = False
                self.maybe_free_model_hooks()

        return predict_chunks(chunk_length)

    def _upload_folder(
        self, working_dir: str, repo_id: str, token: str | None = None, **kwargs: Any
    ) -> Any:  # the one step that `push_to_hub` and `save_pretrained(push_to_hub=True)` share
        """Upload with a card written from the config, unless the repository has one, and the one-line `pipeline.py`.

        Both belong at the top of a repository: a subfolder gets neither.
        """
        folder = Path(working_dir)
        if not kwargs.get("subfolder"):
            if not file_exists(repo_id, "README.md", token=token):
                write_model_card(self, repo_id).save(folder / "README.md")
            (folder / "pipeline.py").write_text(PIPELINE_FILE)
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)

    def _pad_actions(self, actions: torch.Tensor, length: int) -> torch.Tensor:
        """Actions (B, m, A) and holds after them, `length` together."""
        hold = self.action_space.hold(actions[:, -1:])
        return torch.cat([actions, hold.expand(-1, length - actions.shape[1], -1)], dim=1)

    def _latent_size(self, histories: torch.Tensor) -> tuple[int, int]:
        return histories.shape[-2] // self.vae_scale_factor, histories.shape[-1] // self.vae_scale_factor

    def _set_timesteps(
        self, num_inference_steps: int, timesteps: list[int] | None, sigmas: list[float] | None
    ) -> torch.Tensor:
        custom: dict[str, Any] = {
            name: value for name, value in {"timesteps": timesteps, "sigmas": sigmas}.items() if value is not None
        }
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        if len(custom) > 1 or not custom.keys() <= accepted.keys():
            raise ValueError(
                f"`timesteps` and `sigmas` exclude each other and must be known to the scheduler, got {sorted(custom)} for "
                f"{type(self.scheduler).__name__}."
            )
        own = self.config.timesteps
        if not custom and own and len(own) == num_inference_steps and "timesteps" in accepted:
            custom = {"timesteps": own}
        elif not custom and "sigmas" in accepted and self.transformer.config.prediction_type == "flow_prediction":
            custom = {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)}
        self.scheduler.set_timesteps(
            **(custom or {"num_inference_steps": num_inference_steps}), device=self._execution_device
        )
        return self.scheduler.timesteps

    def _as_scheduler_takes(self, sample: torch.Tensor, noisy: torch.Tensor, timestep: float) -> torch.Tensor:
        """A predicted sample, or the velocity that it means where the scheduler takes velocities."""
        if self.scheduler.config.prediction_type == "sample":
            return sample
        alphas_cumprod = self.scheduler.alphas_cumprod.double().cpu().numpy()
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
        sigma = float(np.interp(timestep, np.arange(len(sigmas)), sigmas))  # as schedulers of sigmas interpolate
        alpha = (1 + sigma**2) ** -0.5
        return (alpha * noisy - sample) / (alpha * sigma)

    def _step_kwargs(self, generator: torch.Generator | list[torch.Generator] | None, eta: float) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in accepted}


def _stack_frames(frames: Any) -> torch.Tensor:
    """History frames of any accepted form as (B, h, 3, H, W), float32 in [0, 1]."""
    pixels = _to_tensor(frames)
    if pixels.ndim not in (3, 4, 5) or pixels.shape[-3] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"`frames` must be RGB images, one, a history (h, ...) or a batch of histories (B, h, ...), got shape "
            f"{tuple(pixels.shape)} (channels first): convert with `image.convert('RGB')`."
        )
    if not torch.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
        raise ValueError(
            f"`frames` must be uint8, or floats in [0, 1], got floats in [{pixels.min():g}, {pixels.max():g}]: divide by "
            "255 or take uint8."
        )
    return pixels[(None,) * (5 - pixels.ndim)]


def _to_tensor(frames: Any) -> torch.Tensor:
    """Frames as (..., C, H, W), uint8 scaled to [0, 1]."""
    if isinstance(frames, PIL.Image.Image):
        if frames.mode != "RGB":
            raise ValueError(f"`frames` must be RGB, got an image of mode {frames.mode}: use `image.convert('RGB')`.")
        frames = np.asarray(frames)
    if isinstance(frames, (list, tuple)):
        parts = [_to_tensor(frame) for frame in frames]
        if len({part.shape for part in parts}) != 1:
            shapes = sorted({tuple(part.shape) for part in parts})
            raise ValueError(f"`frames` must hold at least one frame, all of one size, got shapes {shapes}.")
        return torch.stack(parts)
    if isinstance(frames, np.ndarray):
        if frames.ndim < 3:
            raise ValueError(f"`frames` must be (H, W, 3) or more, got an array {frames.shape}: convert it to RGB.")
        frames = torch.from_numpy(np.ascontiguousarray(np.moveaxis(frames, -1, -3)))
    if not torch.is_tensor(frames):
        raise ValueError(f"`frames` must be PIL images, arrays or tensors, got {type(frames).__name__}.")
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    if not frames.is_floating_point():
        raise ValueError(f"`frames` must be uint8, or floats in [0, 1], got {frames.dtype}.")
    return frames.float()


def _repeat_to(tensor: torch.Tensor, batch_size: int) -> torch.Tensor:
    return tensor.repeat_interleave(batch_size // len(tensor), dim=0)


def _random_seeds(count: int) -> list[int]:
    return torch.randint(2**32, (count,)).tolist()
