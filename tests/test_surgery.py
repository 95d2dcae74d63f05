import pytest
import torch
from tiny_models import tiny_transformer

from irasim_diffusers.conversion import change_autoencoder, change_patch_size, predict_samples


def test_the_same_patch_size_does_not_change_the_output():
    torch.manual_seed(0)
    model = tiny_transformer(action_frequencies=1)
    more = change_patch_size(model, 2, action_frequencies=3)
    inputs = torch.randn(3, 4, 5, 4, 6), torch.tensor([7, 500, 999]), torch.randn(3, 3, 3)
    torch.testing.assert_close(more(*inputs).sample, model(*inputs).sample)
    assert more.config.action_frequencies == 3


def test_finer_patches_keep_their_position_and_scale():
    model = tiny_transformer(patch_size=3, sample_height=6, sample_width=9)
    fine = change_patch_size(model, 1)
    coarse_places = model._spatial_positions(2, 3)
    torch.testing.assert_close(
        fine._spatial_positions(6, 9).unflatten(1, (6, 9))[:, 1::3, 1::3].flatten(1, 2), coarse_places
    )
    torch.testing.assert_close(fine.patch_embed.proj.weight[..., 0, 0], model.patch_embed.proj.weight[..., 1, 1] * 9)
    for name in ("weight", "bias"):  # output rows of the central pixel of a coarse patch
        coarse_rows = getattr(model.proj_out, name).unflatten(0, (3, 3, 4))
        torch.testing.assert_close(getattr(fine.proj_out, name), coarse_rows[1, 1])
    again = change_patch_size(fine, 2)
    assert again.config.base_patch_size == 3
    assert again(torch.randn(1, 4, 5, 6, 8), torch.tensor([5]), torch.randn(1, 3, 3)).sample.shape == (1, 4, 5, 6, 8)


@pytest.mark.parametrize("changes", [{"conditioning": "video"}, {"spatial_position": "fixed"}])
def test_unsupported_models_cannot_change_their_patch_size(changes):
    with pytest.raises(
        ValueError, match="the patch size and action frequencies of this model cannot be changed: its `"
    ):
        change_patch_size(tiny_transformer(**changes), 1)


@pytest.mark.parametrize("changes", [{}, {"base_patch_size": 3}, {"conditioning": "video"}])
def test_change_to_an_autoencoder_with_linearly_mapped_latents(changes):
    model = tiny_transformer(**changes)
    latents, noise = torch.randn(200, 4, 4, 6), torch.randn(2, 4, 5, 4, 6)

    def other(latents):  # one channel of twice the height and width; each of four pixels is scaled differently
        return torch.nn.functional.pixel_shuffle(latents * torch.tensor([1.0, -1.2, 0.8, 1.1]).view(4, 1, 1), 2)

    changed = change_autoencoder(model, 4, latents, other(latents))
    assert (changed.config.in_channels, changed.config.sample_height, changed.config.sample_width) == (1, 8, 12)
    inputs = torch.tensor([7, 999]), torch.randn(2, 3, 3)
    shuffled = other(noise.transpose(1, 2)).transpose(1, 2)
    expected = other(model(noise, *inputs).sample.transpose(1, 2)).transpose(1, 2)
    assert (changed(shuffled, *inputs).sample - expected).abs().max() < 0.01 * expected.abs().max()


def test_at_the_last_timestep_a_velocity_is_the_negated_sample():
    model = tiny_transformer(prediction_type="v_prediction")
    inputs = torch.randn(2, 4, 5, 4, 6), torch.tensor([999, 999]), torch.randn(2, 3, 3)
    samples = predict_samples(model)
    torch.testing.assert_close(samples(*inputs).sample, -model(*inputs).sample)
    assert samples.config.prediction_type == "sample"
    with pytest.raises(ValueError, match=r"`model` must predict velocities .* got 'sample'"):
        predict_samples(samples)


def test_change_autoencoder_requires_the_same_grid_of_patches():
    latents = torch.randn(9, 4, 4, 6)
    for patch_size, after in ((2, torch.randn(9, 4, 8, 12)), (4, torch.randn(8, 4, 8, 12))):
        with pytest.raises(ValueError, match="`after` must have as many images and patches as `before`"):
            change_autoencoder(tiny_transformer(), patch_size, latents, after)


@pytest.mark.parametrize("name", ["before", "after"])
def test_latents_of_the_autoencoders_must_be_finite(name):
    latents = {"before": torch.randn(9, 4, 4, 6), "after": torch.randn(9, 1, 8, 12)}
    latents[name][3, 0, 2, 5] = torch.nan
    with pytest.raises(ValueError, match=f"`{name}` must be finite latents"):
        change_autoencoder(tiny_transformer(), 4, **latents)
    latents[name].zero_()
    with pytest.raises(ValueError, match=f"`{name}` must be latents that depend on the images, got only zeros"):
        change_autoencoder(tiny_transformer(), 4, **latents)
