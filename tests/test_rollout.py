from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_pipeline

from irasim_diffusers import IRASimPipeline, RolloutState, embedded_checkpoint, roll
from irasim_diffusers.data import read_video
from irasim_diffusers.rollout import concatenate


def state_of(*seeds):
    latents = torch.stack([torch.full((4, 2, 4, 6), float(seed)) for seed in seeds])
    memory = {"motions": torch.tensor(seeds).view(-1, 1, 1).repeat(1, 2, 3)}
    return RolloutState(latents, seeds, torch.arange(len(seeds)), memory)


def same(state, other):
    torch.testing.assert_close(state.latents, other.latents, rtol=0, atol=0)
    assert state.seeds == other.seeds
    assert torch.equal(state.step, other.step)
    assert state.memory.keys() == other.memory.keys()
    for name, tensor in state.memory.items():
        assert torch.equal(tensor, other.memory[name])


@torch.no_grad()
def latents_of(pipeline, state, actions, chunk_length=None, **sampling):
    chunks = roll(pipeline, state, actions, chunk_length, **{"num_inference_steps": 2} | sampling)
    return torch.cat([latents for _, latents in chunks], dim=2)


def pipeline_of(name):
    pipeline = tiny_pipeline(**ARCHITECTURES[name])
    if pipeline.transformer.config.prediction_type == "sample":  # PNDM does not support this prediction type
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


@pytest.fixture
def plans(actions):
    """Three action sequences (3, 7, 3)."""
    return torch.from_numpy(np.stack([actions, -actions, 0.5 * actions])).float()


def test_repeat_select_and_put_round_trip():
    state = state_of(5, 3, 8)
    same(state.repeat(4).select([0, 4, 8]), state)
    assert state.repeat(2).seeds == (5, 5, 3, 3, 8, 8)
    assert state.repeat(2).step.tolist() == [0, 0, 1, 1, 2, 2]
    same(state.select([2, 0, 1]).select([1, 2, 0]), state)
    other = state_of(7, 9)
    changed = state.put([2, 0], other)
    same(changed.select([2, 0]), other)
    same(changed.select([1]), state.select([1]))
    same(changed.put([0, 2], state.select([0, 2])), state)
    assert state.seeds == (5, 3, 8)  # unchanged
    assert state.latents[2, 0, 0, 0, 0] == 8


def test_rows_without_memory_have_zeros():
    state, other = state_of(5, 3, 8), RolloutState.first(state_of(7).latents, [7])
    for mixed in (state.put([1], other), concatenate([state.select([0]), other, state.select([2])])):
        assert mixed.memory["motions"][:, 0, 0].tolist() == [5, 0, 8]
    assert other.put([0], state.select([2])).memory["motions"].unique().tolist() == [8]


def test_memory_of_a_model_with_moving_layers():
    pipeline = IRASimPipeline.from_pretrained(embedded_checkpoint())
    pipeline.set_progress_bar_config(disable=True)
    frames = read_video(embedded_checkpoint() / "example.mp4")[:40]
    actions = np.loadtxt(embedded_checkpoint() / "example_actions.csv", delimiter=",", skiprows=1)[:40]
    plan = torch.from_numpy(actions).float()[None]
    start = pipeline.start(frames[:1], [0])
    *_, (later, _) = roll(pipeline, start, plan[:, :30])
    assert {len(tensor) for tensor in later.memory.values()} == {1}
    assert later.memory["motions"].abs().amax() > 0.5
    with torch.no_grad():
        future = pipeline.advance(later, plan[:, 30:32])[1]
        assert not torch.equal(pipeline.advance(replace(later, memory={}), plan[:, 30:32])[1], future)
        reset = pipeline.start(frames[:2], [0])
        both = pipeline.advance(later.repeat(2).put([0], reset), torch.cat([plan[:, :2], plan[:, 30:32]]))[1]
        alone = pipeline.advance(reset, plan[:, :2])[1]
    torch.testing.assert_close(both, torch.cat([alone, future]), rtol=0, atol=1e-4)
    *_, (_, last) = roll(pipeline, start, plan[:, :32])
    torch.testing.assert_close(last, future, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_row_is_the_same_alone_and_in_a_batch(name, frames, plans):
    pipeline = pipeline_of(name)
    state = pipeline.start(frames, [5, 3, 5])
    together = latents_of(pipeline, state, plans)
    assert together.shape == (3, 4, 7, 4, 6)
    for row in range(3):
        alone = latents_of(pipeline, state.select([row]), plans[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_noise_depends_on_seed_and_step_only(scheduler, pipeline, frames, plans):
    """This includes the noise of stochastic schedulers, also after a partial reset."""
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    with torch.no_grad():
        state, _ = pipeline.advance(pipeline.start(frames, [5, 3]), plans[:2, :2], 2)
        mixed = state.put([0], pipeline.start(frames, [3]))
        after, latents = pipeline.advance(mixed, plans[:2, 2:4], 2)
        assert after.step.tolist() == [2, 4]
        for row in range(2):
            _, alone = pipeline.advance(mixed.select([row]), plans[row : row + 1, 2:4], 2)
            torch.testing.assert_close(latents[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    again = latents_of(pipeline, pipeline.start(frames, [5, 3, 6]), plans[:1].expand(3, -1, -1))
    assert not torch.allclose(again[0], again[1], atol=1e-3)


@pytest.mark.parametrize("chunk_length", [1, 2, 3])
def test_the_noise_of_a_frame_does_not_depend_on_the_chunks(chunk_length, pipeline, frames, plans):
    """A network that predicts zero leaves the noise, in which frames are independent."""
    for parameter in pipeline.transformer.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    state = pipeline.start(frames, [5, 3, 8])
    chunked = latents_of(pipeline, state, plans, chunk_length)
    torch.testing.assert_close(chunked, latents_of(pipeline, state, plans, 3))
    assert not torch.allclose(chunked[:, :, 0], chunked[:, :, 1], atol=1e-2)


def test_roll_matches_repeated_advance(pipeline, frames, plans):
    state = pipeline.start(frames, [5, 3, 8])
    expected = state
    with torch.no_grad():
        parts = plans.split(2, dim=1)
        chunks = roll(pipeline, state, plans, 2, num_inference_steps=2)
        for (after, latents), part in zip(chunks, parts, strict=True):
            expected, single = pipeline.advance(expected, part, 2)
            torch.testing.assert_close(latents, single)
            assert after.latents.shape == (3, 4, 2, 4, 6)
            assert pipeline.decode(latents).shape == (3, part.shape[1], 3, 8, 12)
            assert not latents.requires_grad
    same(after, expected)
    assert after.step.tolist() == [7, 7, 7]


def test_decoded_frames_are_in_unit_range(pipeline):
    with torch.no_grad():
        decoded = pipeline.decode(30 * torch.randn(2, 4, 3, 4, 6))
    assert decoded.shape == (2, 3, 3, 8, 12)
    assert 0 <= decoded.min() < decoded.max() <= 1


@pytest.mark.parametrize("name", ["Frame-Ada", "Push-T"])
def test_gradients_reach_the_first_action_through_chunks(name, frames, plans):
    pipeline = pipeline_of(name)
    plan = plans[:1].clone().requires_grad_()
    *_, (_, latents) = roll(pipeline, pipeline.start(frames, [5]), plan, 2, num_inference_steps=2)
    pipeline.decode(latents)[:, -1].sum().backward()
    assert torch.isfinite(plan.grad).all()
    assert plan.grad[0, 0].abs().max() > 0


def test_one_history_for_all_seeds_or_one_each(pipeline, frames):
    pair = torch.rand(2, 2, 3, 8, 12)
    state = pipeline.start(pair, [1, 2])
    same(state.select([1]), pipeline.start(pair[1], [2]))
    same(pipeline.start(pair[0], [4, 4]), pipeline.start(pair[0], [4]).repeat(2))


class CumulativeModel:
    """World model that predicts the cumulative sums of the actions of a chunk."""

    max_chunk = 4

    def __init__(self):
        self.lengths = []

    def advance(self, state, actions):
        self.lengths.append((state.latents.shape[2], actions.shape[1]))
        future = actions[:, None, :, None, :].cumsum(2)
        return state.append(future, num_history_frames=2), future


def test_roll_stops_at_last_action():
    model, actions = CumulativeModel(), torch.randn(2, 7, 3)
    state = RolloutState.first(torch.zeros(2, 1, 1, 1, 3), [0, 1])
    future = torch.cat([latents for _, latents in roll(model, state, actions, 3)], dim=2)
    assert model.lengths == [(1, 3), (2, 3), (2, 1)]
    torch.testing.assert_close(future[:, 0, 6, 0], actions[:, 6])


@pytest.mark.parametrize("name", ["Frame-Ada", "Video-Ada"])
def test_rows_in_parts_equal_rows_together(name, frames, plans, monkeypatch):
    pipeline = pipeline_of(name)
    state, sizes = pipeline.start(frames, [5, 3, 8]), []
    pipeline.transformer.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    together = latents_of(pipeline, state, plans)
    assert set(sizes) == {3}
    sizes.clear()
    monkeypatch.setattr("irasim_diffusers.pipelines.pipeline_irasim.CPU_ROWS", 2)
    torch.testing.assert_close(latents_of(pipeline, state, plans), together, rtol=1e-4, atol=1e-5)
    assert set(sizes) == {1, 2}


def test_given_latents_are_the_noise_of_the_whole_rollout(pipeline, frames, plans):
    """A network that predicts zero leaves the noise."""
    for parameter in pipeline.transformer.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    noise = torch.randn(3, 4, 7, 4, 6)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    latents = latents_of(pipeline, pipeline.start(frames, [5, 3, 8]), plans, 2, latents=noise)
    ratio = latents / noise
    torch.testing.assert_close(ratio, ratio[:1, :1, :1, :1, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)


BAD = [
    (lambda pipe, state, plans: roll(pipe, state, plans, 0), r"`chunk_length` must be in \[1, 3\] .* got 0"),
    (lambda pipe, state, plans: roll(pipe, state, plans, 4), r"`chunk_length` must be in \[1, 3\] .* got 4"),
    (lambda pipe, state, plans: roll(pipe, state, plans[:2]), "`actions` must be .* each of the 3 rows"),
    (lambda pipe, state, plans: pipe.advance(state, plans), r"`actions` must be \(3, n, 3\) with n in \[1, 3\], got"),
    (lambda pipe, state, plans: pipe.advance(state, plans[:2, :1]), r"`actions` must be \(3, n, 3\)"),
    (lambda pipe, state, plans: pipe.advance(state, plans[0, 0]), r"`actions` must be \(3, n, 3\)"),
    (lambda pipe, state, plans: pipe.advance(state, plans[0]), r"`actions` must be \(3, n, 3\)"),
    (lambda pipe, state, plans: pipe.start(torch.rand(3, 8, 12), []), "`seeds` must be at least one"),
    (lambda pipe, state, plans: pipe.start(torch.rand(3, 8, 12), [-1]), "`seeds` must be .* non-negative"),
    (lambda pipe, state, plans: pipe.start(torch.rand(2, 1, 3, 8, 12), [1, 2, 3]), "`frames` must be one .* or 3"),
    (lambda pipe, state, plans: state.repeat(0), "`k` must be at least 1, got 0"),
    (lambda pipe, state, plans: state.select([3]), r"`rows` must be .* in \[0, 2\], got \[3\]"),
    (lambda pipe, state, plans: state.select([]), "`rows` must be at least one"),
    (lambda pipe, state, plans: state.put([1, 1], state_of(1, 2)), "`rows` must be 2 distinct rows"),
    (lambda pipe, state, plans: state.put([1], state_of(1, 2)), "`rows` must be 2 distinct rows"),
    (lambda pipe, state, plans: state.put([0], RolloutState.first(torch.zeros(1, 4, 1, 4, 6), [1])), "history frames"),
    (
        lambda pipe, state, plans: RolloutState.first(torch.zeros(1, 4, 1, 4, 6), [1, 2]),
        "`latents` must be .* with B entries",
    ),
]


@pytest.mark.parametrize(("do", "message"), BAD)
def test_bad_input_raises(do, message, pipeline, frames, plans):
    assert isinstance(pipeline, IRASimPipeline)
    with pytest.raises(ValueError, match=message):
        do(pipeline, pipeline.start(frames, [1, 2, 3]), plans)


@pytest.mark.parametrize("steps", [0, -1, 1.5, 1001])
def test_number_of_steps_is_checked(pipeline, frames, plans, steps):
    state = pipeline.start(frames, [0] * len(plans))
    with pytest.raises(ValueError, match="`num_inference_steps` must be an integer of at least 1 and at most 1000"):
        pipeline.advance(state, plans[:, :2], num_inference_steps=steps)
