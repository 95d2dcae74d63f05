import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_transformer
from train import TrainingArguments

from irasim_diffusers.models import noise_process
from irasim_diffusers.training.arguments import check_chunks, check_crop
from irasim_diffusers.training.loss import training_loss
from irasim_diffusers.training.rollouts import clip_length, crop


def test_crop_contains_motion_and_target():
    """Frames and targets are cropped consistently, by whole patches, around the changing pixel."""
    config = {
        "patch_size": 2,
        "target_extent": [-1.0, 10.0, 11.0, 20.0],
        "sample_width": 12,
        "sample_height": 10,
    }
    generator = torch.Generator().manual_seed(0)
    latents = torch.zeros(50, 1, 3, 10, 12)
    places = torch.stack([torch.randint(0, size, (50,), generator=generator) for size in (10, 12)], dim=1)
    for clip, (row, column) in zip(latents, places.tolist(), strict=True):
        clip[0, :, row, column] = torch.tensor([1.0, 2.0, 3.0])
    targets = places.flip(1) + torch.tensor([-0.5, 10.5])  # the target is the center of the pixel; a pixel is one unit
    actions = torch.cat([targets, torch.full((50, 1), 7.0)], dim=1)[:, None]
    cropped, moved = crop(latents, actions, config, 4, torch.rand(50, 3, generator=generator))
    assert cropped.shape == (50, 1, 3, 4, 4)
    assert (moved[..., 2] == 7).all()
    corners = set()
    for clip, target, place in zip(cropped, moved[:, 0, :2], places, strict=True):
        ((row, column),) = (clip[0, 2] == 3).nonzero().tolist()
        assert clip[0, :, row, column].tolist() == [1, 2, 3]
        torch.testing.assert_close(target, torch.tensor([column - 0.5, row + 10.5]))
        corner = (place - torch.tensor([row, column])).tolist()
        assert all(side % 2 == 0 for side in corner)
        corners.add(tuple(corner))
    assert len(corners) > 10
    draws = torch.rand(1, 3, generator=generator)
    _, same = crop(latents[:1], actions[:1], config | {"target_extent": None}, 4, draws)
    assert torch.equal(same, actions[:1])


def test_prediction_for_crop_matches_whole_frame():
    """The predictions agree away from the border of the crop."""
    settings = {"spatial_position": "rope", "ff_conv": True, "prediction_type": "sample", "action_space": "absolute"}
    model = tiny_transformer(
        **settings, num_layers=1, patch_size=1, sample_height=10, sample_width=12, target_extent=[0, 0, 12, 10]
    )
    for block in [*model.transformer_blocks, *model.temporal_transformer_blocks]:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)  # disables attention, which reaches beyond the crop
    torch.manual_seed(3)
    latents, actions = torch.randn(2, 4, 3, 10, 12), 6 * torch.rand(2, 1, 3)
    model.register_to_config(num_history_frames=2, sample_frames=3)
    config = dict(model.config)
    cropped, moved = crop(latents, actions, config, 6, torch.full((2, 3), 0.4))
    timestep = torch.tensor([500, 10])
    torch.nn.init.zeros_(model.action_embed.linear_2.weight)  # the embedding depends on the absolute target
    whole, part = model(latents, timestep, actions).sample, model(cropped, timestep, moved).sample
    for number in range(2):
        (top, left) = next(
            (top, left)
            for top in range(5)
            for left in range(7)
            if torch.equal(latents[number, :, :, top : top + 6, left : left + 6], cropped[number])
        )
        inside = whole[number, :, :, top + 1 : top + 5, left + 1 : left + 5]
        torch.testing.assert_close(inside, part[number, :, :, 1:5, 1:5], rtol=1e-4, atol=1e-5)


class TrueFrames(torch.nn.Module):
    """Model that predicts changes from the last history frame in clips that get brighter by 1 per frame."""

    def __init__(self):
        super().__init__()
        self.histories, self.lengths = [], []

    def forward(self, hidden_states, timestep, actions, action_mask=None, return_dict=False):
        length = hidden_states.shape[2] - actions.shape[1]
        self.lengths.append(actions.shape[1])
        self.histories.append((hidden_states[:, 0, :length, 0, 0], actions[:, 0, 0]))
        steps = torch.arange(1, actions.shape[1] + 1).view(-1, 1, 1)
        future = torch.zeros_like(hidden_states[:, :, length:]) + steps + self.error
        return (torch.cat([hidden_states[:, :, :length], future], dim=2),)


@pytest.mark.parametrize("length", [1, 2])
def test_training_on_own_rollouts(length):
    """The history consists of predicted frames with matching actions; some clips keep the true history."""
    config = {"num_history_frames": 2, "sample_frames": 2 + length, "conditioning": "frame", "relative_latents": True}
    settings = TrainingArguments(
        dataset=["set"],
        output_dir="out",
        rollout_chunks=3,
        rollout_start_step=1,
        short_chunk_share=0.3,
        terminal_share=1.0,
        action_dropout=0.0,
    )
    frames = clip_length(config, 3)
    assert frames == 2 + 4 * length
    count = torch.arange(float(frames))
    latents = count.view(1, 1, -1, 1, 1).repeat(40, 3, 1, 2, 2)
    actions = count[1:].view(1, -1, 1).repeat(40, 1, 1)  # row k leads to frame k + 1
    process = noise_process(tiny_transformer(prediction_type="sample").config)
    chunks, lengths = set(), set()
    for step in range(20):
        model = TrueFrames()
        model.error = 0.0
        clip = {"latents": latents, "actions": actions}
        loss = training_loss(model, process, clip, config, settings, step=step, position=0)["loss"]
        assert loss < 1e-8  # each frame is paired with the matching history
        assert step or len(model.histories) == 1  # rollouts start at step 1
        for history, action in model.histories:
            torch.testing.assert_close(action, history[:, -1] + 1)
        chunks.add(len(model.histories))
        lengths.add(model.lengths[-1])
        assert set(model.lengths[:-1]) <= {length}
        model.error, model.histories = 0.25, []
        training_loss(model, process, clip, config, settings, step=step, position=0)
        history, action = model.histories[-1]
        off = history[:, -1] - (action - 1)
        true = off.abs() < 1e-3
        if len(model.histories) == 1:
            assert true.all()
        else:
            assert 0.1 < true.float().mean() < 0.6
            torch.testing.assert_close(off[~true], torch.full_like(off[~true], 0.25 * (len(model.histories) - 1)))
    assert chunks == {1, 2, 3, 4}
    assert lengths == set(range(1, length + 1))  # the loss is also computed for shorter chunks


def test_rollouts_are_predicted_in_the_crop_of_the_loss():
    config = {"num_history_frames": 2, "sample_frames": 3, "conditioning": "frame", "relative_latents": True}
    config |= {"patch_size": 1, "target_extent": None}
    settings = TrainingArguments(dataset=["set"], output_dir="out", rollout_chunks=3, action_dropout=0.0, crop_size=2)
    process = noise_process(tiny_transformer(prediction_type="sample").config)
    columns = torch.arange(8.0).expand(4, 3, 6, 8, 8)  # every frame shows the column of each pixel, without change
    lengths = set()
    for step in range(6):
        windows = []

        def model(hidden_states, timesteps, actions, windows=windows, **kwargs):
            windows.append(hidden_states)
            return (torch.zeros_like(hidden_states),)

        clip = {"latents": columns, "actions": torch.zeros(4, 5, 1)}
        training_loss(model, process, clip, config, settings, step=step, position=0)
        assert {window.shape[-2:] for window in windows} == {(2, 2)}
        histories = torch.stack([window[:, :, 1] for window in windows])
        torch.testing.assert_close(histories, histories[:1].expand_as(histories))
        lengths.add(len(windows))
    assert len(lengths) > 1


def test_motion_noise():
    """Rollouts are predicted with noise that differs between clips and chunks; the chunk with the loss has none."""
    model = tiny_transformer(**ARCHITECTURES["Moving layers"])
    process = noise_process(model.config)
    settings = TrainingArguments(dataset=["set"], output_dir="out", rollout_chunks=3, motion_noise=0.1)
    torch.manual_seed(0)
    clip = {"latents": torch.randn(50, 4, 14, 4, 6), "actions": torch.randn(50, 13, 3)}
    noises = []

    def record(module, arguments, keywords):
        noise = keywords.get("motion_noise")
        assert keywords.get("return_components", False) == (noise is None)
        if noise is not None:
            noises.append(noise)

    model.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        for step in range(4):
            training_loss(model, process, clip, model.config, settings, step=step, position=50 * step)
    assert len(noises) > 1
    noise = torch.stack(noises)
    assert noise.shape[1:] == (50, 2, 3)
    assert noise.unique().numel() == noise.numel()
    assert noise.std() == pytest.approx(0.1, rel=0.15)


def test_rollouts_keep_the_memory_of_the_model():
    """Every chunk receives the memory of the previous one; in the chunk with the loss, it is empty for true histories."""
    model = tiny_transformer(**ARCHITECTURES["Moving layers"])
    settings = TrainingArguments(dataset=["set"], output_dir="out", rollout_chunks=3)
    torch.manual_seed(0)
    clip = {"latents": torch.randn(50, 4, 14, 4, 6), "actions": torch.randn(50, 13, 3)}
    given, returned = [], []

    def record(module, arguments, keywords, output):
        given.append(keywords.get("memory"))
        returned.append(output[-1])

    model.register_forward_hook(record, with_kwargs=True)
    most = 0
    for step in range(4):
        given.clear()
        returned.clear()
        with torch.no_grad():
            training_loss(model, noise_process(model.config), clip, model.config, settings, step=step, position=0)
        assert given[0] is None
        for memory, expected in zip(given[1:-1], returned, strict=False):
            torch.testing.assert_close(memory, expected, rtol=0, atol=0)
        if len(given) > 1:
            empty = given[-1]["background"].flatten(1).abs().amax(1) == 0
            assert 0.1 < empty.float().mean() < 0.6
            for name, tensor in given[-1].items():
                assert not tensor[empty].any()
                assert torch.equal(tensor[~empty], returned[-2][name][~empty])
        most = max(most, len(given))
    assert most > 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("motion_noise", "`motion_noise` must be 0 for a model without moving layers, got 0.1"),
        ("short_chunk_share", "`short_chunk_share` must be 0 for Video-Ada and U-Nets, .* got 0.1"),
    ],
)
def test_options_of_chunks_require_models_that_support_them(option, message):
    settings = TrainingArguments(dataset=["set"], output_dir="out", rollout_chunks=3, **{option: 0.1})
    check_chunks(settings, {"conditioning": "frame", "moving_layers": 1})
    with pytest.raises(ValueError, match=message):
        check_chunks(settings, {"conditioning": "video"})


def test_all_weights_have_gradients_after_bfloat16_rollout():
    """Autocast must not reuse weights that were cast without gradient during a rollout."""
    config = {"num_history_frames": 2, "sample_frames": 3, "conditioning": "frame", "relative_latents": True}
    model = tiny_transformer(**config, num_layers=1, prediction_type="sample").train()
    settings = TrainingArguments(dataset=["set"], output_dir="out", rollout_chunks=2, action_dropout=0.0)
    torch.manual_seed(0)
    clip = {"latents": torch.randn(2, 4, 5, 4, 6), "actions": torch.randn(2, 4, 3)}
    process = noise_process(model.config)
    for step in range(8):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            training_loss(model, process, clip, dict(model.config), settings, step=step, position=0)["loss"].backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spatial_position": "grid"}, "`crop_size` requires `spatial_position='rope'`, got 'grid'"),
        ({"patch_size": 3}, "`crop_size` must be a multiple of the patch size 3, got 8"),
        ({"action_space": "absolute"}, "`crop_size` with absolute actions requires `target_extent`"),
    ],
)
def test_crops_require_a_suitable_model(changes, message):
    config = {"spatial_position": "rope", "patch_size": 2, "action_space": "relative", "target_extent": None}
    check_crop(8, config)
    check_crop(None, config | changes)
    with pytest.raises(ValueError, match=message):
        check_crop(8, config | changes)
