import numpy as np
import pytest
import torch
from test_pipeline_irasim import leading, run, seeded
from tiny_models import tiny_pipeline


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
    assert len(list(stream)) == 1, "predicted frames are returned, and no further action is requested"


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
        assert pipeline.vae._hf_hook is not during, "the next call needs its hooks"


def test_stream_requests_actions_lazily(pipeline, frames, actions):
    asked, seen = [], []

    def policy():
        while True:  # never ends; sees the frames that follow its actions
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
    with pytest.raises(ValueError, match="must contain 2 history frames for this checkpoint, got 3: pass the last 2"):
        run(pipeline, np.zeros((3, 8, 12, 3)), actions)
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
