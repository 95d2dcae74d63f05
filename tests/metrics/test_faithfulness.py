"""Tests of action faithfulness with tiny world models of a moving square."""

import numpy as np
import pytest
import torch

from irasim_diffusers.metrics import (
    STRATA,
    action_faithfulness,
    counterfactual_actions,
    future_errors,
    identified,
    motion,
    sensitivity_maps,
    similar_clips,
    summarise_faithfulness,
)

HEIGHT, WIDTH, STEPS = 10, 14, 4


def draw(positions):
    """Draw frames (..., H, W, 3), uint8, with a soft square at positions (..., 2), row and column."""
    rows, columns = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    row, column = positions[..., 0, None, None], positions[..., 1, None, None]
    inside = np.clip(2 - abs(rows - row), 0, 1) * np.clip(2 - abs(columns - column), 0, 1)
    return (255 * np.repeat(inside[..., None], 3, axis=-1)).round().astype(np.uint8)


def record(count, seed):
    """Record clips in which the first two action components move the square; the third has no effect."""
    rng = np.random.default_rng(seed)
    start = rng.uniform([3, 3], [HEIGHT - 4, WIDTH - 4], size=(count, 2))
    speed = rng.uniform(0, 1, size=(count, 1, 1))  # the speeds differ, and some squares hardly move
    actions = np.concatenate([speed * rng.normal(size=(count, STEPS, 2)), rng.normal(size=(count, STEPS, 1))], axis=2)
    path = start[:, None] + np.cumsum(actions[..., :2], axis=1)
    return draw(start)[:, None], actions, draw(path)


class TinyModel(torch.nn.Module):
    """World model that predicts from the history frame and the sum of the actions, or from the frame only."""

    def __init__(self, blind):
        super().__init__()
        self.blind = blind
        sizes = HEIGHT * WIDTH
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(sizes + 3, 128), torch.nn.GELU(), torch.nn.Linear(128, sizes), torch.nn.Sigmoid()
        )

    def forward(self, frames, actions):
        pixels = frames.flatten(1)[:, None].expand(-1, actions.shape[1], -1)
        sums = actions.cumsum(1) * (0 if self.blind else 1)
        return self.layers(torch.cat([pixels, sums], dim=-1)).unflatten(-1, (HEIGHT, WIDTH))

    @torch.no_grad()
    def predict(self, frames, actions):
        seen = torch.from_numpy(frames[-1, ..., 0]).float()[None] / 255
        actions = torch.from_numpy(np.ascontiguousarray(actions)).float()
        return self(seen.expand(len(actions), -1, -1), actions)[:, :, None].expand(-1, -1, 3, -1, -1)


def train(blind):
    torch.manual_seed(0)
    model = TinyModel(blind)
    histories, actions, truths = record(2000, seed=1)
    seen = torch.from_numpy(histories[:, 0, ..., 0]).float() / 255
    future = torch.from_numpy(truths[..., 0]).float() / 255
    actions = torch.from_numpy(actions).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(250):
        part = slice(100 * step % 2000, 100 * step % 2000 + 100)
        loss = (model(seen[part], actions[part]) - future[part]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def models():
    return {blind: train(blind) for blind in (False, True)}


@pytest.fixture(scope="module")
def clips():
    histories, actions, truths = record(60, seed=2)
    return histories, actions, truths, np.zeros((60, 3))


def test_faithful_model_passes(models, clips):
    report = action_faithfulness(models[False].predict, *clips)
    assert report["verdict"]["obeys"] is True
    assert report["verdict"]["text"].startswith("The model follows its actions: in clips with much motion")
    rates, gaps = report["identification"], report["gap"]["held"]
    assert rates["much motion"]["low"] > 0.5
    assert gaps["little motion"]["high"] < gaps["much motion"]["low"]
    assert [rates[stratum]["n"] for stratum in STRATA] == [20, 20, 20]
    assert report["gap"]["shuffled"]["much motion"]["low"] > 0


def test_model_trained_without_actions_fails(models, clips):
    report = action_faithfulness(models[True].predict, *clips)
    assert report["verdict"]["obeys"] is False
    assert report["verdict"]["text"].startswith("The model does not follow its actions")
    assert report["identification"]["all"] == {"mean": 0.25, "low": 0.25, "high": 0.25, "n": 60}
    assert all(gap["all"]["mean"] == 0 for gap in report["gap"].values())


def test_model_with_opposite_actions_fails(models, clips):
    def opposite(frames, actions):
        return models[False].predict(frames, -actions)

    assert action_faithfulness(opposite, *clips)["verdict"]["obeys"] is not True


def test_noisy_model_without_actions_fails(models, clips):
    generator = torch.Generator().manual_seed(0)

    def noisy(frames, actions):
        futures = models[True].predict(frames, actions)
        return (futures + 0.1 * torch.randn(futures.shape, generator=generator)).clamp(0, 1)

    assert action_faithfulness(noisy, *clips)["verdict"]["obeys"] is not True


def test_few_clips_are_undecided(models, clips):
    report = action_faithfulness(models[False].predict, *(part[:21] for part in clips))
    assert report["verdict"] == {"obeys": None, "text": "Undecided: at least 8 clips with much motion are required."}


def test_sensitivity_maps_show_which_component_moves_which_pixels(models):
    histories, actions, _ = record(1, seed=3)
    history, actions = draw(np.array([[5.0, 7.0]])), actions[0] * 0
    steps = np.array([0.3, 0.3, 0.3])
    rows, columns, nothing = sensitivity_maps(models[False].predict, history, actions, steps)
    assert rows.shape == (HEIGHT, WIDTH) == histories.shape[2:4]
    above, beside = (slice(2, 4), slice(6, 9)), (slice(4, 7), slice(4, 6))
    assert rows[above].mean() > 2 * columns[above].mean()
    assert columns[beside].mean() > 2 * rows[beside].mean()
    assert nothing.mean() < 0.3 * min(rows.mean(), columns.mean())
    assert not sensitivity_maps(models[True].predict, history, actions, steps).any()


def test_counterfactual_actions():
    rng = np.random.default_rng(0)
    frames = np.zeros((5, 6, 8, 3), dtype=np.uint8)
    frames[:, 0, 0, 0] = [10, 200, 12, 190, 17]
    assert similar_clips(frames, 2).tolist() == [[2, 4], [3, 4], [0, 4], [1, 4], [2, 0]]
    actions, holds = rng.normal(size=(5, 4, 2)), rng.normal(size=(5, 2))
    others = counterfactual_actions(frames, actions, holds, ways=3)
    assert np.array_equal(others.matched, actions[[[2, 4], [3, 4], [0, 4], [1, 4], [2, 0]]])
    shuffled = others.altered["shuffled"]
    assert not (shuffled == actions).all(axis=(1, 2)).any()  # every clip has the actions of another clip
    assert np.array_equal(np.sort(shuffled[:, 0, 0]), np.sort(actions[:, 0, 0]))
    assert np.array_equal(others.altered["held"][:, 3], holds)
    assert np.array_equal(others.altered["reversed"][:, 0], actions[:, 3])
    sequences = others.of_clip(1)
    assert sequences.shape == (6, 4, 2)
    assert np.array_equal(sequences[0], actions[1])
    assert np.array_equal(sequences[5], actions[1, ::-1])


def test_credit_is_shared_in_a_tie():
    errors = np.array([[1.0, 2, 3], [2, 1, 1], [5, 5, 5]])
    assert identified(errors, np.array([0, 1, 2])).tolist() == [1, 0.5, 1 / 3]
    assert identified(errors, np.array([2, 0, 0])).tolist() == [0, 0, 1 / 3]


def test_errors_and_motion_are_mean_squares():
    truth = np.full((STEPS, 2, 3, 3), 51, dtype=np.uint8)
    futures = torch.stack([torch.full((STEPS, 3, 2, 3), value) for value in (0.2, 0.4)])
    errors = future_errors(lambda *_: futures, truth[:1], np.zeros((2, STEPS, 1)), truth)
    assert errors == pytest.approx([0, 0.04])
    assert motion(np.zeros((2, 3, 3), dtype=np.uint8), truth) == pytest.approx(0.04)
    with pytest.raises(ValueError, match=r"must return futures \(2, 4, 3, 2, 3\), got \(2, 3, 3, 2, 3\)"):
        future_errors(lambda *_: futures[:, 1:], truth[:1], np.zeros((2, STEPS, 1)), truth)
    with pytest.raises(ValueError, match=r"must return futures \(3, 4, 3, 2, 3\), got \(2, 4, 3, 2, 3\)"):
        future_errors(lambda *_: futures, truth[:1], np.zeros((3, STEPS, 1)), truth)


def test_gap_of_perfect_model_is_finite():
    errors = np.full((30, 7), 0.01)
    errors[:, 0] = 0
    summary = summarise_faithfulness(errors, np.arange(30.0), ways=4)
    assert summary["gap"]["held"]["all"]["mean"] == pytest.approx(38.92, abs=0.01)
    assert summary["verdict"]["obeys"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 6}, "`ways` must be at least 2 and at most 5, the number of clips, got 6"),
        ({"ways": 1}, "got 1"),
        ({"holds": np.zeros((5, 3))}, r"and \(N, A\), got \(5, 2, 2, 3\), \(5, 4, 2\) and \(5, 3\)"),
        ({"last_frames": np.zeros((4, 2, 2, 3))}, r"must be \(N, H, W, 3\), .* got \(4, 2, 2, 3\)"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"last_frames": np.zeros((5, 2, 2, 3)), "actions": np.zeros((5, 4, 2)), "holds": np.zeros((5, 2))}
    with pytest.raises(ValueError, match=message):
        counterfactual_actions(**arguments | changes)
