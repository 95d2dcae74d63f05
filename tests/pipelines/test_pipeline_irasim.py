import inspect

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pipeline, tiny_transformer

from irasim_diffusers import IRASimPipeline


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(pipeline, frames, actions, **kwargs):
    return pipeline(frames, actions, **{"num_inference_steps": 3, "output_type": "pt"} | kwargs).frames


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
    assert encoded == [2]  # both history frames are encoded once
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
    """Set a scheduler with leading timesteps, on which the initial noise of sigma schedulers depends."""
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, timestep_spacing="leading")
    return pipeline


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler"])
def test_rollout_matches_chained_windows(name, pipeline, frames, actions):
    leading(pipeline, name)
    rollout = run(pipeline, frames, actions[:6], generator=seeded(9)[0], output_type="latent")
    generator = seeded(9)[0]
    history = pipeline.encode_history(pipeline.preprocess_frames(frames)).detach()
    parts = []
    leading(pipeline, name)  # a new scheduler whose timesteps are not set
    for start in (0, 3):
        window_actions = torch.from_numpy(actions[None, start : start + 3])
        noise = pipeline.prepare_latents((1, 4, 3, 4, 6), generator)
        with torch.no_grad():
            parts.append(pipeline.denoise_window(history, window_actions, noise, 3, generator=generator)[0])
        history = parts[-1][:, :, -2:]
    torch.testing.assert_close(rollout, torch.cat(parts, dim=2), rtol=1e-5, atol=1e-6)


def test_one_history_frame_grows_to_two(pipeline, frames, actions):
    histories = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args: histories.append(args[0].shape[2] - args[2].shape[1])
    )
    assert run(pipeline, frames[:1], actions).shape[1] == 7  # windows of 4 and 3 actions
    assert [*dict.fromkeys(histories)] == [1, 2]


def test_given_noise_determines_the_video(pipeline, frames, actions):
    noise = torch.randn(1, 4, 1, 4, 6)  # fewer frames than a window predicts
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
    for count in (3, 6):  # whole windows: the generator is not used
        part = run(pipeline, frames, actions[:count], **kwargs | {"latents": noise[:, :, :count]})
        torch.testing.assert_close(part, whole[:, :, :count])
    last = run(pipeline, frames, actions, generator=seeded(6)[0], **kwargs)
    torch.testing.assert_close(last[:, :, :6], whole[:, :, :6])
    assert not torch.allclose(last[:, :, 6], whole[:, :, 6]), (
        "the missing frames of the last window are drawn from the generator"
    )
    filled = pipeline.prepare_latents((1, 4, 5, 4, 6), seeded(7)[0], noise[:, :, :2])
    assert torch.equal(filled[:, :, :2], noise[:, :, :2])
    assert torch.equal(filled[:, :, 2:], torch.randn(1, 4, 3, 4, 6, generator=seeded(7)[0]))


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


def test_encoding_inverts_scaling(pipeline, frames):
    latents = pipeline.encode_history(pipeline.preprocess_frames(frames))
    raw = pipeline.vae.encode(pipeline.preprocess_frames(frames)[0]).latent_dist.mode()
    torch.testing.assert_close(latents[0].transpose(0, 1), (raw - 0.2) * 0.7)
    torch.testing.assert_close(pipeline.decode_latents(latents)[0, :, 1], pipeline.vae.decode(raw).sample[1])


def run_tuple(pipeline, frames, actions):
    (video,) = pipeline(
        frames, actions, num_inference_steps=3, generator=seeded(1), output_type="pt", return_dict=False
    )
    return video


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
    assert [step for step, *_ in steps] == [0, 1], "later windows are omitted"
    history, noise = torch.zeros(1, 4, 2, 4, 6), torch.randn(1, 4, 3, 4, 6)
    with torch.no_grad():
        assert not torch.equal(pipeline.denoise_window(history, torch.zeros(1, 3, 3), noise.clone(), 1)[0], noise)


def test_interrupt_affects_one_call_only(pipeline, frames, actions):
    def fail(pipe, *_):
        pipe._interrupt = True
        raise RuntimeError("the callback failed")

    with pytest.raises(RuntimeError, match="the callback failed"):
        run(pipeline, frames, actions[:3], callback_on_step_end=fail)
    assert not pipeline.interrupt
    pipeline._interrupt = True  # an unfinished stream can leave it set
    assert len(list(pipeline.stream(frames, actions[:3], 3, num_inference_steps=1))) == 3


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
    assert pipeline.num_timesteps == 12  # four steps in each of three windows
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
    pipeline.decode_latents(pipeline.denoise_window(history, differentiable, noise, 2)[0]).mean().backward()
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


@pytest.mark.parametrize("method", [IRASimPipeline.__init__, IRASimPipeline.__call__, IRASimPipeline.stream])
def test_arguments_are_documented(method):
    documented = inspect.getdoc(IRASimPipeline if method is IRASimPipeline.__init__ else method)
    for name in inspect.signature(method).parameters:
        assert name == "self" or f"{name}:" in documented


def test_defaults_match_paper(pipeline):
    fresh = tiny_transformer()
    assert IRASimPipeline(pipeline.vae, fresh, pipeline.scheduler).config.num_inference_steps == 50
    assert inspect.signature(IRASimPipeline.__call__).parameters["guidance_scale"].default == 1.0


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


def test_missing_weights_raise(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["proj_out.bias"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights file does not contain transformer\.proj_out\.bias"):
        IRASimPipeline.from_pretrained(tmp_path)


def test_large_finite_weights_are_accepted(pipeline, tmp_path):
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.fill_(3e38)  # their sum overflows
    pipeline.save_pretrained(tmp_path)
    loaded = IRASimPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.transformer.proj_out.weight, pipeline.transformer.proj_out.weight)


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
