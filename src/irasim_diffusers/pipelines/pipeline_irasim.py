"""The pipeline: predicts the video of a robot from history frames and actions.

The file exceeds 500 lines because diffusers keeps a pipeline, with the documentation of its arguments, in one file. The same
documentation makes `__call__`, `stream` and `denoise_window` longer than 60 lines. Checks of arguments are in `inputs`, the
adaptation to schedulers in `schedulers`, and the chaining of chunks in `rollout.roll`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from huggingface_hub import file_exists

from ..action_space import ActionSpace
from ..latents import check_latent_scaling, downsampling_factor, encode_images, scale_latents, unscale_latents
from ..models import IRASimTransformer3DModel, UNetTrajectoryModel
from ..rollout import RolloutState, roll
from . import inputs, schedulers
from .lora import IRASimLoraLoaderMixin
from .model_card import PIPELINE_FILE, write_model_card
from .pipeline_output import IRASimPipelineOutput

SETTINGS = ("num_inference_steps", "chunk_length", "timesteps")
"""Arguments of the constructor that are saved with a checkpoint."""

CPU_ROWS = 8
"""Number of rollouts that a CPU predicts together. The activations of more rollouts do not fit into its caches."""

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


class IRASimPipeline(DiffusionPipeline, IRASimLoraLoaderMixin):
    """Pipeline that predicts the video of a robot executing given actions, from observed frames.

    LoRA weights of the transformer are loaded, set, fused and saved as in any diffusers pipeline. A LoRA file may also
    contain the action encoder, if it was trained.

    The pipeline is a `WorldModel`: `start`, `advance` and `decode` predict rollouts in latent space.

    `num_inference_steps`, `chunk_length` and `timesteps` are settings of the checkpoint and are saved with it. `components`
    contains them, so that `IRASimPipeline(**pipe.components)` and `IRASimPipeline.from_pipe(pipe)` have the settings of
    `pipe`. Schedulers are stateful: use one pipeline per thread, such as `pipe.with_scheduler(type(pipe.scheduler))`, which
    shares all weights.

    Args:
        vae: Per-frame autoencoder; None for a model in pixel space, whose latents are the frames in [-1, 1].
        transformer: The denoiser, a transformer or the U-Net of the baselines. Its config contains the action space, the
            window and the noise process.
        scheduler: Any diffusers scheduler with the checkpoint's prediction type and noise process; for checkpoints that
            predict samples, also one with prediction type `v_prediction`.
        num_inference_steps: Default number of denoising steps. None for 50.
        chunk_length: Default number of actions per chunk of a rollout. None for `max_chunk`.
        timesteps: `num_inference_steps` timesteps that replace the scheduler's own spacing in calls with as many steps, if
            the scheduler accepts custom timesteps. None for the scheduler's spacing.
        window_length: Deprecated; in checkpoints of earlier versions, `chunk_length` plus the number of history frames.

    Raises:
        ValueError: If a setting, or the scaling of the autoencoder's latents, is invalid.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]
    _interrupt = False
    _guidance_scale = 1.0

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny | None,
        transformer: IRASimTransformer3DModel | UNetTrajectoryModel,
        scheduler: SchedulerMixin,
        num_inference_steps: int | None = None,
        chunk_length: int | None = None,
        timesteps: list[int] | None = None,
        window_length: int | None = None,
    ) -> None:
        super().__init__()
        if window_length is not None:
            if chunk_length is not None or not isinstance(window_length, int):
                raise ValueError("`window_length` is deprecated: omit it, and pass the integer `chunk_length`.")
            chunk_length = window_length - transformer.config.num_history_frames
        if chunk_length is not None:
            chunk_length = inputs.check_chunk(chunk_length, transformer.config)
        if num_inference_steps is None:
            num_inference_steps = 50
        inputs.check_steps(num_inference_steps, transformer.config)
        if timesteps is not None and (
            not isinstance(timesteps, list | tuple) or len(timesteps) != num_inference_steps
        ):
            raise ValueError(
                f"`timesteps` must be `num_inference_steps` = {num_inference_steps} numbers, got {timesteps!r:.100}."
            )
        if vae is not None:
            check_latent_scaling(vae)
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            num_inference_steps=num_inference_steps, chunk_length=chunk_length, timesteps=timesteps
        )
        self.vae_scale_factor = downsampling_factor(getattr(self, "vae", None))
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "IRASimPipeline":
        """Load a pipeline like `DiffusionPipeline.from_pretrained`, and check its files and weights.

        Raises:
            ValueError: If the autoencoder has too many or too large layers, if weights are not floating-point or not finite, or if
                a setting or the scaling of the latents is invalid.
            OSError: If the pipeline is not found.
        """
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for name in ("vae", "transformer"):
            inputs.check_finite_weights(getattr(pipeline, name), name)
        return pipeline

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load the config of a pipeline; check the model files first if the pipeline is a local folder.

        `from_pretrained` passes the folder of the downloaded files, so these are checked, too.

        Raises:
            ValueError: See `inputs.check_model_files`.
            OSError: If the config is not found or damaged.
        """
        inputs.check_model_files(Path(pretrained_model_name_or_path))
        return super().load_config(pretrained_model_name_or_path, **kwargs)

    @property
    def components(self) -> dict[str, Any]:
        """Arguments of the constructor: the modules and the settings of the pipeline."""
        return super().components | {name: self.config[name] for name in SETTINGS}

    @property
    def guidance_scale(self) -> float:
        """Classifier-free guidance scale; values above 1 enable guidance.

        A callback may set `pipe._guidance_scale`.
        """
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance is enabled, which evaluates the network twice per step."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of a call, over all windows."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor:
        """The current timestep."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """The `attention_kwargs` of the current call."""
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Whether denoising stops, in this and all later windows; a callback may set `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def chunk_length(self) -> int:
        """Default number of actions per chunk of a rollout."""
        return self.config.chunk_length or self.max_chunk

    @property
    def action_space(self) -> ActionSpace:
        """The checkpoint's action space."""
        return ActionSpace.from_config(self.transformer.config)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the frames on which the checkpoint was trained."""
        config = self.transformer.config
        return config.sample_height * self.vae_scale_factor, config.sample_width * self.vae_scale_factor

    @property
    def fps(self) -> float | None:
        """Frames per second of the training data, if known."""
        return self.transformer.config.fps

    @property
    def num_history_frames(self) -> int:
        """Maximum number of history frames; the exact number for Video-Ada and the U-Net."""
        return self.transformer.config.num_history_frames

    @property
    def cameras(self) -> list[list[str]] | None:
        """Names of the cameras of the training data, as tiled in a frame, if known."""
        return self.transformer.config.cameras

    @property
    def max_chunk(self) -> int:
        """Maximum number of actions per chunk: the predicted frames of the model's window."""
        return self.transformer.config.sample_frames - self.transformer.config.num_history_frames

    def with_scheduler(self, scheduler: str | type[SchedulerMixin], **changes: Any) -> "IRASimPipeline":
        """Return a pipeline with another scheduler that shares all weights with this one.

        The scheduler keeps the noise process of the checkpoint. If the checkpoint predicts samples, a scheduler of another
        class gets the prediction type `v_prediction`, which every class supports.

        Args:
            scheduler: Class of a diffusers scheduler, or its name, such as `"DPMSolverMultistepScheduler"`.
            changes: Entries of the scheduler's config, such as `timestep_spacing="trailing"`.

        Returns:
            A new pipeline with the settings of this one.

        Raises:
            ValueError: If the class or an entry is unknown, or the scheduler does not fit the checkpoint.
        """
        new = schedulers.exchange(self.scheduler, scheduler, self.transformer.config, **changes)
        pipeline = type(self)(**self.components | {"scheduler": new})
        pipeline.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return pipeline

    def check_inputs(
        self,
        actions: torch.Tensor,
        histories: torch.Tensor,
        *,
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        num_videos_per_trajectory: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
        fps: float | None = None,
        decode_chunk_size: int = 16,
        eta: float = 0.0,
    ) -> int:
        """Check the arguments of a call before any computation, and return its number of videos.

        Args:
            actions: Actions (B, n, A) in raw units.
            histories: Histories (B, h, 3, H, W) in [-1, 1].
            num_inference_steps: See `__call__`.
            guidance_scale: See `__call__`.
            num_videos_per_trajectory: See `__call__`.
            generator: See `__call__`.
            latents: See `__call__`.
            output_type: See `__call__`.
            callback_on_step_end_tensor_inputs: See `__call__`.
            fps: See `__call__`.
            decode_chunk_size: See `__call__`.
            eta: See `__call__`.

        Raises:
            ValueError: If an argument is invalid. The message contains its name, what is required and what was passed.
        """
        config = self.transformer.config
        inputs.check_steps(num_inference_steps, config)
        inputs.check_numbers(
            num_videos_per_trajectory=num_videos_per_trajectory,
            decode_chunk_size=decode_chunk_size,
            guidance_scale=guidance_scale,
            eta=eta,
        )
        batch_size = inputs.check_batch(len(histories), len(actions), num_videos_per_trajectory, generator)
        size = [side // self.vae_scale_factor for side in histories.shape[-2:]]
        inputs.check_latents(latents, (batch_size, config.in_channels, actions.shape[1], *size))
        inputs.check_fps(fps, config)
        inputs.check_cache(self.transformer, guidance_scale)
        inputs.check_outputs(output_type, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        self.check_scheduler()
        schedulers.check_warmup(self.scheduler, num_inference_steps)
        return batch_size

    def check_scheduler(self) -> None:
        """Check that the scheduler fits the checkpoint.

        Raises:
            ValueError: If the prediction type or the noise process differs from the checkpoint's, or the scheduler clips
                samples or has another setting that the pipeline does not support; see `schedulers.check_scheduler`.
        """
        schedulers.check_scheduler(self.scheduler, self.transformer.config)

    def preprocess_frames(self, frames: Any, resize: bool = False) -> torch.Tensor:
        """Convert history frames of any accepted form to one tensor.

        Args:
            frames: See `__call__`.
            resize: Resize frames that do not have the checkpoint's size, instead of raising an error.

        Returns:
            Histories (B, h, 3, H, W), float32 in [-1, 1].

        Raises:
            ValueError: If the number of frames does not match the checkpoint, frames are not RGB, out of range, or of another
                size, or the autoencoder is missing.
        """
        config = self.transformer.config
        inputs.check_autoencoder(self.vae, config.in_channels)
        pixels = inputs.stack_frames(frames)  # (B, h, 3, H, W) in [0, 1]
        inputs.check_history(pixels, config)
        return self.video_processor.normalize(inputs.fit_frames(pixels, self.frame_size, resize))

    def encode_history(self, pixels: torch.Tensor, decode_chunk_size: int = 16) -> torch.Tensor:
        """Encode histories (B, h, 3, H, W) in [-1, 1] to scaled latents (B, C, h, H / f, W / f), float32.

        `f` is the downscaling factor of the autoencoder.

        Raises:
            ValueError: If the autoencoder overflows in float16.
        """
        if self.vae is None:
            return pixels.to(self._execution_device).float().transpose(1, 2)
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        flat = pixels.flatten(0, 1).to(memory_format=torch.channels_last)  # convolutions are faster in this layout
        latents = torch.cat([encode_images(self.vae, chunk) for chunk in flat.split(decode_chunk_size)])
        latents = latents.to(self._execution_device, torch.float32)  # the autoencoder may be on another device
        self._check_overflow(latents)
        return scale_latents(self.vae, latents).unflatten(0, pixels.shape[:2]).transpose(1, 2)

    def decode_latents(self, latents: torch.Tensor, decode_chunk_size: int = 16) -> torch.Tensor:
        """Decode scaled latents (B, C, F, h, w) to pixels (B, 3, F, H, W) in [-1, 1].

        `decode_chunk_size` frames are decoded at a time.

        Raises:
            ValueError: If the autoencoder overflows in float16.
        """
        if self.vae is None:
            return latents
        flat = unscale_latents(self.vae, latents).transpose(1, 2).flatten(0, 1)
        flat = flat.to(self.vae.dtype, memory_format=torch.channels_last)
        pixels = torch.cat([self.vae.decode(chunk).sample.float() for chunk in flat.split(decode_chunk_size)])
        self._check_overflow(pixels)
        return pixels.unflatten(0, (latents.shape[0], latents.shape[2])).transpose(1, 2)

    def _check_overflow(self, values: torch.Tensor) -> None:
        if self.vae.dtype == torch.float16 and not torch.isfinite(values).all():
            raise ValueError(
                "the autoencoder overflows in float16, as SDXL's does: load with `dtype={'default': torch.float16, "
                "'vae': torch.float32}`, or in bfloat16."
            )

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return noise of unit variance, given or drawn.

        Args:
            shape: Shape (B, C, n, h, w).
            generator: Source of the drawn noise.
            latents: Noise of the first frames (B, C, m, h, w), m <= n. The other n - m frames, which pad a window, are drawn;
                if `generator` is None, they are drawn from seed 0.

        Returns:
            Noise of this shape, float32.
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
        guidance_scale: float | None = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        attention_kwargs: dict[str, Any] | None = None,
        fps: float | None = None,
        on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        memory: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Denoise the future of one window; the history stays clean.

        Args:
            history: Clean history (B, C, h, H, W), scaled latents.
            actions: Actions (B, n, A) in raw units.
            latents: Noise (B, C, n, H, W) of unit variance, from `prepare_latents`; it is scaled for the scheduler here.
            num_inference_steps: Number of denoising steps.
            guidance_scale: Above 1 the network is evaluated twice per step, with and without actions. None keeps the current
                scale.
            generator: Source of the noise of stochastic schedulers.
            timesteps: Custom timesteps, for schedulers that accept them.
            sigmas: Custom sigmas, for schedulers that accept them.
            eta: Eta of DDIM.
            attention_kwargs: Passed to the transformer.
            fps: Frames per second, for checkpoints that embed them; None for the value in the config.
            on_step_end: Called with step, timestep and latents after each step; returns the latents for the next step, relative to
                the last history frame if the checkpoint has `relative_latents`.
            memory: Memory of the model after the previous window of a rollout, if any; see `RolloutState`.

        Returns:
            The future (B, C, n, H, W), scaled latents, float32, and the memory after it, which is empty for most models.

        Raises:
            ValueError: If `timesteps`, `sigmas` or the shape of the actions are invalid.
        """
        schedule = self._set_timesteps(num_inference_steps, timesteps, sigmas)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)  # this factor depends on the timesteps
        if guidance_scale is not None:
            self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        step_arguments = schedulers.step_arguments(self.scheduler, generator=generator, eta=eta)
        self.transformer._reset_stateful_cache()  # a cache may hold the state of the previous window
        conditions = {"attention_kwargs": attention_kwargs, "fps": fps, "memory": memory}
        conditions = {name: value for name, value in conditions.items() if value}
        after: Mapping[str, torch.Tensor] = {}
        for index, t in enumerate(schedule):
            if self.interrupt:
                break
            self._current_timestep = t
            scale = getattr(self.scheduler, "scale_model_input", None)  # flow-matching schedulers do not have it
            noisy = latents if scale is None else scale(latents, t)
            prediction, after = self._predict(history, noisy, t, actions, conditions)
            if self.transformer.config.prediction_type == "sample":
                prediction = schedulers.convert_sample(self.scheduler, prediction, noisy, float(t))
            latents = self.scheduler.step(prediction, t, latents, **step_arguments, return_dict=False)[0]
            if on_step_end is not None:
                latents = on_step_end(index, t, latents)
        return latents + history[:, :, -1:] if self.transformer.config.relative_latents else latents, after

    def _predict(
        self,
        history: torch.Tensor,
        noisy: torch.Tensor,
        t: torch.Tensor,
        actions: torch.Tensor,
        conditions: dict[str, Any],
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return the prediction for the future (B, C, n, H, W), with guidance, float32, and the memory."""
        window = torch.cat([history, noisy], dim=2).to(self.transformer.dtype)
        timestep = t.expand(len(noisy)).to(noisy.device)

        def evaluate(action_mask: torch.Tensor | None) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
            arguments = conditions | {"action_mask": action_mask, "return_dict": False}
            sample, *others = self.transformer(window, timestep, actions, **arguments)
            memory = others[0] if self.transformer.config.get("moving_layers") else {}
            return sample[:, :, history.shape[2] :].float(), memory

        with self.transformer.cache_context("cond"):
            prediction, memory = evaluate(None)
        if not self.do_classifier_free_guidance:
            return prediction, memory
        with self.transformer.cache_context("uncond"):
            unconditional, _ = evaluate(torch.zeros(actions.shape[:2], dtype=torch.bool, device=actions.device))
        return unconditional + self.guidance_scale * (prediction - unconditional), memory

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # longer than 60 lines because it documents and checks all arguments, as in diffusers
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
        decode_chunk_size: int = 16,
        chunk_length: int | None = None,
        fps: float | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[["IRASimPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> IRASimPipelineOutput | tuple:
        """Generate the video of the given actions.

        Args:
            frames: History in temporal order: a PIL image, a list of PIL images, uint8 or [0, 1] arrays (H, W, 3),
                (h, H, W, 3) or (B, h, H, W, 3), tensors (3, H, W), (h, 3, H, W) or (B, h, 3, H, W), or a list of
                histories, each in one of these forms.
            actions: Actions (n, A) or (B, n, A) in the units of the checkpoint's action space. One history with
                several action sequences is encoded once. More actions than a window holds are predicted in a
                rollout: each window starts from the last frames of the previous one.
            num_inference_steps: Number of denoising steps per window. None for the pipeline's default.
            guidance_scale: Classifier-free guidance scale. Values above 1 enable guidance, which evaluates the network twice
                per step; the paper uses no guidance.
            num_videos_per_trajectory: Number of videos per trajectory; they are consecutive in the output.
            generator: Seeded generator, or one per video; with one per video, a video is the same alone and in a batch.
            latents: Initial noise (B, C, n, h, w) of unit variance.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: Return an `IRASimPipelineOutput` instead of a tuple.
            resize: Resize frames of the wrong size instead of raising an error.
            timesteps: Custom timesteps, for schedulers that accept them.
            sigmas: Custom sigmas, for schedulers that accept them.
            eta: Eta of DDIM, in [0, 1].
            decode_chunk_size: Number of frames that the autoencoder encodes or decodes at a time; bounds its memory.
            chunk_length: Number of actions per chunk, at most `max_chunk`; Video-Ada and the U-Net require `max_chunk`. Fewer
                actions per chunk give more and shorter windows. None for the pipeline's default.
            fps: Frames per second of history and actions, for checkpoints that embed them (Open-Sora). None for
                the value in the config.
            attention_kwargs: `{"scale": s}` scales LoRA layers.
            callback_on_step_end: Called as `callback(pipe, step, timestep, {name: tensor})` after each step; returns a
                dict whose `latents`, if any, replace the current ones. Steps are counted over all windows. A
                `PipelineCallback` or `MultiPipelineCallbacks` of diffusers is also accepted.
            callback_on_step_end_tensor_inputs: Names of the tensors for the callback: `["latents"]` (default) or an empty list.

        Returns:
            The predicted frames of each trajectory, one per action. If a callback interrupts the call, the frames of the current
            window are denoised only up to this step, and later frames are missing.

        Raises:
            ValueError: If an argument is invalid, before any computation; later, if the prediction is not finite or the
                autoencoder overflows in float16.

        Examples:
        """  # noqa: D414 (filled by the decorator)
        config = self.transformer.config
        tensor_inputs = callback_on_step_end_tensor_inputs
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback_on_step_end.tensor_inputs
        tensor_inputs = ["latents"] if tensor_inputs is None else tensor_inputs
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        actions = self.action_space.prepare(actions)
        histories = self.preprocess_frames(frames, resize)
        chunk_length = inputs.check_chunk(self.chunk_length if chunk_length is None else chunk_length, config)
        batch_size = self.check_inputs(
            actions,
            histories,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_videos_per_trajectory=num_videos_per_trajectory,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=tensor_inputs,
            fps=fps,
            decode_chunk_size=decode_chunk_size,
            eta=eta,
        )
        steps_per_window = len(self._set_timesteps(num_inference_steps, timesteps, sigmas))
        num_actions, num_chunks = actions.shape[1], -(-actions.shape[1] // chunk_length)
        self._num_timesteps = num_chunks * steps_per_window
        self._guidance_scale = guidance_scale
        self._current_timestep = None
        self._interrupt = False

        actions = self._pad_actions(inputs.repeat_rows(actions, batch_size), num_chunks * chunk_length)
        is_seeded = generator is not None or latents is not None
        state = self._start(histories, [0] * batch_size if is_seeded else _random_seeds(batch_size), decode_chunk_size)
        step = 0  # over all windows
        futures = []
        with self.progress_bar(total=self.num_timesteps) as progress_bar:

            def on_step_end(_: int, t: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
                nonlocal step
                if callback_on_step_end is not None:
                    tensors = {"latents": current} if tensor_inputs else {}
                    current = callback_on_step_end(self, step, t, tensors).pop("latents", current)
                step += 1
                progress_bar.update()
                return current

            sampling = {
                "num_inference_steps": num_inference_steps,
                "guidance_scale": None,  # keep the current scale, which a callback may have changed
                "generator": generator,
                "latents": latents,
                "timesteps": timesteps,
                "sigmas": sigmas,
                "eta": eta,
                "attention_kwargs": attention_kwargs,
                "fps": fps,
                "on_step_end": on_step_end,
            }
            try:
                for _, chunk in roll(self, state, actions, chunk_length, **sampling):
                    futures.append(chunk)
                    if self.interrupt:
                        break
            finally:
                self._interrupt = False  # reset for the next call
        self._current_timestep = None

        future = inputs.check_prediction(torch.cat(futures, dim=2)[:, :, :num_actions])
        if output_type == "latent":
            video = future
        else:
            video = self.video_processor.postprocess_video(self.decode_latents(future, decode_chunk_size), output_type)
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
            resize: Resize frames of the wrong size instead of raising an error.

        Returns:
            The state of `len(seeds)` rollouts.

        Raises:
            ValueError: If the frames do not match the checkpoint, there is neither one history nor one per seed, `seeds` is empty
                or contains a negative number, or the autoencoder overflows in float16.
        """
        seeds = [int(seed) for seed in seeds]
        if not seeds or min(seeds) < 0:
            raise ValueError(f"`seeds` must be at least one non-negative integer, got {seeds}.")
        pixels = self.preprocess_frames(frames, resize)
        if len(pixels) not in (1, len(seeds)):
            raise ValueError(
                f"`frames` must be one history or {len(seeds)} histories, one per seed, got {len(pixels)}."
            )
        return self._start(pixels, seeds)

    def _start(self, histories: torch.Tensor, seeds: Sequence[int], decode_chunk_size: int = 16) -> RolloutState:
        latents = self.encode_history(histories, decode_chunk_size)
        return RolloutState.first(inputs.repeat_rows(latents, len(seeds)), seeds)

    def advance(
        self,
        state: RolloutState,
        actions: torch.Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        **sampling: Any,
    ) -> tuple[RolloutState, torch.Tensor]:
        """Predict one chunk. Gradients flow to the actions and the history unless the caller disables them.

        Unless `generator`, `latents` or `on_step_end` is given, a CPU predicts at most `CPU_ROWS` rows together, which is faster
        and does not change the result.

        Args:
            state: The state of B rollouts.
            actions: Actions (B, n, A) in raw units, n in [1, `max_chunk`].
            num_inference_steps: Number of denoising steps. None for the pipeline's default.
            guidance_scale: See `__call__`. None keeps the current scale.
            generator: Source of the noise instead of the seeds of the state.
            latents: Noise (B, C, m, H, W) of the whole rollout, from its first predicted frame; see `prepare_latents`.
            sampling: Other arguments of `denoise_window`.

        Returns:
            The state after the chunk, and its scaled latents (B, C, n, H, W), float32.

        Raises:
            ValueError: If there are no or too many actions, or not one sequence per row, or if the number of steps or an argument
                of `denoise_window` is invalid.
        """
        config, steps = self.transformer.config, num_inference_steps
        steps = self.config.num_inference_steps if steps is None else steps
        inputs.check_steps(steps, config)
        if actions.ndim != 3 or len(actions) != len(state) or not 1 <= actions.shape[1] <= self.max_chunk:
            raise ValueError(
                f"`actions` must be ({len(state)}, n, {config.action_dim}) with n in [1, {self.max_chunk}], got "
                f"{tuple(actions.shape)}: `roll` splits longer sequences."
            )
        length = actions.shape[1]
        if config.conditioning == "video":  # the number of actions is fixed
            actions = self._pad_actions(actions, self.max_chunk)
        sampling |= {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        independent = generator is None and latents is None and "on_step_end" not in sampling
        rows = CPU_ROWS if independent and self._execution_device.type == "cpu" else len(state)
        parts = torch.arange(len(state)).split(rows)
        futures, memories = zip(
            *(
                self._denoise(
                    state if len(parts) == 1 else state.select(part), actions[part], generator, latents, sampling
                )
                for part in parts
            ),
            strict=True,
        )
        future = torch.cat(futures)[:, :, :length]
        memory = {name: torch.cat([memory[name] for memory in memories]) for name in memories[0]}
        return state.append(future, config.num_history_frames, memory), future

    def _denoise(
        self,
        state: RolloutState,
        actions: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        sampling: dict[str, Any],
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Draw the noise of a chunk and denoise it; return latents (B, C, n, H, W) and the memory."""
        history, length = state.latents.to(self._execution_device), actions.shape[1]
        shape = (len(state), history.shape[1], length, *history.shape[-2:])
        if generator is None and latents is None:
            sources = [state.generators(index) for index in range(length)]
            frame = (*shape[:2], 1, *shape[3:])
            noise = torch.cat([self.prepare_latents(frame, source) for source in sources], dim=2)
            generator = sources[0]  # a stochastic scheduler draws more noise from it
        else:
            first = int(state.step.max())
            given = None if latents is None else latents[:, :, first : first + length]
            noise = self.prepare_latents(shape, generator, given)
        sampling = sampling | {"generator": generator, "memory": state.memory}
        return self.denoise_window(history, actions.to(history.device), noise, **sampling)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents (B, C, n, h, w) to frames (B, n, 3, H, W) in [0, 1].

        Raises:
            ValueError: If the autoencoder overflows in float16.
        """
        return self.video_processor.postprocess_video(self.decode_latents(latents), "pt")

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
        """Predict one trajectory while its actions arrive.

        The frames of a chunk are predicted as soon as its `chunk_length` actions have arrived. The next action is requested
        only when all predicted frames have been consumed, so that a policy can observe them. The history is kept in latents,
        which are never decoded and encoded again.

        Args:
            frames: The history; see `__call__`.
            actions: Any iterable of actions (A,) in the units of the action space, finite or infinite.
            chunk_length: Number of actions that are predicted together; the last chunk may be shorter. None for 4, or
                the pipeline's `chunk_length` if it is smaller. Video-Ada and the U-Net require `max_chunk`, their default.
            num_inference_steps: Number of denoising steps per chunk. None for the pipeline's default.
            guidance_scale: See `__call__`.
            generator: Seeded generator.
            output_type: `"pil"` for images, `"np"` (H, W, 3) or `"pt"` (3, H, W) in [0, 1], `"latent"` (C, h, w).
            resize: Resize frames of the wrong size instead of raising an error.
            fps: See `__call__`.
            attention_kwargs: See `__call__`.

        Returns:
            An iterator over predicted frames, one per action.

        Raises:
            ValueError: If an argument is invalid, immediately; if an action is invalid, a prediction is not finite or the
                autoencoder overflows in float16, when the chunk is predicted.

        Examples:
            ```py
            >>> for frame in pipe.stream(first_frame, gamepad_targets()):
            ...     show(frame)
            ```
        """
        config, steps = self.transformer.config, num_inference_steps
        steps = self.config.num_inference_steps if steps is None else steps
        if chunk_length is None:
            chunk_length = self.max_chunk if config.conditioning == "video" else min(4, self.chunk_length)
        length = inputs.check_chunk(chunk_length, config, longest=math.inf)  # `roll` splits longer chunks
        histories = self.preprocess_frames(frames, resize)
        hold = torch.zeros(1, length, config.action_dim)
        self.check_inputs(
            hold,
            histories,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type=output_type,
            fps=fps,
        )
        if len(histories) != 1:
            raise ValueError(f"`frames` must be one history, got {len(histories)}: use one stream per trajectory.")
        sampling = {
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "generator": generator,
            "attention_kwargs": attention_kwargs,
            "fps": fps,
        }
        return self._stream(histories, iter(actions), length, output_type, sampling)

    @torch.no_grad()
    def _stream(
        self,
        histories: torch.Tensor,
        actions: Iterator[Any],
        length: int,
        output_type: str,
        sampling: dict[str, Any],
    ) -> Iterator[Any]:
        """Yield the frames of a stream; its arguments have been checked."""
        self._interrupt = False
        try:
            seeds = _random_seeds(1) if sampling["generator"] is None else [0]  # unused with a generator
            state = self._start(histories, seeds)
            while not self.interrupt and (taken := list(islice(actions, length))):
                futures = []
                for after, chunk in roll(self, state, self.action_space.prepare(taken), **sampling):
                    state = after
                    futures.append(chunk)
                if self.interrupt:
                    break
                future = inputs.check_prediction(torch.cat(futures, dim=2))
                if output_type == "latent":
                    yield from future[0].unbind(1)
                else:
                    yield from self.video_processor.postprocess_video(self.decode_latents(future), output_type)[0]
        finally:
            self._interrupt = False
            self.maybe_free_model_hooks()

    def _upload_folder(self, working_dir: str, repo_id: str, token: str | None = None, **kwargs: Any) -> Any:
        """Add a model card, unless the repository has one, and `pipeline.py`, then upload.

        `push_to_hub` and `save_pretrained(push_to_hub=True)` share this step. Both files belong to the root of a repository; a
        subfolder gets neither.
        """
        folder = Path(working_dir)
        if not kwargs.get("subfolder"):
            if not file_exists(repo_id, "README.md", token=token):
                write_model_card(self, repo_id).save(folder / "README.md")
            (folder / "pipeline.py").write_text(PIPELINE_FILE, encoding="utf-8")
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)

    def _pad_actions(self, actions: torch.Tensor, length: int) -> torch.Tensor:
        """Pad actions (B, m, A) with hold actions to `length`."""
        hold = self.action_space.hold(actions[:, -1:])
        return torch.cat([actions, hold.expand(-1, length - actions.shape[1], -1)], dim=1)

    def _set_timesteps(
        self, num_inference_steps: int, timesteps: list[int] | None, sigmas: list[float] | None
    ) -> torch.Tensor:
        return schedulers.set_timesteps(
            self.scheduler,
            num_inference_steps,
            timesteps,
            sigmas,
            preferred=self.config.timesteps,
            is_flow=self.transformer.config.prediction_type == "flow_prediction",
            device=self._execution_device,
        )


def _random_seeds(count: int) -> list[int]:
    return torch.randint(2**32, (count,)).tolist()
