import re

import diffusers
import numpy as np
import pytest
import torch
from test_pipeline_irasim import run, seeded
from tiny_models import tiny_pipeline

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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_accepts_predicted_samples(name, frames, actions):
    """If a network always predicts one sample, every scheduler with velocity prediction returns it."""
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
    tolerance = 0.05 if name == "PNDMScheduler" else 2e-3  # PNDM extrapolates velocities
    torch.testing.assert_close(video, sample[:, :, 2:], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["DDIMScheduler", *WITHOUT_SAMPLE])
@pytest.mark.parametrize(
    "wrong",
    [{"prediction_type": "sample"}, {"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}],
)
def test_remedy_of_a_wrong_scheduler_works(name, wrong, frames, actions):
    pipeline = tiny_pipeline(prediction_type="sample")
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **{"beta_end": 0.5} | wrong)
    with pytest.raises(ValueError, match="`scheduler` must") as caught:
        run(pipeline, frames, actions[:1])
    assert "noise process (prediction_type" not in str(caught.value)
    remedy = re.search("create it with `(.*?)`", str(caught.value))[1]
    pipeline.scheduler = eval(remedy, {"pipe": pipeline, name: getattr(diffusers, name)})
    assert torch.isfinite(run(pipeline, frames, actions[:1])).all()


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
    future, _ = pipeline.denoise_window(history, actions, noise, 40, generator=seeded(0))
    assert (future - sample).abs().mean() < 0.06


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
    # settings of other pipelines have no effect
    assert settings_of(IRASimPipeline(None, pipeline.transformer, other)) == [50, None, None]
    pipeline.register_to_config(num_inference_steps=7, timesteps=None)  # new pipelines take the changed settings
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


def test_with_scheduler_of_the_same_class_keeps_the_config(pipeline):
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
            r"no entries \['timestep_spacng'\]; its entries are .*'timestep_spacing'",
        ),
        ("DDIMScheduler", {"steps_offset": "a"}, r"`steps_offset` .* in \[0, 1000\), got 'a'"),
        ("PNDMScheduler", {"steps_offset": 10**9}, r"`steps_offset` .* in \[0, 1000\), got 1000000000"),
    ],
)
def test_with_scheduler_raises(kind, changes, message, pipeline):
    with pytest.raises(ValueError, match=message):
        pipeline.with_scheduler(kind, **changes)


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
    # DDIM does not support custom timesteps
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline(frames, actions[:3])
    assert taken[2:4] == [800, 20]
    assert len(taken) == 7
    assert not {300, 40} & set(taken)
    with pytest.raises(ValueError, match="`timesteps` must be `num_inference_steps` = 50 numbers, got"):
        IRASimPipeline(**parts | {"num_inference_steps": 50, "timesteps": [999, 300]})


def test_flow_requires_a_flow_scheduler(frames, actions):
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = tiny_pipeline(prediction_type="flow_prediction")
    pipeline.scheduler = diffusers.PNDMScheduler()
    with pytest.raises(
        ValueError,
        match="must use rectified flow with num_train_timesteps=1000, like the checkpoint, got PNDMScheduler",
    ):
        run(pipeline, frames, actions)
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    with pytest.raises(ValueError, match=r"num_train_timesteps=500: use .*noise_process\(pipe.transformer.config\)"):
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
    future, _ = pipeline.denoise_window(history, torch.from_numpy(actions[None, :3]), noise, 3)
    torch.testing.assert_close(future, sample)  # Euler steps along a straight line are exact
    assert all(torch.equal(window[:, :, :2], history) for window in windows)
    pipeline.scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert run(pipeline, frames, actions[:3]).shape == (1, 3, 3, 8, 12)
    pipeline = tiny_pipeline()
    pipeline.scheduler = flow
    with pytest.raises(ValueError, match="with a flow or continuous process"):
        run(pipeline, frames, actions)


def test_offset_beyond_the_last_timestep_raises(pipeline, frames, actions):
    with pytest.raises(ValueError, match="timesteps of PNDMScheduler must be less than 1000, got 1499"):
        pipeline.with_scheduler("PNDMScheduler", steps_offset=999)(frames, actions, num_inference_steps=2)
