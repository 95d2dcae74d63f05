"""The output layer that moves parts of the last history frame."""

import itertools
import math

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig
from tiny_models import ARCHITECTURES, tiny_pipeline, tiny_transformer

from irasim_diffusers import IRASimTransformer3DModel
from irasim_diffusers.conversion import (
    add_moving_layers,
    can_adapt,
    change_autoencoder,
    change_patch_size,
)
from irasim_diffusers.models.moving_layers import GAIN, RADIANS, MovingLayers, _centers, _is_whole

EMPTY, FULL = -80 / GAIN, 80 / GAIN  # mask logits
GRID = (4, 5)
TOKENS = torch.eye(20)[None]
STAY, RIGHT, DOWN = (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


@pytest.fixture
def layers():
    """Two layers of frames with one channel and 4x5 patches of 4 pixels; the token of a patch is a unit vector."""
    layers = MovingLayers(dim=20, in_channels=1, patch_size=4, num_layers=2)
    for parameter in layers.parameters():
        torch.nn.init.zeros_(parameter)
    logits = torch.full((20, 2, 5), EMPTY)  # of the patches; 2x2 positions and the weight of the color
    logits[..., 4] = 0
    logits[[6, 7], 0, :4] = FULL  # the first layer consists of the second and third patch of the second row
    logits[7, 1, :4] = FULL  # the second layer covers the second of them
    layers.masks.weight.data = logits.flatten(1).mT
    layers.fill.bias.data.fill_(-1)
    return layers


@pytest.fixture
def frame():
    torch.manual_seed(0)
    return torch.rand(1, 1, 16, 20)


@pytest.fixture
def inputs():
    torch.manual_seed(4)
    return torch.randn(3, 4, 5, 4, 6), torch.tensor([7, 500, 999]), torch.randn(3, 3, 3)


def predict(layers, frame, *motions):
    """Predict one frame by the layers alone, with their motions x, y and angle."""
    layers.motions.bias.data = torch.tensor([(*motion, 0.0) for motion in motions]).flatten()
    return layers(frame, TOKENS, TOKENS[:, None], GRID, frame[:, :, None])[1][:, :, 0]


def test_without_motion_the_frame_stays(layers, frame):
    torch.testing.assert_close(predict(layers, frame, STAY, STAY), frame, rtol=0, atol=1e-3)


def test_motion_noise_is_added_to_the_motions(layers, frame):
    expected = predict(layers, frame, RIGHT, DOWN)
    predict(layers, frame, STAY, STAY)
    noise = torch.tensor([RIGHT, DOWN])[None]
    moved = layers(frame, TOKENS, TOKENS[:, None], GRID, frame[:, :, None], noise)[1][:, :, 0]
    torch.testing.assert_close(moved, expected)


def test_a_layer_uncovers_the_layer_below(layers, frame):
    expected = frame.clone()
    expected[..., 3, 7:13] = -1  # the border of the layer
    expected[..., 4:7, 12] = -1
    expected[..., 8:12, 8:12] = frame[..., 4:8, 8:12]
    expected[..., 4:8, 8:12] = frame[..., 4:8, 4:8].mean()
    torch.testing.assert_close(predict(layers, frame, STAY, DOWN), expected, rtol=0, atol=1e-3)


def test_a_layer_uncovers_the_background_and_is_cut_off_at_the_edge(layers, frame):
    expected = frame.clone()
    expected[..., 3:9, 3:13] = -1  # the layer and its border
    expected[..., 4:8, 8:12] = frame[..., 4:8, 8:12]  # the other layer
    expected[..., 4:8, 15:19] = frame[..., 4:8, 4:8]
    expected[..., 4:8, 19] = frame[..., 4:8, 4:8].mean()  # the other columns of the layer leave the frame
    torch.testing.assert_close(predict(layers, frame, (2.75, 0.0, 0.0), STAY), expected, rtol=0, atol=1e-3)


def test_a_layer_turns_about_its_center(layers, frame):
    expected = frame.clone()
    expected[..., 4:8, 8:12] = torch.rot90(frame[..., 4:8, 8:12], -1, (2, 3))  # clockwise, as in image coordinates
    moved = predict(layers, frame, STAY, (0.0, 0.0, math.pi / 2 / RADIANS))
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-3)


def test_motions_are_averaged_over_the_patches_of_the_layer(layers, frame):
    layers.motions.weight.data[0, :] = 9.0  # x of the first layer
    layers.motions.weight.data[0, [6, 7]] = torch.tensor([2.0, 0.0])
    generated = frame[:, :, None].expand(-1, -1, 2, -1, -1)
    tokens = torch.stack([TOKENS, 2 * TOKENS], dim=1)  # two predicted frames
    frames = layers(frame, TOKENS, tokens, GRID, generated)[1]
    for index, shift in enumerate((1.0, 2.0)):
        layers.motions.weight.data.zero_()
        expected = predict(layers, frame, (shift, 0.0, 0.0), STAY)
        torch.testing.assert_close(frames[:, :, index], expected, rtol=0, atol=1e-2)


def test_tokens_with_high_scores_determine_the_motion(layers, frame):
    layers.motions.weight.data[0, 6] = 2.0  # x of the first layer
    layers.motions.weight.data[3, 7] = 20.0  # the score of its second patch, which stays
    torch.testing.assert_close(predict(layers, frame, STAY, STAY), frame, rtol=0, atol=1e-3)


def set_patches(layers, index, patches):
    """Set the patches of a layer."""
    logits = layers.masks.weight.data.unflatten(0, (2, 5))[index, :4]
    logits.fill_(EMPTY)
    logits[:, patches] = FULL


def test_visible_layers_are_not_generated(layers, frame):
    predicted, moved, _ = layers(frame, TOKENS, TOKENS[:, None], GRID, torch.rand(1, 1, 1, 16, 20))
    assert torch.equal(predicted, moved)


def test_layers_at_the_edge_are_generated(layers, frame):
    set_patches(layers, 0, [0])  # the upper left corner
    layers.motions.bias.data[0] = 4.0  # four patches to the right
    generated = torch.rand(1, 1, 1, 16, 20)
    predicted, moved, _ = layers(frame, TOKENS, TOKENS[:, None], GRID, generated)
    for columns in (slice(8), slice(12, 20)):  # one patch around both positions
        assert torch.equal(predicted[..., :8, columns], generated[..., :8, columns])
    assert torch.equal(predicted[..., 8:, :], moved[..., 8:, :])
    assert torch.equal(predicted[..., 8:12], moved[..., 8:12])


def test_everything_is_generated_if_a_layer_is_not_visible(layers, frame):
    set_patches(layers, 1, [])
    generated = torch.rand(1, 1, 1, 16, 20)
    assert torch.equal(layers(frame, TOKENS, TOKENS[:, None], GRID, generated)[0], generated)


@pytest.mark.parametrize(
    ("rows", "columns", "generated"),
    [
        (slice(0, 20), slice(10, 21), True),  # 11 pixels on the edge, half the square root of the area is 7
        (slice(0, 20), slice(10, 15), False),  # 5 pixels, half the square root is 5
        (slice(1, 20), slice(10, 20), False),
        (slice(0, 40), slice(0, 64), True),
        (slice(30, 32), slice(30, 32), False),  # 4 pixels
        (slice(30, 31), slice(30, 33), True),  # 3 pixels
    ],
)
def test_layers_that_are_cut_off(rows, columns, generated):
    layers = MovingLayers(dim=6, in_channels=1, patch_size=8, num_layers=1)
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, 0, rows, columns] = 1
    masks[1, 0, 20:40, 20:40] = 1  # visible
    moved = masks.unsqueeze(2).expand(-1, -1, 3, -1, -1)  # three predicted frames
    area = layers._generated_area(masks, moved, _is_whole(masks))
    assert area.shape == (2, 1, 3, 64, 64)
    assert area[0].flatten(2).any(2).tolist() == [[generated] * 3]
    assert not area[1].any()


def roll(layers, frame, *motions, generated=None):
    """Predict frame by frame, with one pair of motions per frame; return the frames and the last memory."""
    frames, memory = [], None
    for pair in motions:
        layers.motions.bias.data = torch.tensor([(*motion, 0.0) for motion in pair]).flatten()
        shown = frame[:, :, None] if generated is None else generated
        predicted, _, memory = layers(frame, TOKENS, TOKENS[:, None], GRID, shown, memory=memory)
        frame = predicted[:, :, 0]
        frames.append(frame)
    return frames, memory


def test_layers_that_leave_the_frame_or_are_occluded_are_not_lost(layers, frame):
    up, left = (0.0, -1.0, 0.0), (-0.75, 0.0, 0.0)
    away = [((2.0, 0.0, 0.0), STAY), ((0.75, 0.0, 0.0), DOWN)]  # three columns of the first layer leave the frame
    back = [(left, up), ((-2.0, 0.0, 0.0), STAY)]
    frames, _ = roll(layers, frame, *away, *back)
    torch.testing.assert_close(frames[-1][..., 4:8, 4:12], frame[..., 4:8, 4:12], rtol=0, atol=1e-3)
    without = frames[1]
    for motions in back:  # each prediction starts without a memory
        without = predict(layers, without, *motions)
    assert not torch.allclose(without[..., 4:8, 4:12], frame[..., 4:8, 4:12], atol=0.1)


def test_the_center_of_a_layer_stays_in_the_frame(layers, frame):
    far = (30.0, -9.0, 0.0)
    memory = roll(layers, frame, (STAY, far))[1]
    # the center of the second layer is at (9.5, 5.5), the corner at (19, 0)
    torch.testing.assert_close(memory["motions"][0, 1], torch.tensor([9.5 / 4, -5.5 / 4, 0.0]), rtol=0, atol=1e-3)


def test_the_motion_of_a_rollout_does_not_blur_the_layers(layers, frame):
    part = (0.1, 0.0, 0.0)
    frames, memory = roll(layers, frame, *[(STAY, part)] * 10)
    expected = predict(layers, frame, STAY, RIGHT)
    torch.testing.assert_close(frames[-1][..., 4:8, 12:16], expected[..., 4:8, 12:16], rtol=0, atol=1e-3)
    torch.testing.assert_close(memory["motions"][0], torch.tensor([STAY, RIGHT]), rtol=0, atol=1e-4)


def test_the_background_is_filled_once(layers, frame):
    frames, memory = roll(layers, frame, (DOWN, DOWN))
    assert (frames[0][..., 4:7, 4:12] == -1).all()
    layers.fill.bias.data.fill_(-9)
    moved = layers(frame, TOKENS, TOKENS[:, None], GRID, frame[:, :, None], memory=memory)[0][:, :, 0]
    torch.testing.assert_close(moved[..., 4:7, 4:12], frames[0][..., 4:7, 4:12])
    torch.testing.assert_close(moved[..., 9:11, 4:12], frame[..., 9:11, 4:12])  # known from the keyframe


def test_layers_that_are_cut_off_are_segmented_again(layers, frame):
    set_patches(layers, 0, [0])  # the upper left corner
    generated = torch.rand(1, 1, 1, 16, 20)
    frames, memory = roll(layers, frame, (STAY, RIGHT), (STAY, RIGHT), generated=generated)
    torch.testing.assert_close(memory["motions"][0], torch.tensor([STAY, (2.0, 0.0, 0.0)]), rtol=0, atol=1e-3)
    assert torch.equal(frames[1][..., :8, :4], generated[:, :, 0, :8, :4])
    torch.testing.assert_close(memory["layers"][:, 0, 1:, :4, :4], generated[:, :, 0, :4, :4], rtol=0, atol=1e-3)
    torch.testing.assert_close(frames[1][..., 4:8, 16:], frame[..., 4:8, 8:12], rtol=0, atol=1e-3)


def test_a_row_of_zeros_is_an_empty_memory(layers, frame):
    frames = torch.cat([frame, frame.flip(-1)])
    predicted = {}
    for name in ("kept", "half"):
        memory = roll(layers, frame, (STAY, DOWN))[1]
        layers.motions.bias.data = torch.tensor([(*STAY, 0.0), (*RIGHT, 0.0)]).flatten()
        memory = {key: torch.cat([value, value * (name == "kept")]) for key, value in memory.items()}
        generated = frames[:, :, None]
        predicted[name] = layers(
            frames, TOKENS.repeat(2, 1, 1), TOKENS[:, None].repeat(2, 1, 1, 1), GRID, generated, memory=memory
        )[1]
    alone = predict(layers, frames[1:], STAY, RIGHT)
    torch.testing.assert_close(predicted["half"][1:, :, 0], alone)
    torch.testing.assert_close(predicted["half"][:1], predicted["kept"][:1])
    assert not torch.allclose(predicted["kept"][1:, :, 0], alone, atol=0.1)


def test_motions_have_no_gradient_to_masks(layers):
    masks = torch.rand(1, 2, 16, 20, requires_grad=True)
    assert not _centers(masks).requires_grad
    assert not layers._pool(masks, torch.rand(1, 1, 20, 8)).requires_grad


def test_the_moved_layers_are_trained_without_the_generated_frame(layers, frame):
    generated = torch.rand(1, 1, 1, 16, 20, requires_grad=True)
    layers(frame, TOKENS, TOKENS[:, None], GRID, generated)[1].square().sum().backward()
    assert generated.grad is None
    assert all(parameter.grad.any() for parameter in layers.parameters())


def test_the_smallest_layer_is_in_front(layers, frame):
    moved = predict(layers, frame, RIGHT, DOWN)
    layers.masks.weight.data = layers.masks.weight.data.unflatten(0, (2, -1)).flip(0).flatten(0, 1)
    torch.testing.assert_close(predict(layers, frame, DOWN, RIGHT), moved)


def test_masks_depend_on_colors(layers, frame):
    layers.masks.weight.data.zero_()
    layers.masks.bias.data = torch.tensor([-0.5] * 4 + [1.0] + [0.5] * 4 + [-1.0])
    masks = layers.segment(frame, TOKENS, GRID)
    torch.testing.assert_close(masks, (GAIN * torch.cat([frame - 0.5, 0.5 - frame], dim=1)).sigmoid())


def test_model_with_moving_layers(inputs):
    model = tiny_transformer(**ARCHITECTURES["Moving layers"])
    latents, timestep, actions = inputs
    masks = []
    model.layers_out.masks.register_forward_hook(lambda module, arguments, output: masks.append(output))
    output = model(*inputs, return_components=True)
    sample = output.sample
    assert sample.shape == latents.shape
    assert output.moved.shape == output.generated.shape == (3, 4, 3, 4, 6)
    assert torch.equal(sample, model(*inputs, return_dict=False)[0])
    assert not sample[:, :, :2].any()
    for options in (
        {"return_components": True},
        {"motion_noise": torch.zeros(3, 2, 3)},
        {"memory": output.memory},
    ):
        with pytest.raises(ValueError, match="`motion_noise` and `memory` require a model with `moving_layers`"):
            tiny_transformer()(*inputs, **options)
    other = model(latents, timestep, actions + 1).sample
    assert torch.equal(masks[0], masks[-1]), "masks do not depend on actions"
    changed = (sample != other).flatten(3).any(3).any(1)
    assert changed[:, 2:].all()
    for wrong in (None, torch.randn(3, 5, 3)):  # without actions, and without history
        with pytest.raises(ValueError, match="`hidden_states` must have history frames and predicted frames"):
            model(latents, timestep, wrong)
    with pytest.raises(
        ValueError, match=r"`motion_noise` must be \(batch, `moving_layers`, 3\) = \(3, 2, 3\), got \(2, 3\)"
    ):
        model(*inputs, motion_noise=torch.zeros(2, 3))


@pytest.mark.parametrize("number", [1, 8])
def test_new_layers_are_almost_empty(number):
    torch.manual_seed(0)
    layers = MovingLayers(384, 3, 8, number)
    layers.initialize_weights()
    masks = layers.segment(torch.rand(2, 3, 64, 64), torch.randn(2, 64, 384), (8, 8))
    assert masks.sum(1).mean() < 0.25
    assert (masks > 0.5).float().mean() < 0.05
    assert all((first - second).abs().max() > 0.1 for first, second in itertools.combinations(masks.unbind(1), 2))


def test_autocast_changes_little(inputs):
    model = tiny_transformer(**ARCHITECTURES["Moving layers"])
    expected = model(*inputs).sample
    with torch.autocast("cpu", torch.bfloat16):
        sample, moved, generated, _ = model(*inputs, return_components=True, return_dict=False)
        (moved + generated).square().mean().backward()
    assert (sample - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert all(parameter.grad.isfinite().all() for parameter in model.layers_out.parameters())


def test_caches_that_skip_blocks_are_rejected():
    pipeline = tiny_pipeline(**ARCHITECTURES["Moving layers"])
    for cache in (FirstBlockCacheConfig(threshold=0.1), MagCacheConfig(mag_ratios=[1.0] * 10, num_inference_steps=10)):
        pipeline.transformer.enable_cache(cache)
        with pytest.raises(ValueError, match=f"`{type(cache).__name__}` does not support models with `moving_layers`"):
            pipeline(torch.rand(3, 8, 12), torch.zeros(3, 3))
        pipeline.transformer.disable_cache()


def model_config():
    config = tiny_transformer(**ARCHITECTURES["Moving layers"]).config
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, r"requires .* \('frame', 'sample', True\), got \('frame', 'epsilon', True\)"),
        ({"relative_latents": False}, r"got \('frame', 'sample', False\)"),
        ({"conditioning": "video", "target_extent": None}, r"got \('video', 'sample', True\)"),
        ({"moving_layers": 65}, r"`moving_layers` must be an integer in \[0, 64\], got 65"),
        ({"moving_layers": 1.0}, "`moving_layers` must be an integer"),
        ({"moving_layers": True}, "`moving_layers` must be an integer"),
        ({"moving_layers": None}, "`moving_layers` must be an integer"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        IRASimTransformer3DModel(**model_config() | changes)


def test_moving_layers_can_be_added_to_a_model(inputs):
    model = tiny_transformer(**ARCHITECTURES["Push-T"])
    moving = add_moving_layers(model, 3)
    assert moving.config.moving_layers == 3
    for name, value in model.state_dict().items():
        assert torch.equal(moving.state_dict()[name], value), name
    expected = model(*inputs).sample[:, :, 2:]
    torch.testing.assert_close(moving(*inputs, return_components=True).generated, expected)
    torch.testing.assert_close(moving(*inputs).sample[:, :, 2:], expected)  # new layers are almost empty
    for number in (0, 65):
        with pytest.raises(ValueError, match=f"got {number}"):
            add_moving_layers(model, number)
    with pytest.raises(ValueError, match="`model` must have no moving layers, got 3"):
        add_moving_layers(moving, 2)
    with pytest.raises(ValueError, match=r"`moving_layers` .* requires"):
        add_moving_layers(tiny_transformer(), 2)


def test_moving_layers_are_not_adapted_to_other_patches():
    model = tiny_transformer(moving_layers=2, prediction_type="sample", relative_latents=True)
    with pytest.raises(ValueError, match="its `moving_layers` must be 0, got 2"):
        change_patch_size(model, 1)
    assert not can_adapt(model.config, "patch_size", 1)
    with pytest.raises(ValueError, match="`model` must have no moving layers"):
        change_autoencoder(model, 4, torch.randn(9, 4, 4, 6), torch.randn(9, 1, 8, 12))
