import pytest
import torch
from diffusers import DDIMScheduler
from tiny_models import ARCHITECTURES, tiny_pipeline, tiny_transformer, tiny_unet

from irasim_diffusers.models import noise_process
from irasim_diffusers.training import diffusion_loss, remove_leftovers
from irasim_diffusers.training.objective import StateReadout, min_snr_weights
from irasim_diffusers.training.rollouts import predict_chunk


@pytest.fixture
def batch():
    torch.manual_seed(5)
    return {
        "latents": torch.randn(2, 4, 5, 4, 6),
        "actions": torch.randn(2, 3, 3),
        "timesteps": torch.tensor([10, 700]),
        "noise": torch.randn(2, 4, 3, 4, 6),
    }


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_is_error_of_predicted_frames(batch, prediction_type):
    model = tiny_transformer(prediction_type=prediction_type)
    process = noise_process(model.config)
    share = process.alphas_cumprod[batch["timesteps"]].view(2, 1, 1, 1, 1)
    future, noise = batch["latents"][:, :, 2:], batch["noise"]
    noisy = share.sqrt() * future + (1 - share).sqrt() * noise
    window = torch.cat([batch["latents"][:, :, :2], noisy], dim=2)
    target = {
        "epsilon": noise,
        "v_prediction": share.sqrt() * noise - (1 - share).sqrt() * future,
        "sample": future,
    }[prediction_type]
    output = model(window, batch["timesteps"], batch["actions"]).sample
    loss = diffusion_loss(model, process, **batch)["loss"]
    torch.testing.assert_close(loss, (output[:, :, 2:] - target).square().mean())


def test_huber_loss(batch):
    model = tiny_transformer(prediction_type="sample")
    process = noise_process(model.config)
    squared = diffusion_loss(model, process, **batch)["loss"]
    # squared error for a large `huber_c`, 2 * huber_c * |error| for a small one
    torch.testing.assert_close(
        diffusion_loss(model, process, **batch, huber_c=100.0)["loss"], squared, rtol=1e-3, atol=0
    )
    noisy = process.add_noise(batch["latents"][:, :, 2:], batch["noise"], batch["timesteps"])
    output = model(torch.cat([batch["latents"][:, :, :2], noisy], dim=2), batch["timesteps"], batch["actions"]).sample
    error = (output[:, :, 2:] - batch["latents"][:, :, 2:]).abs().mean()
    torch.testing.assert_close(
        diffusion_loss(model, process, **batch, huber_c=1e-4)["loss"], 2e-4 * error, rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_moving_layers_and_generated_frames_have_separate_errors(batch, snr_gamma):
    model = tiny_transformer(**ARCHITECTURES["Moving layers"])
    process = noise_process(model.config)
    latents, options = batch["latents"], {"moving_layers": True, "relative_latents": True, "snr_gamma": snr_gamma}
    change = latents[:, :, 2:] - latents[:, :, 1:2]
    noisy = process.add_noise(change, batch["noise"], batch["timesteps"])
    window = torch.cat([latents[:, :, :2], noisy], dim=2)
    output = model(window, batch["timesteps"], batch["actions"], return_components=True)
    errors = (torch.stack([output.moved, output.generated]) - change).square().mean(dim=(0, 2, 3, 4, 5))
    if snr_gamma is not None:
        errors = errors * min_snr_weights(process, batch["timesteps"], snr_gamma)
    losses = diffusion_loss(model, process, **batch, **options)
    torch.testing.assert_close(losses["loss"], errors.mean())
    torch.testing.assert_close(losses["loss_moved"] + losses["loss_generated"], 2 * losses["loss"])
    readout = StateReadout(model, num_components=7)
    states = {"states": torch.randn(2, 5, 7), "state_loss_weight": 0.0}
    torch.testing.assert_close(diffusion_loss(readout, process, **batch, **options, **states)["loss"], losses["loss"])


def test_relative_latents_are_changes_from_last_history_frame(batch):
    model = tiny_transformer()
    process = noise_process(model.config)
    changes = batch["latents"].clone()
    changes[:, :, 2:] -= changes[:, :, 1:2]
    expected = diffusion_loss(model, process, **batch | {"latents": changes})["loss"]
    assert diffusion_loss(model, process, **batch, relative_latents=True)["loss"] == expected
    assert diffusion_loss(model, process, **batch)["loss"] != expected


def test_flow_matching_loss(batch):
    model = tiny_transformer(prediction_type="flow_prediction")
    process = noise_process(model.config)
    share = batch["timesteps"].view(2, 1, 1, 1, 1) / 1000
    future, noise = batch["latents"][:, :, 2:], batch["noise"]
    window = torch.cat([batch["latents"][:, :, :2], (1 - share) * future + share * noise], dim=2)
    output = model(window, batch["timesteps"], batch["actions"]).sample
    loss = diffusion_loss(model, process, **batch)["loss"]
    torch.testing.assert_close(loss, (output[:, :, 2:] - (noise - future)).square().mean())


@pytest.mark.parametrize("make_model", [tiny_transformer, tiny_unet])
def test_state_readout_adds_loss_and_keeps_prediction(batch, make_model):
    model = make_model()
    process = noise_process(model.config)
    plain = diffusion_loss(model, process, **batch)["loss"]
    readout = StateReadout(model, num_components=7)
    states = torch.randn(2, 5, 7)
    prediction, read = readout(batch["latents"], batch["timesteps"], batch["actions"])
    assert read.shape == states.shape
    torch.testing.assert_close(prediction, model(batch["latents"], batch["timesteps"], batch["actions"]).sample)
    torch.testing.assert_close(
        diffusion_loss(readout, process, **batch, states=states, state_loss_weight=0.0)["loss"], plain
    )
    assert diffusion_loss(readout, process, **batch, states=states)["loss"] > plain


@pytest.mark.parametrize("checkpointing", [False, True])
def test_state_readout_gradients_reach_only_earlier_blocks(batch, checkpointing):
    model = tiny_transformer(num_layers=4).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    readout = StateReadout(model, num_components=7)
    states = readout(batch["latents"], batch["timesteps"], batch["actions"])[1]
    states.square().mean().backward()
    for blocks in (model.transformer_blocks, model.temporal_transformer_blocks):
        assert [block.ff.net[2].weight.grad is not None for block in blocks] == [True, True, True, False]
    assert model.action_embed.linear_1.weight.grad.abs().sum() > 0


def test_state_readout_gradients_in_unet(batch):
    model = tiny_unet().train()
    model.enable_gradient_checkpointing()
    readout = StateReadout(model, num_components=7)
    states = readout(batch["latents"], batch["timesteps"], batch["actions"])[1]
    states[1, 3].square().mean().backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"conv_in.weight", "action_embed.linear_1.weight", "mid_block.resnets.1.conv2.weight"} <= gradients
    assert not any(name.startswith(("up_blocks", "conv_out")) for name in gradients)
    assert states.std(dim=(0, 1)).gt(0).all()  # each frame has a different state


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighting(batch, prediction_type):
    """For every prediction type, the weight of the clean-latent error is min(SNR, gamma)."""
    model = tiny_transformer(prediction_type=prediction_type)
    process = noise_process(model.config)
    share = process.alphas_cumprod[batch["timesteps"]]
    snr = share / (1 - share)
    plain = torch.stack(
        [
            diffusion_loss(model, process, **{name: value[k : k + 1] for name, value in batch.items()})["loss"]
            for k in range(2)
        ]
    )
    to_clean_error = {"epsilon": 1 / snr, "v_prediction": 1 - share, "sample": torch.ones(2)}[prediction_type]
    weighted = diffusion_loss(model, process, **batch, snr_gamma=5.0)["loss"]
    torch.testing.assert_close(weighted, (plain * to_clean_error * snr.clamp_max(5.0)).mean())


def test_min_snr_with_flow_matching_raises(batch):
    model = tiny_transformer(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="`snr_gamma` must be None for flow matching"):
        diffusion_loss(model, noise_process(model.config), **batch, snr_gamma=5.0)


def test_remove_leftovers_deletes_only_partial_files(tmp_path):
    left = ["partial-12", ".finished", "..finished.4194305.partial"]  # left by a process that has ended
    kept = ["partial-demos", "finished", "unfinished", "finished-models", "checkpoint-3"]
    for name in left + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / "finished.txt").write_text("")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "finished.txt"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize(("relative_latents", "moving_layers"), [(False, 0), (True, 0), (True, 2)])
def test_predict_chunk_matches_pipeline(batch, prediction_type, relative_latents, moving_layers):
    """Both use the same sampler, number of steps and initial noise."""
    if moving_layers and prediction_type != "sample":
        pytest.skip("moving layers require predicted samples")
    entries = {"prediction_type": prediction_type, "relative_latents": relative_latents}
    pipeline = tiny_pipeline(**entries, moving_layers=moving_layers)
    model = pipeline.transformer
    if prediction_type != "flow_prediction":
        pipeline.scheduler = DDIMScheduler.from_config(noise_process(model.config).config, timestep_spacing="trailing")
    history = batch["latents"][:, :, :2]
    expected, after = pipeline.denoise_window(history, batch["actions"], batch["noise"].clone(), 3, 1.0, None)
    chunk, memory = predict_chunk(
        model,
        noise_process(model.config),
        history,
        batch["actions"],
        batch["noise"],
        num_inference_steps=3,
        relative_latents=relative_latents,
        moving_layers=moving_layers > 0,
    )
    assert not chunk.requires_grad
    torch.testing.assert_close(chunk, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(memory, after, rtol=1e-4, atol=1e-4)
    assert (memory != {}) == (moving_layers > 0)
