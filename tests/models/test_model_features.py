"""Features of diffusers models, for every supported architecture."""

import inspect
import json

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import TorchAoConfig
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from tiny_models import ARCHITECTURES, tiny_transformer
from torch.utils._python_dispatch import TorchDispatchMode

from irasim_diffusers import IRASimTransformer3DModel
from irasim_diffusers.models import public_config
from irasim_diffusers.models.transformer_irasim import IRASimAttnProcessor


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def model(request):
    return tiny_transformer(**request.param)


@pytest.fixture
def inputs():
    torch.manual_seed(4)
    return torch.randn(3, 4, 5, 4, 6), torch.tensor([7, 500, 999]), torch.randn(3, 3, 3)


def test_config_round_trips_through_json(model):
    parameters = inspect.signature(IRASimTransformer3DModel.__init__).parameters
    assert all(value.default is not inspect.Parameter.empty for name, value in parameters.items() if name != "self")
    assert all(f"{name}:" in inspect.getdoc(IRASimTransformer3DModel) for name in parameters if name != "self")
    config = json.loads(model.to_json_string())
    again = IRASimTransformer3DModel.from_config(config)
    assert {key: again.config[key] for key in parameters if key != "self"} == {
        key: value for key, value in config.items() if key in parameters
    }
    assert [(name, value.shape) for name, value in again.named_parameters()] == [
        (name, value.shape) for name, value in model.named_parameters()
    ]


def test_every_weight_is_trained(model, inputs):
    """The batch contains clips with and without actions, so that the null action is also trained."""
    mask = torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    output = model(*inputs, action_mask=mask, return_components=model.config.moving_layers > 0)
    predictions = [output.sample] if output.moved is None else [output.moved, output.generated]
    sum(prediction.square().mean() for prediction in predictions).backward()
    untrained = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert untrained == []


def test_gradient_checkpointing_changes_no_gradient(model, inputs):
    model.train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        calls: list[int] = []
        hook = model.transformer_blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(*inputs).sample.square().mean().backward()
        hook.remove()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash", "flex"])
def test_attention_backends_agree(model, inputs, backend):
    model.requires_grad_(False)
    expected = model(*inputs).sample
    with attention_backend(backend):
        torch.testing.assert_close(model(*inputs).sample, expected, rtol=1e-4, atol=1e-5)


def test_attention_backend_can_be_set(model, inputs):
    processor = model.transformer_blocks[0].attn1.processor
    expected = model(*inputs).sample
    with attention_backend("native"):  # restores the process-wide setting; `reset_attention_backend` does not
        model.set_attention_backend("_native_math")
        assert processor._attention_backend == "_native_math"
        torch.testing.assert_close(model(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
        model.reset_attention_backend()
    assert processor._attention_backend is None
    assert torch.equal(model(*inputs).sample, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math"])
def test_attention_backends_agree_on_cuda(model, backend):
    torch.manual_seed(4)
    model.to("cuda", torch.bfloat16).requires_grad_(False)
    inputs = (
        torch.randn(3, 4, 5, 4, 6).to(model.device, model.dtype),
        torch.ones(3).cuda(),
        torch.randn(3, 3, 3).cuda(),
    )
    with attention_backend("_native_math"):
        expected = model(*inputs).sample
    with attention_backend(backend):
        torch.testing.assert_close(model(*inputs).sample, expected, rtol=5e-2, atol=5e-2)


def test_attention_processor_can_be_replaced(model, inputs):
    shapes = []

    class Recording(IRASimAttnProcessor):
        def __call__(self, attn, hidden_states, image_rotary_emb=None):
            shapes.append(tuple(hidden_states.shape))
            return super().__call__(attn, hidden_states, image_rotary_emb)

    expected = model(*inputs).sample
    model.set_attn_processor(Recording())
    assert len(model.attn_processors) == 4
    assert torch.equal(model(*inputs).sample, expected)
    assert shapes == [(15, 6, 24), (18, 5, 24)] * 2  # spatial attention, then temporal attention


def test_fused_projections_agree(model, inputs):
    expected = model(*inputs).sample
    model.fuse_qkv_projections()
    assert model.transformer_blocks[0].attn1.to_qkv.weight.shape == (72, 24)
    torch.testing.assert_close(model(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(model(*inputs).sample, expected)


def test_regional_compilation_without_graph_breaks(model, inputs):
    expected = model(*inputs).sample
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
        hidden_states, timestep, actions = inputs
        with torch.compiler.set_stance("fail_on_recompile"):
            model(hidden_states + 1, timestep - 1, actions - 1)


def test_compilation_of_the_whole_model_without_graph_breaks(model, inputs):
    expected = model(*inputs).sample
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
        hidden_states, timestep, actions = inputs
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(hidden_states + 1, timestep - 1, actions - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_with_few_frames_agrees(dtype, inputs):
    """On a CPU, compiled models use `short_attention` for windows of few frames; other models do not."""
    model = tiny_transformer(**ARCHITECTURES["Push-T"]).to(dtype)
    hidden_states, timestep, actions = inputs
    window = (hidden_states[:, :, 2:].to(dtype), timestep, actions[:, 2:])
    expected = model(*window).sample
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        torch.testing.assert_close(compiled(*window).sample, expected, rtol=tolerance, atol=tolerance)


class DoubleOperations(TorchDispatchMode):
    """Count operations in float64, which only position tables use."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        self.number += torch.is_tensor(output) and output.dtype == torch.float64
        return output


def test_tables_are_cached_per_size(model, inputs):
    _, timestep, actions = inputs
    numbers = []
    for size in (6, 6, 8, 6):
        with DoubleOperations() as operations:
            model(torch.zeros(3, 4, 5, 4, size), timestep, actions)
        numbers.append(operations.number)
    assert numbers[0] > 0
    assert numbers[2] > 0
    assert numbers[1] == numbers[3] == 0
    expected = model(*inputs).sample
    model.register_to_config(action_scale=3.0)
    assert not torch.equal(model(*inputs).sample, expected)


def test_tables_cached_in_inference_mode_allow_training(model, inputs):
    with torch.inference_mode():
        model(*inputs)
    model.train()(*inputs).sample.mean().backward()
    assert model.patch_embed.proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("model", [{}, ARCHITECTURES["Open-Sora"]], ids=["sincos", "rope"], indirect=True)
def test_regional_compilation_supports_every_size(model, inputs):
    _, timestep, actions = inputs
    torch._dynamo.reset()
    sizes = [(4, 14), (6, 10), (8, 4)]
    windows = [torch.randn(3, 4, 5, *size) for size in sizes]
    expected = [model(window, timestep, actions).sample for window in windows]
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for number, window in enumerate(windows):
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                sample = model(window, timestep, actions).sample
            torch.testing.assert_close(sample, expected[number], rtol=1e-4, atol=1e-5)


def test_disk_offload(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.nbytes for parameter in model.parameters())
    split = IRASimTransformer3DModel.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": size * 3 // 5},
        offload_folder=tmp_path / "offload",
    )
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    blocks = [name for name in split.hf_device_map if "blocks." in name]
    assert all(len(name.split(".")) == 2 for name in blocks), "no block is split"
    assert not any(name.startswith("layers_out.") for name in split.hf_device_map)
    for actions in (inputs[2], None)[: 1 if model.config.moving_layers else 2]:  # moving layers require actions
        arguments = (*inputs[:2], actions)
        torch.testing.assert_close(split(*arguments).sample, model(*arguments).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(model, inputs, tmp_path, kind, on_disk):
    model.requires_grad_(False)
    expected = model(*inputs).sample
    model.enable_group_offload(
        torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
        offload_to_disk_path=str(tmp_path) if on_disk else None,
    )
    for _ in range(2):
        torch.testing.assert_close(model(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    assert bool(list(tmp_path.rglob("*.safetensors"))) == on_disk


def test_int8_weights(model, inputs, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model.save_pretrained(tmp_path)
    quantized = IRASimTransformer3DModel.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )
    expected = model(*inputs).sample
    error = (quantized(*inputs).sample - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.05


@pytest.mark.gpu
def test_model_parallelism(model, inputs):
    expected = model(*inputs).sample
    last = [model.transformer_blocks[1], model.temporal_transformer_blocks[1], model.norm_out, model.proj_out]
    last += [model.layers_out] if model.config.moving_layers else []
    for part in [*last, *([model.ada_norm_out] if hasattr(model, "ada_norm_out") else [])]:
        add_hook_to_module(part.to("cuda"), AlignDevicesHook("cuda"))
    sample = model(*inputs).sample
    assert sample.device.type == "cuda"
    torch.testing.assert_close(sample.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_adapter_round_trip_and_hotswap(model, inputs, tmp_path):
    expected = []
    for number in range(2):
        adapted = IRASimTransformer3DModel.from_config(model.config)
        adapted.load_state_dict(model.state_dict())
        adapted.add_adapter(LoraConfig(r=2 + number, lora_alpha=3, target_modules=["to_q", "ff.net.2"]))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_lora_adapter(tmp_path / str(number))
        expected.append(adapted(*inputs).sample)
    model.enable_lora_hotswap(target_rank=3)
    for number, swap in enumerate((False, True)):
        model.load_lora_adapter(
            tmp_path / str(number), prefix=None, use_safetensors=True, adapter_name="robot", hotswap=swap
        )
        torch.testing.assert_close(model(*inputs).sample, expected[number], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*expected)
    silent = model(*inputs, attention_kwargs={"scale": 0.0}).sample
    model.disable_lora()
    torch.testing.assert_close(silent, model(*inputs).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, inputs, dtype):
    expected = model(*inputs).sample
    model.to(dtype)
    hidden_states, timestep, actions = inputs
    sample = model(hidden_states.to(dtype), timestep, actions).sample
    assert sample.dtype == dtype
    error = (sample.float() - expected).square().mean().sqrt() / expected.std()
    assert error < (0.02 if dtype == torch.bfloat16 else 0.003)


def test_layerwise_casting(model, inputs):
    expected = model(*inputs).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].ff.net[2].weight.dtype == torch.float8_e4m3fn
    assert model.patch_embed.proj.weight.dtype == torch.float32
    sample = model(*inputs).sample
    error = (sample - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.1


def test_loading_in_half_precision(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, variant="fp32")
    loaded = IRASimTransformer3DModel.from_pretrained(tmp_path, variant="fp32", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = model(*inputs).sample
    sample = loaded(inputs[0].bfloat16(), *inputs[1:]).sample
    assert (sample.float() - expected).square().mean().sqrt() < 0.02 * expected.std()


@pytest.mark.parametrize("max_shard_size", ["10GB", "50KB"])
def test_saving_and_loading_changes_nothing(model, inputs, tmp_path, max_shard_size):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file() == (max_shard_size == "50KB")
    loaded = IRASimTransformer3DModel.from_pretrained(tmp_path)
    assert public_config(loaded.config) == public_config(model.config)
    assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)


def test_return_dict_false_returns_a_tuple(model, inputs):
    sample, *memory = model(*inputs, return_dict=False)
    assert torch.equal(sample, model(*inputs).sample)
    assert len(memory) == (1 if getattr(model.config, "moving_layers", 0) else 0)
