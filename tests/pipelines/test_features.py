"""Features that diffusers offers for every pipeline.

On the embedded model, the tests measure savings and costs. On tiny models, they check every architecture.
"""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PipelineQuantizationConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TorchAoConfig,
)
from peft import LoraConfig, get_peft_model_state_dict
from tiny_models import ARCHITECTURES, tiny_pipeline, without_moving_layers

from irasim_diffusers import IRASimPipeline, IRASimTransformer3DModel, embedded_checkpoint
from irasim_diffusers.data import read_video

FRAMES = read_video(embedded_checkpoint() / "example.mp4")
ACTIONS = np.loadtxt(embedded_checkpoint() / "example_actions.csv", delimiter=",", skiprows=1, dtype=np.float32)
WINDOW = 2


def load(**kwargs) -> IRASimPipeline:
    pipeline = IRASimPipeline.from_pretrained(embedded_checkpoint(), **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(num_inference_steps=2)  # with a single step, many schedulers give the same video
    return pipeline


def generate(pipeline, num_actions=WINDOW, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(FRAMES[:2], ACTIONS[1:][:num_actions], generator=generator, output_type="pt", **kwargs).frames


def psnr(video: torch.Tensor, other: torch.Tensor) -> float:
    return float(-10 * torch.log10((video.float() - other.float()).square().mean()))


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of the tensors in a module's parameters, including those inside quantized ones."""

    def size(tensor: torch.Tensor) -> int:
        names = getattr(tensor, "tensor_data_names", None)
        return sum(size(getattr(tensor, name)) for name in names) if names else tensor.nbytes

    return sum(size(parameter) for parameter in module.parameters())


@pytest.fixture(scope="module")
def plain():
    return load()


@pytest.fixture(scope="module")
def video(plain):
    return generate(plain)


@pytest.fixture(scope="module")
def truth():
    return torch.from_numpy(FRAMES[2 : 2 + WINDOW]).permute(0, 3, 1, 2)[None] / 255


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_bfloat16_costs_at_most_a_tenth_of_a_decibel(video, truth):
    halved = load(dtype=torch.bfloat16)
    assert halved.transformer.dtype == torch.bfloat16
    assert abs(psnr(generate(halved), truth) - psnr(video, truth)) < 0.1


def test_float16_with_the_vae_in_float32(pipeline, frames, actions, tmp_path):
    expected = predict(pipeline, frames, actions)
    pipeline.save_pretrained(tmp_path)
    halved = IRASimPipeline.from_pretrained(tmp_path, dtype={"default": torch.float16, "vae": torch.float32})
    assert (halved.transformer.dtype, halved.vae.dtype) == (torch.float16, torch.float32)
    assert psnr(predict(halved, frames, actions), expected) > 30


def test_int8_weights_take_less_memory(plain, video, truth):
    quantization = pytest.importorskip("torchao.quantization")
    config = PipelineQuantizationConfig(
        quant_mapping={"transformer": TorchAoConfig(quantization.Int8WeightOnlyConfig())}
    )
    quantized = load(quantization_config=config)
    assert weight_bytes(quantized.transformer) < 0.3 * weight_bytes(plain.transformer)
    prediction = generate(quantized)
    assert not torch.equal(prediction, video)
    assert abs(psnr(prediction, truth) - psnr(video, truth)) < 0.5  # moving layers amplify the rounding in their masks


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_float16_overflow_of_the_vae_raises(part, pipeline, frames, actions):
    pipeline.to(dtype=torch.float16)
    calls = count_calls(pipeline.transformer)
    with torch.no_grad():
        getattr(pipeline.vae, part).conv_in.weight.mul_(1e6)
    with pytest.raises(ValueError, match="overflows in float16"):
        predict(pipeline, frames, actions)
    assert bool(calls) == (part == "decoder"), "the history is encoded before anything is sampled"


@pytest.mark.gpu
def test_4_bit_weights_on_cuda(plain, video, truth):
    pytest.importorskip("bitsandbytes")
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True},
        components_to_quantize=["transformer"],
    )
    quantized = load(quantization_config=config).to("cuda")
    assert weight_bytes(quantized.transformer) < 0.3 * weight_bytes(plain.transformer)
    assert abs(psnr(generate(quantized).cpu(), truth) - psnr(video, truth)) < 1.0


def test_layerwise_casting_stores_weights_in_8_bits(plain, video):
    pipeline = load()
    pipeline.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=pipeline.transformer.dtype
    )
    stored = {name for name, parameter in pipeline.transformer.named_parameters() if parameter.itemsize == 1}
    assert "transformer_blocks.0.attn1.to_q.weight" in stored
    assert not any("time_embed" in name or "action_embed" in name or "ada_norm" in name for name in stored)
    assert weight_bytes(pipeline.transformer) < 0.6 * weight_bytes(plain.transformer)
    assert 25 < psnr(generate(pipeline), video) < float("inf")


@pytest.mark.parametrize(
    "kind", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
def test_group_offload_changes_no_video(kind, video):
    pipeline = load()
    pipeline.transformer.enable_group_offload(onload_device=torch.device("cpu"), **kind)
    torch.testing.assert_close(generate(pipeline), video)
    pipeline = load()
    pipeline.enable_group_offload(onload_device=torch.device("cpu"), **kind)
    torch.testing.assert_close(generate(pipeline), video)


def test_from_pipe_shares_components(plain, video):
    pipeline = IRASimPipeline.from_pipe(plain, scheduler=diffusers.DDPMScheduler.from_config(plain.scheduler.config))
    assert pipeline.transformer is plain.transformer
    assert pipeline.config.num_inference_steps == plain.config.num_inference_steps
    assert psnr(generate(pipeline), video) < float("inf")
    torch.testing.assert_close(generate(IRASimPipeline.from_pipe(plain)), video)


@pytest.mark.gpu
def test_offloaded_stream_leaves_weights_on_the_cpu():
    pipeline = load()
    pipeline.enable_model_cpu_offload()
    stream = pipeline.stream(FRAMES[:2], ACTIONS[1:])
    next(stream)
    stream.close()
    assert {parameter.device.type for parameter in pipeline.transformer.parameters()} == {"cpu"}


@pytest.mark.gpu
def test_given_noise_is_extended_by_a_generator_on_cuda():
    pipeline = load().to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    latents = torch.randn(1, 3, WINDOW + 3, 96, 96)
    kwargs = {"latents": latents, "output_type": "latent"}
    assert pipeline(FRAMES[:2], ACTIONS[1 : WINDOW + 4], generator=generator, **kwargs).frames.shape == latents.shape


@pytest.mark.gpu
def test_group_offload_keeps_weights_on_the_cpu_between_calls(video):
    pipeline = load()
    pipeline.transformer.enable_group_offload(
        onload_device=torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1
    )
    assert psnr(generate(pipeline).cpu(), video) > 40
    assert {parameter.device.type for parameter in pipeline.transformer.transformer_blocks.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_leaves_weights_on_the_cpu_between_calls(method, video):
    pipeline = load()
    getattr(pipeline, method)()
    assert psnr(generate(pipeline).cpu(), video) > 40
    assert {parameter.device.type for parameter in pipeline.transformer.parameters()} <= {"cpu", "meta"}


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map_of_a_pipeline(device_map, video):
    torch.testing.assert_close(generate(load(device_map=device_map)).cpu(), video, atol=1e-3, rtol=0)


def test_device_map_of_the_transformer(video):
    transformer = IRASimTransformer3DModel.from_pretrained(
        embedded_checkpoint(), subfolder="transformer", device_map="auto"
    )
    assert transformer.hf_device_map
    if not torch.cuda.is_available():
        torch.testing.assert_close(generate(load(transformer=transformer)), video)


def test_regional_compilation_has_no_graph_break_and_compiles_once(plain, video):
    pipeline = load()
    torch._dynamo.reset()
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(generate(pipeline, num_inference_steps=1).shape, video.shape)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = generate(pipeline)
    assert psnr(compiled, video) > 60


def test_first_block_cache_skips_blocks_within_a_window_only():
    pipeline = without_moving_layers(load())
    expected = generate(pipeline, 2 * WINDOW, num_inference_steps=16)
    calls = count_calls(pipeline.transformer.transformer_blocks[1].ff)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    torch.testing.assert_close(generate(pipeline, 2 * WINDOW, num_inference_steps=16), expected)
    assert len(calls) == 32

    pipeline.transformer.disable_cache()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    calls.clear()
    generate(pipeline, 2 * WINDOW, num_inference_steps=16)
    assert len(calls) == 2  # the first step of each of the two windows

    pipeline.transformer.disable_cache()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    calls.clear()
    cached = generate(pipeline, WINDOW, num_inference_steps=16)
    assert 1 < len(calls) < 16
    assert psnr(cached, expected[:, :WINDOW]) > 25


def test_pyramid_attention_broadcast_skips_attention(plain):
    expected = generate(plain, num_inference_steps=8)
    pipeline = load()
    calls = count_calls(pipeline.transformer.temporal_transformer_blocks[1].attn1.to_q)
    pipeline.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            temporal_attention_block_skip_range=2,
            temporal_attention_timestep_skip_range=(0, 700),
            current_timestep_callback=lambda: pipeline.current_timestep,
        )
    )
    broadcast = generate(pipeline, num_inference_steps=8)
    pipeline.scheduler.set_timesteps(8)
    skippable = sum(0 < timestep < 700 for timestep in pipeline.scheduler.timesteps)
    assert 8 - skippable <= len(calls) <= 8 - skippable // 2
    assert 25 < psnr(broadcast, expected) < float("inf")


@pytest.mark.parametrize(
    ("make", "computed"),
    [
        (lambda pipe: without_moving_layers(pipe) and MagCacheConfig(mag_ratios=[1.0] * 16, num_inference_steps=16), 6),
        (lambda _: TaylorSeerCacheConfig(cache_interval=2, cache_identifiers=[r"^(temporal_)?transformer_blocks.*attn1$"]), 9),
        (
            lambda pipeline: FasterCacheConfig(
                temporal_attention_block_skip_range=2,
                current_timestep_callback=lambda: pipeline.current_timestep,
                is_guidance_distilled=True,
            ),
            11,
        ),
    ],
    ids=["MagCache", "TaylorSeer", "FasterCache"],
)  # fmt: skip
def test_other_caches_skip_attention_in_every_window(make, computed):
    config = make(pipeline := load())  # MagCache does not support moving layers
    expected = generate(pipeline, 2 * WINDOW, num_inference_steps=16)
    calls = count_calls(pipeline.transformer.temporal_transformer_blocks[1].attn1.to_q)
    pipeline.transformer.enable_cache(config)
    cached = generate(pipeline, 2 * WINDOW, num_inference_steps=16)
    assert len(calls) == 2 * computed
    assert 30 < psnr(cached, expected) < float("inf")


@pytest.mark.parametrize("kind", [PyramidAttentionBroadcastConfig, FasterCacheConfig])
def test_single_state_caches_with_guidance_raise(kind):
    pipeline = load()
    config = kind(temporal_attention_block_skip_range=2, current_timestep_callback=lambda: pipeline.current_timestep)
    pipeline.transformer.enable_cache(config)
    with pytest.raises(ValueError, match=f"`guidance_scale` must be at most 1 with {kind.__name__}, got 2.0"):
        generate(pipeline, guidance_scale=2.0)
    if kind is FasterCacheConfig:
        with pytest.raises(ValueError, match="`FasterCacheConfig` must have is_guidance_distilled=True"):
            generate(pipeline)


def test_guidance_has_its_own_cache_state():
    """Guidance evaluates the network with and without actions; a common cache would remove the difference."""
    pipeline = without_moving_layers(load())
    expected, unguided = (generate(pipeline, guidance_scale=scale, num_inference_steps=16) for scale in (3.0, 1.0))
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    calls = count_calls(pipeline.transformer.transformer_blocks[1].ff)
    cached = generate(pipeline, guidance_scale=3.0, num_inference_steps=16)
    assert len(calls) < 32
    assert psnr(cached, expected) > psnr(unguided, expected)


def test_vae_slicing_and_tiling(pipeline, frames, actions):
    video = predict(pipeline, frames, actions)
    calls = count_calls(pipeline.vae.decoder)
    pipeline.vae.enable_slicing()
    torch.testing.assert_close(predict(pipeline, frames, actions), video, atol=1e-4, rtol=0)
    assert len(calls) == len(actions)
    pipeline.vae.disable_slicing()
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 8, 4
    calls.clear()
    tiled = predict(pipeline, frames, actions)
    assert len(calls) > 1
    assert tiled.shape == video.shape
    assert psnr(tiled, video) > 15


def test_tiny_autoencoder_replaces_the_vae(pipeline, frames, actions):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 2,
        decoder_block_out_channels=(8,) * 2,
        num_encoder_blocks=(1,) * 2,
        num_decoder_blocks=(1,) * 2,
    ).eval()
    pipeline = IRASimPipeline(vae, pipeline.transformer, pipeline.scheduler)
    assert predict(pipeline, frames, actions).shape == (1, len(actions), 3, 8, 12)
    history = pipeline.encode_history(pipeline.preprocess_frames(frames)).detach()
    expected = vae.encode(torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1).latents
    torch.testing.assert_close(history[0].transpose(0, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def tiny(request):
    """A tiny pipeline with a sampler that takes exactly the requested number of steps."""
    pipeline = tiny_pipeline(**request.param)
    if pipeline.transformer.config.prediction_type != "flow_prediction":
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def predict(pipeline, frames, actions, **kwargs) -> torch.Tensor:
    kwargs = {"num_inference_steps": 2, "output_type": "pt"} | kwargs
    return pipeline(frames, actions, generator=torch.Generator().manual_seed(0), **kwargs).frames


def test_saved_pipeline_is_unchanged(tiny, frames, actions, tmp_path):
    expected = predict(tiny, frames, actions)
    tiny.save_pretrained(tmp_path)
    loaded = IRASimPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is type(tiny.scheduler)
    atol = 1e-5 if tiny.transformer.config.moving_layers else 1e-6  # the layer multiplies mask logits by 16
    torch.testing.assert_close(predict(loaded, frames, actions), expected, rtol=0, atol=atol)


def test_trajectory_is_the_same_alone_and_in_a_batch(tiny, frames, actions):
    batch = np.stack([actions, actions[::-1], actions * 2])
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    kwargs = {"num_inference_steps": 2, "output_type": "pt"}
    together = tiny(frames, batch, generator=generators, **kwargs).frames
    alone = tiny(frames, batch[2], generator=torch.Generator().manual_seed(7), **kwargs).frames
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[2])


def test_half_precision_is_close(tiny, frames, actions):
    expected = predict(tiny, frames, actions)
    tiny.to(torch.bfloat16)
    assert tiny.transformer.dtype == tiny.vae.dtype == torch.bfloat16
    assert psnr(predict(tiny, frames, actions), expected) > 25


CACHES = {
    "first block": lambda _: FirstBlockCacheConfig(threshold=1e9),
    "broadcast": lambda pipeline: PyramidAttentionBroadcastConfig(
        spatial_attention_block_identifiers=("^transformer_blocks",),
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipeline.current_timestep,
    ),
    "faster": lambda pipeline: FasterCacheConfig(
        spatial_attention_block_identifiers=("^transformer_blocks",),
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: pipeline.current_timestep,
        is_guidance_distilled=True,
    ),
    "mag": lambda _: MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=8),
    "taylor": lambda _: TaylorSeerCacheConfig(
        cache_interval=2, cache_identifiers=[r"^(temporal_)?transformer_blocks.*attn1$"]
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_skip_attention_of_every_architecture(tiny, frames, actions, name):
    if tiny.transformer.config.moving_layers and name in ("first block", "mag"):
        pytest.skip("rejected, see tests/models/test_moving_layers.py")
    expected = predict(tiny, frames, actions, num_inference_steps=8)
    calls = count_calls(tiny.transformer.transformer_blocks[1].attn1.to_q)
    tiny.transformer.enable_cache(CACHES[name](tiny))
    cached = predict(tiny, frames, actions, num_inference_steps=8)
    assert len(calls) in range(3, 24, 3), "as many evaluations in each of three windows, at most seven of eight"
    assert torch.isfinite(cached).all()
    assert not torch.equal(cached, expected)
    tiny.transformer.disable_cache()
    torch.testing.assert_close(predict(tiny, frames, actions, num_inference_steps=8), expected)


def test_cache_without_skips_changes_nothing(tiny, frames, actions):
    if tiny.transformer.config.moving_layers:
        pytest.skip("rejected, see tests/models/test_moving_layers.py")
    expected = predict(tiny, frames, actions, guidance_scale=2.0)
    tiny.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    torch.testing.assert_close(predict(tiny, frames, actions, guidance_scale=2.0), expected)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_of_every_architecture(tiny, frames, actions, kind):
    expected = predict(tiny, frames, actions)
    number = 1 if kind == "block_level" else None
    tiny.enable_group_offload(torch.device("cpu"), offload_type=kind, num_blocks_per_group=number)
    torch.testing.assert_close(predict(tiny, frames, actions), expected)


def test_model_offload_of_every_architecture(tiny, frames, actions):
    expected = predict(tiny, frames, actions)
    tiny.enable_model_cpu_offload(device="cpu")
    modules = {name for name, part in tiny.components.items() if isinstance(part, torch.nn.Module)}
    assert set(tiny.model_cpu_offload_seq.split("->")) == modules
    hook = tiny.transformer._hf_hook
    torch.testing.assert_close(predict(tiny, frames, actions), expected)
    assert tiny.transformer._hf_hook is not hook, "the next call needs its hooks"


def test_lora_of_every_architecture(tiny, frames, actions, tmp_path):
    plain = predict(tiny, frames, actions)
    tiny.transformer.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_v", "ff.net.2"]))
    torch.manual_seed(8)
    for name, parameter in tiny.transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    applied = predict(tiny, frames, actions)
    metadata = tiny.transformer.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(tiny.transformer)
    encoder = {
        key.replace(".base_layer.", "."): value
        for key, value in tiny.transformer.state_dict().items()
        if key.startswith(("action_embed.", "trajectory_embed.", "null_action"))
    }
    tiny.save_lora_weights(
        tmp_path, transformer_lora_layers=layers | encoder, transformer_lora_adapter_metadata=metadata
    )
    tiny.unload_lora_weights()
    torch.testing.assert_close(predict(tiny, frames, actions), plain, rtol=1e-4, atol=1e-5)
    tiny.load_lora_weights(tmp_path)
    torch.testing.assert_close(predict(tiny, frames, actions), applied, rtol=1e-4, atol=1e-5)
    tiny.fuse_lora()
    torch.testing.assert_close(predict(tiny, frames, actions), applied, rtol=1e-4, atol=1e-5)
    tiny.unfuse_lora()
    tiny.unload_lora_weights()
    torch.testing.assert_close(predict(tiny, frames, actions), plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(applied, plain)


def test_standard_methods_of_diffusers_exist():
    given = inspect.signature(IRASimPipeline.__call__).parameters
    optional = {"num_inference_steps", "guidance_scale", "generator", "latents", "output_type", "return_dict", "eta"}
    optional |= {"timesteps", "sigmas", "attention_kwargs", "callback_on_step_end"}
    optional |= {"callback_on_step_end_tensor_inputs"}
    assert optional <= given.keys()
    assert all(given[name].default is not inspect.Parameter.empty for name in optional)
    assert given["return_dict"].default is True
    assert given["output_type"].default == "pil"


def test_properties_during_a_call(tiny, frames, actions):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline.current_timestep == timestep
        assert (pipeline.guidance_scale, pipeline.do_classifier_free_guidance) == (2.0, True)
        assert pipeline.attention_kwargs == {"scale": 0.5}
        seen.append(step)
        return {}

    kwargs = {"guidance_scale": 2.0, "attention_kwargs": {"scale": 0.5}, "callback_on_step_end": callback}
    predict(tiny, frames, actions, **kwargs)
    assert seen == list(range(tiny.num_timesteps)) == list(range(6))
    assert tiny.current_timestep is None
    assert not tiny.interrupt
