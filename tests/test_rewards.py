import numpy as np
import PIL.Image
import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from irasim_diffusers.rewards import FrameRegressor, GoalImage, GoalLatents, LeRobotReward, pretrained_encoder

HEIGHT, WIDTH = 16, 24


@pytest.fixture
def clip():
    """Frames (B, n, 3, H, W) in [0, 1]; all axes differ in size."""
    return torch.rand(2, 5, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def regressor():
    torch.manual_seed(0)
    return FrameRegressor(HEIGHT, WIDTH, channels=(4, 6), feature_dim=7).eval()


def test_mse_to_the_goal(clip):
    reward = GoalImage(clip[1, 3])
    scores = reward(clip)
    assert scores.shape == (2, 5)
    assert scores.argmax() == 8
    assert scores[1, 3] == 0
    expected = -((clip[0, 2] - clip[1, 3]) ** 2).mean()
    torch.testing.assert_close(scores[0, 2], expected)


def test_goal_can_be_tensor_array_or_image(clip):
    pixels = (clip[0, 0] * 255).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).numpy()
    expected = GoalImage(pixels)(clip)
    for goal in (array, PIL.Image.fromarray(array), (array / 255).astype(np.float32)):
        torch.testing.assert_close(GoalImage(goal)(clip), expected)


def test_cosine_of_features(clip, regressor):
    reward = GoalImage(clip[1, 3], encoder=regressor.features)
    scores = reward(clip)
    features = regressor.features(clip)
    expected = torch.nn.functional.cosine_similarity(features[0, 2], features[1, 3], dim=0)
    torch.testing.assert_close(scores[0, 2], expected)
    torch.testing.assert_close(scores[1, 3], torch.tensor(1.0))
    assert scores.shape == (2, 5)
    assert scores.max() <= 1 + 1e-6


def test_encoder_from_a_folder(tmp_path, clip):
    torch.manual_seed(0)
    network = ResNetModel(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    ).eval()
    network.save_pretrained(tmp_path)
    encode = pretrained_encoder(str(tmp_path))
    clip = clip[:, :2].clone().requires_grad_()
    scores = GoalImage(clip[1, 1].detach(), encode)(clip)
    assert scores.shape == (2, 2)
    torch.testing.assert_close(scores[1, 1], torch.tensor(1.0))
    scores[0].sum().backward()
    assert clip.grad[0].abs().max() > 0


def test_latent_goal(pipeline):
    goal = torch.rand(3, 8, 12)
    reward = GoalLatents(pipeline, goal)
    assert not reward.needs_pixels
    latents = pipeline.start(goal, [0]).latents
    other = latents + 2
    assert torch.equal(reward(torch.cat([other, latents], dim=2)), torch.tensor([[-4.0, 0.0]]))


def test_regressor_scores_frames_independently(clip, regressor):
    scores = regressor(clip)
    assert scores.shape == (2, 5)
    assert 0 < scores.min() < scores.max() < 1
    torch.testing.assert_close(regressor(clip[1, 3]), scores[1, 3])


def test_regressor_round_trip(tmp_path, clip, regressor):
    regressor.save_pretrained(tmp_path)
    loaded = FrameRegressor.from_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    assert loaded.config.target == "iou"
    assert torch.equal(loaded(clip), regressor(clip))


def test_success_is_a_score_of_at_least_the_threshold(clip, regressor):
    scores = regressor(clip)
    limit = scores.median().item()
    other = FrameRegressor(HEIGHT, WIDTH, channels=(4, 6), feature_dim=7, success_threshold=limit).eval()
    other.load_state_dict(regressor.state_dict())
    assert torch.equal(other.success(clip), scores >= limit)


def test_regressor_learns_a_position(clip):
    """The label is the red value of one corner, which depends on the position of the pixels."""
    torch.manual_seed(0)
    regressor = FrameRegressor(HEIGHT, WIDTH, channels=(8, 8), feature_dim=16)
    optimizer = torch.optim.Adam(regressor.parameters(), lr=5e-3)
    for _ in range(150):
        frames = torch.rand(32, 3, HEIGHT // 4, WIDTH // 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        loss = (regressor(frames) - frames[:, 0, 0, -1]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.25 / 12  # a quarter of the variance


class Brightness(torch.nn.Module):
    """Reward model with LeRobot's interface."""

    def compute_reward(self, batch):
        assert batch["task"] == ["push"] * len(batch["observation.images.front"])
        return batch["observation.images.front"].mean(dim=(1, 2, 3)) * batch["gain"][:, 0]


def test_lerobot_reward_model(clip):
    reward = LeRobotReward(
        Brightness(),
        "observation.images.front",
        preprocessor=lambda batch: batch | {"gain": 2 * batch["gain"]},
        extra={"task": "push", "gain": torch.tensor([3.0])},
    )
    torch.testing.assert_close(reward(clip), 6 * clip.mean(dim=(2, 3, 4)))


BAD = [
    (lambda clip: GoalImage(clip[0, 0] * torch.nan), "`goal` must be finite"),
    (lambda clip: GoalImage(clip[0, 0] * 255), r"`goal` must be finite and in \[0, 1\]"),
    (lambda clip: GoalImage(clip[0]), "`goal` must be one RGB image"),
    (lambda clip: GoalImage(clip[0, 0, :1]), "`goal` must be one RGB image"),
    (lambda clip: GoalImage(np.zeros((4, 5))), "`goal` must be an RGB image"),
    (lambda clip: GoalImage(np.zeros((4, 5, 3), dtype=int)), "`goal` must be one RGB image"),
    (lambda clip: GoalImage(clip[0, 0])(clip[..., 1:]), r"`frames` must be \(B, n, 3, 16, 24\)"),
    (lambda clip: GoalImage(clip[0, 0], lambda frames: frames / 0), "`encoder` must return finite"),
    (lambda clip: LeRobotReward(object()), "`model` must have `compute_reward"),
    (
        lambda clip: FrameRegressor(16, 24).success(clip),
        "`success_threshold` of this regressor must be a score, got None",
    ),
    (
        lambda clip: FrameRegressor(channels="x"),
        r"`channels` must be a non-empty list of integers in \[1, 8192\], got 'x'",
    ),
    (lambda clip: FrameRegressor(channels=[8, 0]), "`channels` must be a non-empty list of integers"),
    (lambda clip: FrameRegressor(channels=[10**9]), "`channels` must be a non-empty list of integers"),
    (lambda clip: FrameRegressor(feature_dim=True), "`feature_dim`, .* must be integers in .*, got True"),
    (
        lambda clip: FrameRegressor(success_threshold=float("nan")),
        "`success_threshold` must be a finite number or None",
    ),
    (
        lambda clip: FrameRegressor(success_threshold=True),
        "`success_threshold` must be a finite number or None, got True",
    ),
    (
        lambda clip: FrameRegressor(success_threshold="x"),
        "`success_threshold` must be a finite number or None, got 'x'",
    ),
    (lambda clip: FrameRegressor(8, 96), "`sample_height` and `sample_width` must be at least 16"),
    (lambda clip: FrameRegressor(16, 16)(clip), r"`frames` must be \(..., 3, 16, 16\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message, clip):
    with pytest.raises(ValueError, match=message):
        call(clip)
