import inspect

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.pipelines.schedulers import WITHOUT_SAMPLE

SCHEDULERS = [
    "PNDMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
]


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(pipeline, frames, actions, **kwargs):
    return pipeline(frames, actions, **{"num_inference_steps": 3, "output_type": "pt"} | kwargs).frames


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_scheduler_keeps_the_history_clean(name, prediction_type, frames, actions):
    pipeline = tiny_pipeline(prediction_type=prediction_type)
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    windows = []
    pipeline.transformer.register_forward_pre_hook(lambda _, args: windows.append(args[0].clone()))
    history = pipeline.encode_history(pipeline.preprocess_frames(frames)).detach()
    video = run(pipeline, frames, actions[:3], generator=seeded(0))
    assert video.shape == (1, 3, 3, 8, 12)
    assert torch.isfinite(video).all()
    for window in windows:
        torch.testing.assert_close(window[:, :, :2], history)
    assert not torch.equal(windows[0][:, :, 2:], windows[-1][:, :, 2:])


def test_static_parts_are_zero_in_relative_latents(frames, actions):
    """A network that predicts no change repeats the last frame in every window, in calls and streams."""
    pipeline = tiny_pipeline(prediction_type="sample", relative_latents=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    for parameter in pipeline.transformer.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    last = pipeline.encode_history(pipeline.preprocess_frames(frames))[:, :, -1:]
    video = run(pipeline, frames, actions, output_type="latent")
    torch.testing.assert_close(video, last.expand(-1, -1, 7, -1, -1), atol=1e-4, rtol=0)
    for frame in pipeline.stream(frames, actions, 2, num_inference_steps=2, output_type="latent"):
        torch.testing.assert_close(frame, last[0, :, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_accepts_predicted_samples(name, frames, actions):
    """A network that always predicts the same sample leads to that sample, also for velocities."""
    pipeline = tiny_pipeline(prediction_type="sample")
    sample = torch.randn(1, 4, 5, 4, 6, generator=torch.Generator().manual_seed(5))
    pipeline.transformer.register_forward_hook(lambda *_: (sample,))
    settings = {"final_sigmas_type": "zero", "set_alpha_to_one": True, "timestep_spacing": "leading"}
    scheduler_class = getattr(diffusers, name)
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **settings, prediction_type="sample")
    if name in WITHOUT_SAMPLE:
        with pytest.raises(
            ValueError, match=f"which {name} does not: create it with .* prediction_type='v_prediction'"
        ):
            run(pipeline, frames, actions[:3])
    pipeline.scheduler = scheduler_class.from_config(
        pipeline.scheduler.config, **settings, prediction_type="v_prediction"
    )
    video = run(pipeline, frames, actions[:3], num_inference_steps=40, generator=seeded(0), output_type="latent")
    tolerance = 0.05 if name == "PNDMScheduler" else 2e-3  # it extrapolates velocities
    torch.testing.assert_close(video, sample[:, :, 2:], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_network_is_sampled_exactly(name, pipeline, frames, actions):
    """With the true noise of one sample as the prediction, every scheduler must find that sample."""
    pipeline.scheduler = getattr(diffusers, name).from_config(
        pipeline.scheduler.config, final_sigmas_type="zero", set_alpha_to_one=True, timestep_spacing="leading"
    )
    sample = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(5))
    alphas = pipeline.scheduler.alphas_cumprod

    class Oracle(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")
        config = pipeline.transformer.config
        cache_context = pipeline.transformer.cache_context
        _reset_stateful_cache = pipeline.transformer._reset_stateful_cache

        def forward(self, window, timestep, actions, **_):
            alpha = float(np.interp(float(timestep[0]), np.arange(len(alphas)), alphas.numpy()))
            noise = (window[:, :, 2:] - alpha**0.5 * sample) / (1 - alpha) ** 0.5
            return (torch.cat([window[:, :, :2], noise], dim=2),)

    history = pipeline.encode_history(pipeline.preprocess_frames(frames)).detach()
    pipeline.transformer = Oracle()
    actions = torch.from_numpy(actions[None, :3])
    noise = pipeline.prepare_latents(sample.shape, seeded(0))
    future = pipeline.denoise_window(history, actions, noise, 40, generator=seeded(0))
    assert (future - sample).abs().mean() < 0.06


def test_history_is_passed_unchanged(pipeline, frames, actions):
    before = frames.copy()
    run(pipeline, frames, actions)
    assert np.array_equal(frames, before)


def test_one_frame_per_action(pipeline, frames, actions):
    for count in (1, 2, 3, 4, 6, 7):
        assert run(pipeline, frames, actions[:count]).shape[1] == count


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_video_is_the_same_alone_and_in_a_batch(name, pipeline, frames, actions):
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    histories = np.stack([frames, frames[::-1], 255 - frames])
    batch = np.stack([actions, actions[::-1], actions * 2])
    together = run(pipeline, histories, batch, generator=seeded(5, 6, 7))
    for index in range(3):
        alone = run(pipeline, histories[index], batch[index], generator=seeded(5 + index))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_candidates_match_separate_calls(pipeline, frames, actions):
    candidates = np.stack([actions, actions + 1, actions - 1])
    encoded = []
    pipeline.vae.encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    together = run(pipeline, frames, candidates, generator=seeded(5, 6, 7))
    assert encoded == [2]  # two history frames, once
    for index, candidate in enumerate(candidates):
        alone = run(pipeline, frames, candidate, generator=seeded(5 + index))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_several_videos_per_trajectory(pipeline, frames, actions):
    batch = np.stack([actions, actions + 1])
    video = run(pipeline, frames, batch, num_videos_per_trajectory=2, generator=seeded(1, 2, 3, 4))
    assert len(video) == 4
    torch.testing.assert_close(video[2:3], run(pipeline, frames, batch[1], generator=seeded(3)), rtol=1e-4, atol=1e-5)


def test_same_seed_same_video(pipeline, frames, actions):
    first, second, other = (run(pipeline, frames, actions, generator=seeded(seed)[0]) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


def leading(pipeline, name):
    """The pipeline with a scheduler; the initial noise of sigma schedulers depends on the timesteps."""
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, timestep_spacing="leading")
    return pipeline


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler"])
def test_rollout_matches_chained_windows(name, pipeline, frames, actions):
    leading(pipeline, name)
    rollout = run(pipeline, frames, actions[:6], generator=seeded(9)[0], output_type="latent")
    generator = seeded(9)[0]
    history = pipeline.encode_history(pipeline.preprocess_frames(frames)).detach()
    parts = []
    leading(pipeline, name)  # a new scheduler without timesteps
    for start in (0, 3):
        window_actions = torch.from_numpy(actions[None, start : start + 3])
        noise = pipeline.prepare_latents((1, 4, 3, 4, 6), generator)
        with torch.no_grad():
            parts.append(pipeline.denoise_window(history, window_actions, noise, 3, generator=generator))
        history = parts[-1][:, :, -2:]
    torch.testing.assert_close(rollout, torch.cat(parts, dim=2), rtol=1e-5, atol=1e-6)


def test_one_history_frame_grows_to_two(pipeline, frames, actions):
    histories = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args: histories.append(args[0].shape[2] - args[2].shape[1])
    )
    assert run(pipeline, frames[:1], actions).shape[1] == 7  # 4 + 3
    assert [*dict.fromkeys(histories)] == [1, 2]


def test_given_noise_determines_the_video(pipeline, frames, actions):
    noise = torch.randn(1, 4, 1, 4, 6)  # the window has room for more frames
    first, again = (run(pipeline, frames, actions[:1], latents=noise) for _ in range(2))
    assert torch.equal(first, again)


def test_remainder_is_padded_with_hold_actions(frames, actions):
    given = []
    for space in ("absolute", "relative"):
        pipeline = tiny_pipeline(action_space=space)
        pipeline.transformer.register_forward_pre_hook(lambda _, args: given.append(args[2][0]))
        run(pipeline, frames, actions[:1], num_inference_steps=1)
    first = torch.from_numpy(actions[:1]).float()
    torch.testing.assert_close(given[0], first.expand(3, -1))
    torch.testing.assert_close(given[-1], torch.cat([first, torch.zeros(2, 3)]))


def test_given_latents_replace_the_noise(pipeline, frames, actions):
    noise = torch.randn(1, 4, 3, 4, 6, generator=seeded(4)[0])
    given = run(pipeline, frames, actions[:3], latents=noise)
    torch.testing.assert_close(given, run(pipeline, frames, actions[:3], generator=seeded(4)[0]))


def test_given_latents_are_used_by_every_window_and_extended(pipeline, frames, actions):
    noise = torch.randn(1, 4, 7, 4, 6, generator=seeded(4)[0])
    kwargs = {"latents": noise, "output_type": "latent"}
    whole = run(pipeline, frames, actions, generator=seeded(5)[0], **kwargs)
    assert torch.equal(run(pipeline, frames, actions, generator=seeded(5)[0], **kwargs), whole)
    for count in (3, 6):  # whole windows, so that the generator draws nothing
        part = run(pipeline, frames, actions[:count], **kwargs | {"latents": noise[:, :, :count]})
        torch.testing.assert_close(part, whole[:, :, :count])
    last = run(pipeline, frames, actions, generator=seeded(6)[0], **kwargs)
    torch.testing.assert_close(last[:, :, :6], whole[:, :, :6])
    assert not torch.allclose(last[:, :, 6], whole[:, :, 6]), "the frames that fill the last window up are drawn"
    filled = pipeline.prepare_latents((1, 4, 5, 4, 6), seeded(7)[0], noise[:, :, :2])
    assert torch.equal(filled[:, :, :2], noise[:, :, :2])
    assert torch.equal(filled[:, :, 2:], torch.randn(1, 4, 3, 4, 6, generator=seeded(7)[0]))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("DDIMScheduler", {"eta": 1.0}),
        ("DDPMScheduler", {"timesteps": [900, 500, 20], "num_inference_steps": 50}),
        ("EulerDiscreteScheduler", {"sigmas": [100.0, 10.0, 0.1, 0.0], "num_inference_steps": 50}),
    ],
)
def test_options_of_samplers_take_effect(name, change, pipeline, frames, actions):
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    plain = run(pipeline, frames, actions[:3], generator=seeded(1))
    changed = run(pipeline, frames, actions[:3], generator=seeded(1), **change)
    assert len(calls) == 6, "both take three steps"
    assert not torch.allclose(changed, plain, atol=1e-3)


def test_guidance_moves_away_from_the_null_action(pipeline, frames, actions):
    calls = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["action_mask"] is not None and not kwargs["action_mask"].any()),
        with_kwargs=True,
    )
    kwargs = {"generator": seeded(1), "num_inference_steps": 2}
    run(pipeline, frames, actions[:3], **kwargs)
    assert not any(calls)
    plain, guided = (
        run(pipeline, frames, actions[:3], guidance_scale=scale, **kwargs | {"generator": seeded(1)})
        for scale in (1.0, 3.0)
    )
    assert sum(calls) == 3  # two steps and PNDM's extra one
    assert not torch.allclose(plain, guided)
    for scale in (0.0, 0.5):  # as in diffusers, guidance requires a scale above 1
        assert torch.equal(
            run(pipeline, frames, actions[:3], guidance_scale=scale, **kwargs | {"generator": seeded(1)}), plain
        )


def test_actions_change_the_video(pipeline, frames, actions):
    first, second = (run(pipeline, frames, actions * factor, generator=seeded(1)) for factor in (1, 3))
    assert not torch.allclose(first, second, atol=1e-3)


def test_decode_chunk_size_changes_nothing(pipeline, frames, actions):
    sizes = []
    pipeline.vae.decoder.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    whole, chunked = (run(pipeline, frames, actions, generator=seeded(1), decode_chunk_size=size) for size in (16, 2))
    assert sizes == [7, 2, 2, 2, 1]
    torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-5)


def test_output_types_agree(pipeline, frames, actions):
    outputs = {
        kind: run(pipeline, frames, actions, generator=seeded(1), output_type=kind) for kind in ("pt", "np", "pil")
    }
    assert outputs["np"].shape == (1, 7, 8, 12, 3)
    assert np.allclose(outputs["np"], outputs["pt"].permute(0, 1, 3, 4, 2).numpy())
    assert isinstance(outputs["pil"][0][0], PIL.Image.Image)
    assert np.abs(np.asarray(outputs["pil"][0][6]) - outputs["np"][0, 6] * 255).max() <= 1
    latents = run(pipeline, frames, actions, generator=seeded(1), output_type="latent")
    with torch.no_grad():
        decoded = (pipeline.decode_latents(latents).transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, outputs["pt"], rtol=1e-4, atol=1e-5)
    as_tuple = run_tuple(pipeline, frames, actions)
    torch.testing.assert_close(as_tuple, outputs["pt"])


def run_tuple(pipeline, frames, actions):
    (video,) = pipeline(
        frames, actions, num_inference_steps=3, generator=seeded(1), output_type="pt", return_dict=False
    )
    return video


def test_every_form_of_frames_gives_the_same_video(pipeline, frames):
    images = [PIL.Image.fromarray(frame) for frame in frames]
    channels_first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    forms = [
        images,
        [images],
        frames,
        frames[None],
        [frames],
        list(frames),
        frames / 255.0,
        channels_first,
        channels_first.float() / 255,
        channels_first[None],
    ]
    expected = pipeline.preprocess_frames(frames)
    assert expected.shape == (1, 2, 3, 8, 12)
    for form in forms:
        torch.testing.assert_close(pipeline.preprocess_frames(form), expected)
    single = pipeline.preprocess_frames(images[0])
    torch.testing.assert_close(single, expected[:, :1])


def test_encoding_inverts_scaling(pipeline, frames):
    latents = pipeline.encode_history(pipeline.preprocess_frames(frames))
    raw = pipeline.vae.encode(pipeline.preprocess_frames(frames)[0]).latent_dist.mode()
    torch.testing.assert_close(latents[0].transpose(0, 1), (raw - 0.2) * 0.7)
    torch.testing.assert_close(pipeline.decode_latents(latents)[0, :, 1], pipeline.vae.decode(raw).sample[1])


def test_resize(pipeline, frames, actions):
    large = frames.repeat(3, axis=1).repeat(2, axis=2)
    assert run(pipeline, large, actions[:1], resize=True).shape == (1, 1, 3, 8, 12)


def test_saving_and_loading_changes_nothing(pipeline, frames, actions, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = IRASimPipeline.from_pretrained(tmp_path)
    index = (tmp_path / "model_index.json").read_text()
    assert '"irasim_diffusers",\n    "IRASimTransformer3DModel"' in index
    videos = [run(pipe, frames, actions, generator=seeded(1)) for pipe in (pipeline, loaded)]
    torch.testing.assert_close(*videos, rtol=0, atol=1e-6)


def test_callback_replaces_latents_and_interrupts(pipeline, frames, actions):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append((step, int(timestep)))
        if step == 1:
            pipe._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = run(
        pipeline,
        frames,
        actions[:3],
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents"],
    )
    assert [step for step, *_ in steps] == [0, 1]
    assert not latents.any()
    steps.clear()
    assert run(pipeline, frames, actions, callback_on_step_end=callback).shape[1] == 3
    assert [step for step, *_ in steps] == [0, 1], "windows to come are left out"
    history, noise = torch.zeros(1, 4, 2, 4, 6), torch.randn(1, 4, 3, 4, 6)
    with torch.no_grad():
        assert not torch.equal(pipeline.denoise_window(history, torch.zeros(1, 3, 3), noise.clone(), 1), noise)


def test_interrupt_affects_one_call_only(pipeline, frames, actions):
    def fail(pipe, *_):
        pipe._interrupt = True
        raise RuntimeError("the callback failed")

    with pytest.raises(RuntimeError, match="the callback failed"):
        run(pipeline, frames, actions[:3], callback_on_step_end=fail)
    assert not pipeline.interrupt
    pipeline._interrupt = True  # as after an unfinished stream
    assert len(list(pipeline.stream(frames, actions[:3], 3, num_inference_steps=1))) == 3


def test_interrupted_stream_ends(pipeline, frames, actions):
    seen = []

    def policy():
        for action in actions:
            seen.append(action)
            pipeline._interrupt = len(seen) >= 5
            yield action

    assert len(list(pipeline.stream(frames, policy(), 2, num_inference_steps=1))) == 4
    assert not pipeline.interrupt
    stream = pipeline.stream(frames, actions, 2, num_inference_steps=1)
    next(stream)
    pipeline._interrupt = True
    assert len(list(stream)) == 1, "what is predicted is given, and nothing more is asked for"


class CutGuidance(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            pipeline._guidance_scale = 0.0
        assert callback_kwargs.keys() == {"latents"}
        return callback_kwargs


@pytest.mark.parametrize("several", [False, True])
def test_callbacks_of_diffusers_can_disable_guidance(several, pipeline, frames, actions):
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    callback = CutGuidance(cutoff_step_ratio=0.5)
    callback = MultiPipelineCallbacks([callback]) if several else callback
    kwargs = {"guidance_scale": 3.0, "callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": []}
    run(pipeline, frames, actions, num_inference_steps=4, **kwargs)
    assert pipeline.num_timesteps == 12  # three windows
    assert len(calls) == 7 * 2 + 5  # the callback acts after the step of index 6
    assert not pipeline.do_classifier_free_guidance


def test_progress_bar_counts_every_step(pipeline, frames, actions, capsys):
    pipeline.set_progress_bar_config(disable=False)
    run(pipeline, frames, actions)
    assert "12/12" in capsys.readouterr().err  # three windows of three steps, PNDM adds one each


def test_gradients_flow_through_denoising_steps(pipeline, frames, actions):
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    history = pipeline.encode_history(pipeline.preprocess_frames(frames))
    differentiable = torch.from_numpy(actions[None, :3]).float().requires_grad_()
    noise = torch.randn(1, 4, 3, 4, 6)
    pipeline.decode_latents(pipeline.denoise_window(history, differentiable, noise, 2)).mean().backward()
    assert differentiable.grad.abs().sum() > 0


def test_one_history_with_several_action_sequences(pipeline, frames, actions):
    candidates = np.stack([actions, actions + 1])
    video = pipeline(frames, candidates, num_inference_steps=2, output_type="pt").frames
    assert video.shape == (2, 7, 3, 8, 12)
    assert pipeline(frames, candidates, num_inference_steps=2, output_type="latent").frames.shape == (2, 4, 7, 4, 6)


def test_shorter_windows_match_a_stream(tmp_path, frames, actions):
    """Windows of a call, set by argument or by the checkpoint, equal the chunks of a stream."""
    pipeline = tiny_pipeline()
    chunks = pipeline.stream(
        frames, actions, 2, num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="latent"
    )
    expected = torch.stack(list(chunks)[:6], dim=1)[None]
    kwargs = {"num_inference_steps": 2, "output_type": "latent"}
    video = run(pipeline, frames, actions[:6], chunk_length=2, generator=torch.Generator().manual_seed(1), **kwargs)
    torch.testing.assert_close(video, expected)
    assert not torch.allclose(
        run(pipeline, frames, actions[:6], generator=torch.Generator().manual_seed(1), **kwargs), expected
    )
    pipeline.register_to_config(chunk_length=2)
    pipeline.save_pretrained(tmp_path)
    again = IRASimPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(
        run(again, frames, actions[:6], generator=torch.Generator().manual_seed(1), **kwargs), expected
    )


def test_long_chunk_is_several_windows(pipeline, frames, actions):
    def stream(chunk_length):
        generator = torch.Generator().manual_seed(1)
        return torch.stack(list(pipeline.stream(frames, actions[:6], chunk_length, 2, 1.0, generator, "latent")))

    torch.testing.assert_close(stream(6), stream(3))
    assert not torch.allclose(stream(2), stream(3))


RGBA = PIL.Image.new("RGBA", (12, 8))
GRAY = PIL.Image.new("L", (12, 8))
BAD_INPUTS = [
    ({"actions": np.zeros((3, 2))}, r"`actions` must be \(n, 3\) or .* got \(3, 2\)"),
    ({"actions": np.zeros(3)}, r"`actions` must be .* got \(3,\)"),
    ({"actions": np.zeros((0, 3))}, "nothing to predict"),
    ({"actions": [[0, 0, 0], [0, 0]]}, "`actions` must be .* of equal length"),
    ({"actions": np.array([[0, np.nan, 0]])}, r"`actions` must be finite, got nan at index \(0, 1\)"),
    ({"actions": np.array([[0, 0, np.inf]])}, "`actions` must be finite, got inf"),
    ({"actions": np.zeros((2, 3, 3)), "frames": np.zeros((3, 1, 8, 12, 3))}, "3 histories and 2 action sequences"),
    ({"frames": []}, "`frames` must contain at least one frame"),
    ({"frames": np.zeros((0, 8, 12, 3))}, "`frames` must be RGB images"),
    ({"frames": np.zeros((3, 8, 12, 3))}, "1 to 2 history frames for this checkpoint, got 3"),
    ({"frames": np.zeros((1, 16, 12, 3))}, r"must be 8x12 .* got 16x12: pass resize=True \(--resize"),
    ({"frames": RGBA}, "must be RGB, got an image of mode RGBA"),
    ({"frames": GRAY}, "must be RGB, got an image of mode L"),
    ({"frames": np.zeros((8, 12, 4))}, "must be RGB"),
    ({"frames": np.zeros((8, 12))}, "must be .*H, W, 3"),
    ({"frames": np.full((8, 12, 3), 255.0)}, r"floats in \[0, 1\], got floats in \[255, 255\]"),
    ({"frames": np.full((8, 12, 3), np.nan)}, "floats in"),
    ({"frames": np.zeros((8, 12, 3), dtype=np.int64)}, "must be uint8, or floats"),
    ({"frames": "picture.png"}, "PIL images, arrays or tensors, got str"),
    ({"frames": [np.zeros((8, 12, 3)), np.zeros((8, 14, 3))]}, "all of one size"),
    ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer of at least 1 and at most 1000, .* got 0"),
    ({"num_videos_per_trajectory": 0}, "at least 1"),
    ({"num_inference_steps": 2.5}, "`num_inference_steps` must be an integer of at least 1 .* got 2.5"),
    ({"num_inference_steps": 1001}, "at most 1000, the timesteps in training, got 1001"),
    ({"num_inference_steps": True}, "`num_inference_steps` must be an integer .* got True"),
    ({"decode_chunk_size": 0}, "`decode_chunk_size` must be an integer of at least 1, got 0"),
    ({"guidance_scale": float("nan")}, "`guidance_scale` must be finite, got nan"),
    ({"eta": -0.5}, r"`eta` must be in \[0, 1\], got -0.5"),
    ({"generator": 3}, r"`generator` must be a torch.Generator or a list of them, got 3"),
    ({"latents": np.zeros((1, 4, 3, 4, 6))}, "`latents` must be a tensor"),
    ({"latents": torch.full((1, 4, 3, 4, 6), torch.nan)}, "`latents` must be finite"),
    ({"generator": seeded(1, 2)}, "list of 1, got a list of 2"),
    ({"latents": torch.zeros(1, 4, 2, 4, 6)}, "`latents` must be"),
    ({"output_type": "latents"}, "pil, np, pt or latent, got 'latents'"),
    ({"callback_on_step_end_tensor_inputs": ["actions"]}, r"among \['latents'\], got \['actions'\]"),
    ({"chunk_length": 0}, r"`chunk_length` must be an integer in \[1, 3\] for this checkpoint, got 0"),
    ({"chunk_length": 4}, r"must be an integer in \[1, 3\]"),
    ({"timesteps": [10, 5]}, "must be supported by `set_timesteps` of the scheduler"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
def test_bad_input_raises_before_any_work(pipeline, frames, actions, change, message):
    pipeline.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the network was evaluated"))
    pipeline.vae.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the history was encoded"))
    with pytest.raises(ValueError, match=message):
        run(pipeline, **{"frames": frames, "actions": actions[:3]} | change)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            diffusers.DDIMScheduler(beta_end=0.02, prediction_type="v_prediction"),
            "prediction type 'epsilon', got DDIM",
        ),
        (diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012), "noise process .* other betas"),
        (diffusers.DDIMScheduler(beta_start=1e-4, num_train_timesteps=500), "noise process .* other betas"),
        (diffusers.DDIMScheduler(), "must not clip samples, got DDIMScheduler"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            "FlowMatchEulerDiscreteScheduler with a flow .* use a scheduler with betas",
        ),
        (
            diffusers.DPMSolverMultistepScheduler(
                beta_start=1e-4, use_flow_sigmas=True, prediction_type="epsilon", flow_shift=1.0
            ),
            "flow or continuous process",
        ),
    ],
)
def test_scheduler_of_another_noise_process_raises(pipeline, frames, actions, scheduler, message):
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        run(pipeline, frames, actions)


@pytest.mark.parametrize("method", [IRASimPipeline.__init__, IRASimPipeline.__call__, IRASimPipeline.stream])
def test_arguments_are_documented(method):
    documented = inspect.getdoc(IRASimPipeline if method is IRASimPipeline.__init__ else method)
    for name in inspect.signature(method).parameters:
        assert name == "self" or f"{name}:" in documented


def test_defaults_match_paper(pipeline):
    fresh = tiny_transformer()
    assert IRASimPipeline(pipeline.vae, fresh, pipeline.scheduler).config.num_inference_steps == 50
    assert inspect.signature(IRASimPipeline.__call__).parameters["guidance_scale"].default == 1.0


def test_number_of_steps_of_the_checkpoint_is_the_default(frames, actions, tmp_path):
    pipeline = tiny_pipeline(num_inference_steps=2)
    pipeline.save_pretrained(tmp_path)
    pipeline = IRASimPipeline.from_pretrained(tmp_path)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    pipeline(frames, actions[:3])
    assert len(calls) == 2
    next(pipeline.stream(frames, actions, chunk_length=2))
    assert len(calls) == 4


def settings_of(pipeline):
    return [pipeline.config[name] for name in ("num_inference_steps", "chunk_length", "timesteps")]


@pytest.mark.parametrize("saved", [False, True])
def test_settings_of_checkpoint_survive_new_pipelines(saved, tmp_path):
    parts = tiny_pipeline(num_inference_steps=None).components
    settings = {"num_inference_steps": 3, "chunk_length": 2, "timesteps": [999, 300, 40]}
    pipeline = IRASimPipeline(**parts | settings)
    if saved:
        pipeline.save_pretrained(tmp_path)
        pipeline = IRASimPipeline.from_pretrained(tmp_path)
    expected = list(settings.values())
    other = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    for again in (
        IRASimPipeline(**pipeline.components),
        IRASimPipeline(**pipeline.components | {"scheduler": other}),
        IRASimPipeline.from_pipe(pipeline),
        pipeline.with_scheduler("DDIMScheduler"),
    ):
        assert settings_of(again) == expected
    changed = {"num_inference_steps": 2, "timesteps": None}
    assert settings_of(IRASimPipeline(**pipeline.components | changed)) == [2, 2, None]
    assert settings_of(IRASimPipeline(None, pipeline.transformer, other)) == [50, None, None]  # nothing leaks
    pipeline.register_to_config(num_inference_steps=7, timesteps=None)  # a setting of this pipeline only
    for again in (
        IRASimPipeline(**pipeline.components),
        IRASimPipeline.from_pipe(pipeline),
        pipeline.with_scheduler("DDIMScheduler"),
    ):
        assert settings_of(again) == [7, 2, None]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_with_scheduler_shares_weights(name, prediction_type, frames, actions):
    pipeline = tiny_pipeline(prediction_type=prediction_type)
    before = pipeline.scheduler
    other = pipeline.with_scheduler(name, steps_offset=0)
    assert type(other.scheduler) is getattr(diffusers, name)
    assert other.scheduler is not before
    assert pipeline.scheduler is before
    assert (other.transformer, other.vae) == (pipeline.transformer, pipeline.vae)
    assert other.scheduler.config.steps_offset == 0
    assert torch.isfinite(run(other, frames, actions[:1])).all()


def test_with_scheduler_keeps_prediction_type_of_its_own_class(pipeline):
    direct = pipeline.with_scheduler(diffusers.DDIMScheduler, timestep_spacing="trailing")
    again = direct.with_scheduler("DDIMScheduler")
    assert again.scheduler is not direct.scheduler
    assert dict(again.scheduler.config) == dict(direct.scheduler.config)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("DPM++", {}, "`scheduler` must be a scheduler class of diffusers or its name, .* got 'DPM"),
        ("AutoencoderKL", {}, "`scheduler` must be a scheduler class"),
        ("FlowMatchEulerDiscreteScheduler", {}, "with a flow or continuous process"),
        ("DDIMScheduler", {"beta_end": 0.5}, "with other betas"),
        ("DDIMScheduler", {"clip_sample": True}, "must not clip samples"),
        (
            "DDIMScheduler",
            {"timestep_spacng": "trailing"},
            r"no entries \['timestep_spacng'\]; it has .*'timestep_spacing'",
        ),
        ("DDIMScheduler", {"steps_offset": "a"}, r"`steps_offset` .* in \[0, 1000\), got 'a'"),
        ("PNDMScheduler", {"steps_offset": 10**9}, r"`steps_offset` .* in \[0, 1000\), got 1000000000"),
    ],
)
def test_with_scheduler_raises(kind, changes, message, pipeline):
    with pytest.raises(ValueError, match=message):
        pipeline.with_scheduler(kind, **changes)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_non_finite_weights_raise(part, value, pipeline, tmp_path):
    parameters = dict(getattr(pipeline, part).named_parameters())
    name = list(parameters)[3]
    with torch.no_grad():
        parameters[name].view(-1)[-1] = value
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{part}` must have finite weights, .* in '{name}'"):
        IRASimPipeline.from_pretrained(tmp_path)


def test_large_finite_weights_are_accepted(pipeline, tmp_path):
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.fill_(3e38)  # their sum overflows
    pipeline.save_pretrained(tmp_path)
    IRASimPipeline.from_pretrained(tmp_path)


def test_timesteps_of_the_checkpoint_are_used_for_its_number_of_steps(frames, actions, tmp_path):
    parts = tiny_pipeline().components
    parts["scheduler"] = diffusers.EulerDiscreteScheduler.from_config(parts["scheduler"].config)
    pipeline = IRASimPipeline(**parts | {"num_inference_steps": 3, "timesteps": [999, 300, 40]})
    pipeline.save_pretrained(tmp_path)
    pipeline = IRASimPipeline.from_pretrained(tmp_path)
    taken = []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: taken.append(int(inputs[1][0])))
    pipeline(frames, actions[:3])
    next(pipeline.stream(frames, actions, chunk_length=2))
    assert taken == 2 * [999, 300, 40]
    taken.clear()
    pipeline(frames, actions[:3], num_inference_steps=2)
    pipeline(frames, actions[:3], timesteps=[800, 20])
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)  # has only its own
    pipeline(frames, actions[:3])
    assert taken[2:4] == [800, 20]
    assert len(taken) == 7
    assert not {300, 40} & set(taken)
    with pytest.raises(ValueError, match="`timesteps` must be `num_inference_steps` = 50 numbers, got"):
        IRASimPipeline(**parts | {"num_inference_steps": 50, "timesteps": [999, 300]})


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_stream_of_whole_windows_matches_the_rollout(name, pipeline, frames, actions, output_type):
    leading(pipeline, name)
    (generator,) = seeded(4)
    streamed = list(
        pipeline.stream(frames, actions[:6], 3, num_inference_steps=3, generator=generator, output_type=output_type)
    )
    whole = run(pipeline, frames, actions[:6], generator=seeded(4), output_type=output_type)[0]
    whole = whole.transpose(0, 1) if output_type == "latent" else whole  # frames first
    for frame, expected in zip(streamed, whole, strict=True):
        torch.testing.assert_close(torch.as_tensor(frame), torch.as_tensor(expected))
        assert not getattr(frame, "requires_grad", False)


def test_stream_is_unaffected_by_other_calls(pipeline, frames, actions):
    leading(pipeline, "EulerDiscreteScheduler")
    kwargs = {"num_inference_steps": 3, "output_type": "pt"}
    alone = list(pipeline.stream(frames, actions[:6], 3, generator=seeded(4)[0], **kwargs))
    beside = []
    for frame in pipeline.stream(frames, actions[:6], 3, generator=seeded(4)[0], guidance_scale=1.0, **kwargs):
        run(pipeline, frames, actions[:1], num_inference_steps=1, guidance_scale=2.0)
        beside.append(frame)
    torch.testing.assert_close(torch.stack(beside), torch.stack(alone))


RATES = {"use_fps": True, "prediction_type": "flow_prediction", "norm_type": "ada_norm_single"}


def test_fps_of_one_call(frames, actions):
    pipeline = tiny_pipeline(**RATES, fps=3.0)
    plain, slow, fast = (
        run(pipeline, frames, actions[:3], generator=seeded(1), **kwargs) for kwargs in ({}, {"fps": 3}, {"fps": 24.0})
    )
    torch.testing.assert_close(plain, slow)
    assert not torch.allclose(plain, fast, atol=1e-3)
    torch.testing.assert_close(
        pipeline(frames, actions[:3], num_inference_steps=3, generator=seeded(1), fps=24.0, output_type="pt").frames,
        fast,
    )
    kwargs = {"num_inference_steps": 3, "output_type": "pt", "fps": 24.0}
    streamed = list(pipeline.stream(frames, actions[:3], 3, generator=seeded(1)[0], **kwargs))
    torch.testing.assert_close(torch.stack(streamed)[None], fast)
    unknown = tiny_pipeline(**RATES)
    torch.testing.assert_close(run(unknown, frames, actions[:3], generator=seeded(1), fps=24.0), fast)


@pytest.mark.parametrize(
    ("config", "fps", "message"),
    [
        ({}, 10.0, "`fps` must be None for this checkpoint, which does not embed frames per second, got 10.0"),
        (RATES, None, "`fps` must be positive, got None: .* Pass `fps`"),
        (RATES, 0.0, "`fps` must be positive, got 0.0"),
        (RATES, float("nan"), "`fps` must be positive, got nan"),
    ],
)
def test_bad_fps(config, fps, message, frames, actions):
    pipeline = tiny_pipeline(**config)
    with pytest.raises(ValueError, match=message):
        run(pipeline, frames, actions, fps=fps)
    with pytest.raises(ValueError, match=message):
        pipeline.stream(frames, actions, 2, num_inference_steps=1, fps=fps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_actions_can_be_tensors(pipeline, frames, actions, dtype):
    """A policy returns tensors of its own type, which require gradients by default."""
    tensors = [torch.tensor(action, dtype=dtype, requires_grad=True) for action in actions[:4]]
    rounded = torch.stack(tensors).detach().float().numpy()
    expected = list(pipeline.stream(frames, rounded, 2, 1, generator=seeded(4)[0], output_type="pt"))
    streamed = list(pipeline.stream(frames, iter(tensors), 2, 1, generator=seeded(4)[0], output_type="pt"))
    torch.testing.assert_close(torch.stack(streamed), torch.stack(expected))
    called = run(pipeline, frames, tensors, generator=seeded(4))
    torch.testing.assert_close(called, run(pipeline, frames, rounded, generator=seeded(4)))


@pytest.mark.gpu
def test_actions_can_be_tensors_on_cuda(pipeline, frames, actions):
    pipeline.to("cuda")
    tensors = [torch.tensor(action).cuda() for action in actions[:4]]
    assert len(list(pipeline.stream(frames, iter(tensors), 2, 1))) == 4


def test_seeded_stream_leaves_the_global_generator_alone(pipeline, frames, actions):
    before = torch.get_rng_state()
    list(pipeline.stream(frames, actions, generator=torch.Generator().manual_seed(3), output_type="latent"))
    assert torch.equal(torch.get_rng_state(), before)


def test_stream_keeps_properties_of_calls(pipeline, frames, actions):
    list(pipeline.stream(frames, actions[:2], 2, 1, guidance_scale=2.0, attention_kwargs={"scale": 0.5}))
    assert (pipeline.guidance_scale, pipeline.attention_kwargs) == (2.0, {"scale": 0.5})


def test_finished_or_closed_stream_frees_hooks(pipeline, frames, actions):
    pipeline.enable_model_cpu_offload(device="cpu")
    for leave in (lambda stream: stream.close(), list):
        stream = pipeline.stream(frames, actions[:4], 2, num_inference_steps=1)
        next(stream)
        during = pipeline.vae._hf_hook
        leave(stream)
        assert pipeline.vae._hf_hook is not during, "hooks are set again for the next call"


def test_stream_requests_actions_lazily(pipeline, frames, actions):
    asked, seen = [], []

    def policy():
        while True:  # never ends; observes the frames after its actions
            asked.append(len(seen))
            yield actions[0] + (0 if not seen else seen[-1].mean())

    stream = pipeline.stream(frames, policy(), 2, num_inference_steps=1, output_type="np")
    assert asked == []
    for frame in stream:
        seen.append(frame)
        if len(seen) == 5:
            break
    assert asked == [0, 0, 2, 2, 4, 4]


def test_a_stream_ends_with_a_shorter_chunk(pipeline, frames, actions):
    lengths = []
    pipeline.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[2]))
    images = list(pipeline.stream(frames[0], iter(actions[:5]), 2, num_inference_steps=1))
    assert [image.size for image in images] == [(12, 8)] * 5
    assert lengths == [3, 4, 3]  # histories of 1, 2 and 2 frames


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_length": 0}, "`chunk_length` must be an integer of at least 1, got 0"),
        ({"frames": np.zeros((2, 1, 8, 12, 3))}, "`frames` must be one history, got 2"),
        ({"frames": np.zeros((3, 8, 12, 3))}, "1 to 2 history frames for this checkpoint, got 3"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"output_type": "mp4"}, "`output_type` must be pil, np, pt or latent"),
    ],
)
def test_bad_stream_raises_immediately(pipeline, frames, actions, change, message):
    with pytest.raises(ValueError, match=message):
        pipeline.stream(**{"frames": frames, "actions": actions, "chunk_length": 2} | change)


def test_bad_action_raises_when_it_arrives(pipeline, frames, actions):
    stream = pipeline.stream(frames, [actions[0], actions[0][:2]], 1, num_inference_steps=1)
    next(stream)
    with pytest.raises(ValueError, match=r"`actions` must be \(n, 3\)"):
        next(stream)


def test_video_ada_rolls_out_with_full_windows(frames, actions):
    pipeline = tiny_pipeline(conditioning="video")
    video = run(pipeline, frames, actions)
    assert video.shape[1] == len(actions)
    with pytest.raises(ValueError, match="must contain 2 history frames for Video-Ada and the U-Net, got 1"):
        run(pipeline, frames[:1], actions)
    with pytest.raises(ValueError, match=r"`chunk_length` must be an integer in \[3, 3\] for this checkpoint, got 2"):
        pipeline.stream(frames, actions, chunk_length=2)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_video_ada_streams_whole_windows(count, frames, actions):
    pipeline = tiny_pipeline(conditioning="video")
    kwargs = {"num_inference_steps": 2, "output_type": "pt"}
    streamed = list(pipeline.stream(frames, iter(actions[:count]), generator=seeded(4)[0], **kwargs))
    whole = run(pipeline, frames, actions[:count], generator=seeded(4)[0], **kwargs)[0]
    torch.testing.assert_close(torch.stack(streamed), whole)


@pytest.mark.parametrize(("window", "lengths"), [(5, [5, 5, 3]), (16, [6, 5])])
def test_chunks_of_a_stream_fit_the_window(window, lengths, frames, actions):
    pipeline = tiny_pipeline(sample_frames=window)
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    assert len(list(pipeline.stream(frames, actions, num_inference_steps=1))) == 7
    assert seen == lengths


def test_flow_requires_a_flow_scheduler(frames, actions):
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = tiny_pipeline(prediction_type="flow_prediction")
    pipeline.scheduler = diffusers.PNDMScheduler()
    with pytest.raises(
        ValueError, match="must use rectified flow with 1000 steps like the checkpoint, got PNDMScheduler"
    ):
        run(pipeline, frames, actions)
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    with pytest.raises(ValueError, match=r"and 500 steps: use .*noise_process\(pipe.transformer.config\)"):
        run(pipeline, frames, actions)
    pipeline.scheduler = flow
    history = pipeline.encode_history(pipeline.preprocess_frames(frames)).detach()
    sample = torch.randn(1, 4, 3, 4, 6)
    noise = pipeline.prepare_latents(sample.shape, seeded(0))
    windows = []

    def velocity(_, args, output):
        windows.append(args[0])
        return (torch.cat([args[0][:, :, :2], noise - sample], dim=2),)

    pipeline.transformer.register_forward_hook(velocity)
    future = pipeline.denoise_window(history, torch.from_numpy(actions[None, :3]), noise, 3)
    torch.testing.assert_close(future, sample)  # a straight line is exact in any number of steps
    assert all(torch.equal(window[:, :, :2], history) for window in windows)
    pipeline.scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert run(pipeline, frames, actions[:3]).shape == (1, 3, 3, 8, 12)
    pipeline = tiny_pipeline()
    pipeline.scheduler = flow
    with pytest.raises(ValueError, match="with a flow or continuous process"):
        run(pipeline, frames, actions)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("scaling_factor", value) for value in (0, -1, float("nan"), 1e39, 10**400, "x", None)]
    + [("shift_factor", value) for value in (float("nan"), float("inf"), "x")]
    + [("latents_mean", value) for value in (0.1, [0.1], [0.1, float("nan"), 0, 0])],
)
def test_bad_latent_scaling_raises(entry, value, pipeline):
    pipeline.vae.register_to_config(**{entry: value})
    with pytest.raises(ValueError, match=f"`{entry}` of the autoencoder must be a"):
        IRASimPipeline(**pipeline.components)


@pytest.mark.parametrize("std", [None, [1.0, 0.0, 2.0, 2.0], [1, 2, 3]])
def test_bad_deviation_of_latents_raises(std, pipeline):
    pipeline.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=std)
    with pytest.raises(ValueError, match="`latents_std` of the autoencoder must be a list of 4 numbers"):
        IRASimPipeline(**pipeline.components)


def test_latents_are_scaled_by_mean_and_deviation_of_each_channel(pipeline, frames):
    plain = pipeline.encode_history(pipeline.preprocess_frames(frames)).detach() / 0.7 + 0.2
    mean, std = [0.1, -0.2, 0.3, 0.4], [0.5, 1.0, 2.0, 4.0]
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=std, shift_factor=None)
    scaled = IRASimPipeline(**pipeline.components).encode_history(pipeline.preprocess_frames(frames)).detach()
    for channel in range(4):
        expected = (plain[:, channel] - mean[channel]) * 0.7 / std[channel]
        assert torch.allclose(scaled[:, channel], expected, atol=1e-5)
    pipeline.vae.register_to_config(latents_mean=None, latents_std=None, shift_factor=0.2)
    pixels = pipeline.decode_latents((plain - 0.2) * 0.7)
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=std, shift_factor=None)
    assert torch.allclose(pipeline.decode_latents(scaled), pixels, atol=1e-4)


def test_offset_beyond_the_last_timestep_raises(pipeline, frames, actions):
    with pytest.raises(ValueError, match="timesteps of PNDMScheduler must be less than 1000, got 1499"):
        pipeline.with_scheduler("PNDMScheduler", steps_offset=999)(frames, actions, num_inference_steps=2)
