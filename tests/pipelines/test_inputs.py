import numpy as np
import PIL.Image
import pytest
import torch
from test_pipeline_irasim import run, seeded
from tiny_models import tiny_pipeline


def test_every_form_of_frames_gives_the_same_video(pipeline, frames):
    images = [PIL.Image.fromarray(frame) for frame in frames]
    channels_first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    forms = [
        images,
        [images],
        frames,
        frames[None],
        [frames],
        list(frames),
        frames / 255.0,
        channels_first,
        channels_first.float() / 255,
        channels_first[None],
    ]
    expected = pipeline.preprocess_frames(frames)
    assert expected.shape == (1, 2, 3, 8, 12)
    for form in forms:
        torch.testing.assert_close(pipeline.preprocess_frames(form), expected)
    single = pipeline.preprocess_frames(images[0])
    torch.testing.assert_close(single, expected[:, :1])


def test_resize(pipeline, frames, actions):
    large = frames.repeat(3, axis=1).repeat(2, axis=2)
    assert run(pipeline, large, actions[:1], resize=True).shape == (1, 1, 3, 8, 12)


RGBA = PIL.Image.new("RGBA", (12, 8))
GRAY = PIL.Image.new("L", (12, 8))
BAD_INPUTS = [
    ({"actions": np.zeros((3, 2))}, r"`actions` must be \(n, 3\) or .* got \(3, 2\)"),
    ({"actions": np.zeros(3)}, r"`actions` must be .* got \(3,\)"),
    ({"actions": np.zeros((0, 3))}, "nothing to predict"),
    ({"actions": np.zeros((3, 0))}, r"got \(3, 0\): pass one row of 3 components"),
    ({"actions": [[0, 0, 0], [0, 0]]}, "`actions` must be .* of equal length"),
    ({"actions": np.array([[0, np.nan, 0]])}, r"`actions` must be finite, got nan at index \(0, 1\)"),
    ({"actions": np.array([[0, 0, np.inf]])}, "`actions` must be finite, got inf"),
    ({"actions": np.zeros((2, 3, 3)), "frames": np.zeros((3, 1, 8, 12, 3))}, "3 histories and 2 action sequences"),
    ({"frames": []}, "`frames` must contain at least one frame"),
    ({"frames": np.zeros((0, 8, 12, 3))}, "`frames` must be at least one RGB image"),
    ({"frames": np.zeros((3, 8, 12, 3))}, "1 to 2 history frames for this checkpoint, got 3"),
    ({"frames": np.zeros((1, 16, 12, 3))}, r"must be 8x12 .* got 16x12: pass resize=True \(--resize"),
    ({"frames": RGBA}, "must be RGB, got an image of mode RGBA"),
    ({"frames": GRAY}, "must be RGB, got an image of mode L"),
    ({"frames": np.zeros((8, 12, 4))}, "must be at least one RGB image"),
    ({"frames": np.zeros((8, 12))}, "must be .*H, W, 3"),
    ({"frames": np.full((8, 12, 3), 255.0)}, r"floats in \[0, 1\], got floats in \[255, 255\]"),
    ({"frames": np.full((8, 12, 3), np.nan)}, "floats in"),
    ({"frames": np.zeros((8, 12, 3), dtype=np.int64)}, "must be uint8, or floats"),
    ({"frames": "picture.png"}, "PIL images, arrays or tensors, got str"),
    ({"frames": [np.zeros((8, 12, 3)), np.zeros((8, 14, 3))]}, "all of one size"),
    ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer of at least 1 and at most 1000, .* got 0"),
    ({"num_videos_per_trajectory": 0}, "at least 1"),
    ({"num_inference_steps": 2.5}, "`num_inference_steps` must be an integer of at least 1 .* got 2.5"),
    ({"num_inference_steps": 1001}, "at most 1000, the timesteps in training, got 1001"),
    ({"num_inference_steps": True}, "`num_inference_steps` must be an integer .* got True"),
    ({"decode_chunk_size": 0}, "`decode_chunk_size` must be an integer of at least 1, got 0"),
    ({"guidance_scale": float("nan")}, "`guidance_scale` must be finite, got nan"),
    ({"eta": -0.5}, r"`eta` must be in \[0, 1\], got -0.5"),
    ({"generator": 3}, "`generator` must be a torch.Generator or a list of generators, got int: use"),
    ({"latents": np.zeros((1, 4, 3, 4, 6))}, "`latents` must be a tensor"),
    ({"latents": torch.full((1, 4, 3, 4, 6), torch.nan)}, "`latents` must be finite"),
    ({"generator": seeded(1, 2)}, "list of 1, got a list of 2"),
    ({"latents": torch.zeros(1, 4, 2, 4, 6)}, "`latents` must be"),
    ({"output_type": "latents"}, "pil, np, pt or latent, got 'latents'"),
    ({"callback_on_step_end_tensor_inputs": ["actions"]}, r"among \['latents'\], got \['actions'\]"),
    ({"chunk_length": 0}, r"`chunk_length` must be an integer in \[1, 3\] for this checkpoint, got 0"),
    ({"chunk_length": 4}, r"must be an integer in \[1, 3\]"),
    ({"timesteps": [10, 5]}, "must be supported by `set_timesteps` of the scheduler"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
def test_bad_input_raises_before_any_work(pipeline, frames, actions, change, message):
    pipeline.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the network was evaluated"))
    pipeline.vae.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the history was encoded"))
    with pytest.raises(ValueError, match=message):
        run(pipeline, **{"frames": frames, "actions": actions[:3]} | change)


RATES = {"use_fps": True, "prediction_type": "flow_prediction", "norm_type": "ada_norm_single"}


def test_fps_of_one_call(frames, actions):
    pipeline = tiny_pipeline(**RATES, fps=3.0)
    plain, slow, fast = (
        run(pipeline, frames, actions[:3], generator=seeded(1), **kwargs) for kwargs in ({}, {"fps": 3}, {"fps": 24.0})
    )
    torch.testing.assert_close(plain, slow)
    assert not torch.allclose(plain, fast, atol=1e-3)
    torch.testing.assert_close(
        pipeline(frames, actions[:3], num_inference_steps=3, generator=seeded(1), fps=24.0, output_type="pt").frames,
        fast,
    )
    kwargs = {"num_inference_steps": 3, "output_type": "pt", "fps": 24.0}
    streamed = list(pipeline.stream(frames, actions[:3], 3, generator=seeded(1)[0], **kwargs))
    torch.testing.assert_close(torch.stack(streamed)[None], fast)
    unknown = tiny_pipeline(**RATES)
    torch.testing.assert_close(run(unknown, frames, actions[:3], generator=seeded(1), fps=24.0), fast)


@pytest.mark.parametrize(
    ("config", "fps", "message"),
    [
        ({}, 10.0, "`fps` must be None for this checkpoint, which does not embed frames per second, got 10.0"),
        (RATES, None, "`fps` must be positive and finite, got None: .* Pass `fps`"),
        (RATES, 0.0, "`fps` must be positive and finite, got 0.0"),
        (RATES, float("nan"), "`fps` must be positive and finite, got nan"),
    ],
)
def test_bad_fps(config, fps, message, frames, actions):
    pipeline = tiny_pipeline(**config)
    with pytest.raises(ValueError, match=message):
        run(pipeline, frames, actions, fps=fps)
    with pytest.raises(ValueError, match=message):
        pipeline.stream(frames, actions, 2, num_inference_steps=1, fps=fps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_actions_can_be_tensors(pipeline, frames, actions, dtype):
    """A policy returns tensors of its own type, which require gradients by default."""
    tensors = [torch.tensor(action, dtype=dtype, requires_grad=True) for action in actions[:4]]
    rounded = torch.stack(tensors).detach().float().numpy()
    expected = list(pipeline.stream(frames, rounded, 2, 1, generator=seeded(4)[0], output_type="pt"))
    streamed = list(pipeline.stream(frames, iter(tensors), 2, 1, generator=seeded(4)[0], output_type="pt"))
    torch.testing.assert_close(torch.stack(streamed), torch.stack(expected))
    called = run(pipeline, frames, tensors, generator=seeded(4))
    torch.testing.assert_close(called, run(pipeline, frames, rounded, generator=seeded(4)))


@pytest.mark.gpu
def test_actions_can_be_tensors_on_cuda(pipeline, frames, actions):
    pipeline.to("cuda")
    tensors = [torch.tensor(action).cuda() for action in actions[:4]]
    assert len(list(pipeline.stream(frames, iter(tensors), 2, 1))) == 4
