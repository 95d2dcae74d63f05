import json

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pipeline

from irasim_diffusers import IRASimPipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "action_embed.linear_2"]


def predict(pipeline, frames, actions, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipeline(frames, actions[:3], num_inference_steps=2, generator=generator, output_type="pt", **kwargs).frames


@pytest.fixture
def adapted(frames, actions, tmp_path):
    """A folder of LoRA weights, and the predictions without and with them."""
    pipeline = tiny_pipeline()
    plain = predict(pipeline, frames, actions)
    pipeline.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    torch.manual_seed(8)
    for name, parameter in pipeline.transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=pipeline.transformer.peft_config["default"].to_dict(),
    )
    changed = predict(pipeline, frames, actions)
    assert not torch.allclose(plain, changed)
    return tmp_path, plain, changed


def loaded(folder, **kwargs):
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(folder, **kwargs)
    return pipeline


def test_saved_lora_loads_in_diffusers_format(adapted, frames, actions):
    folder, _, changed = adapted
    keys = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.") for key in keys)
    pipeline = loaded(folder, adapter_name="robot")
    torch.testing.assert_close(predict(pipeline, frames, actions), changed, rtol=1e-4, atol=1e-5)
    assert pipeline.get_active_adapters() == ["robot"]


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_files_with_another_key_prefix_have_the_same_effect(adapted, frames, actions, tmp_path, prefix):
    folder, _, changed = adapted
    file = folder / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    metadata = {key.replace("transformer.", prefix, 1): value for key, value in metadata.items()}
    weights = {key.replace("transformer.", prefix, 1): value for key, value in load_file(file).items()}
    (tmp_path / "other").mkdir()
    stored = {"lora_adapter_metadata": json.dumps(metadata), "format": "pt"}
    save_file(weights, tmp_path / "other" / "adapter.safetensors", stored)
    pipeline = loaded(tmp_path / "other")
    torch.testing.assert_close(predict(pipeline, frames, actions), changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("base_model.model.", "needs the `lora_alpha` of its adapter_config.json"),
        ("unet.", "no modules for"),
    ],
)
def test_files_without_alpha_or_known_modules_raise(adapted, tmp_path, prefix, message):
    weights = load_file(adapted[0] / "pytorch_lora_weights.safetensors")
    (tmp_path / "other").mkdir()
    renamed = {key.replace("transformer.", prefix, 1): value for key, value in weights.items()}
    save_file(renamed, tmp_path / "other" / "adapter.safetensors", {"format": "pt"})
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(tmp_path / "other")
    assert not getattr(pipeline.transformer, "peft_config", {})


def test_adapters_can_be_scaled_and_switched(adapted, frames, actions):
    folder, plain, _ = adapted
    pipeline = loaded(folder, adapter_name="one")
    pipeline.load_lora_weights(folder, adapter_name="two")
    pipeline.set_adapters("one", 0.0)
    torch.testing.assert_close(predict(pipeline, frames, actions), plain, rtol=1e-4, atol=1e-5)
    pipeline.set_adapters(["one", "two"], [0.5, 0.5])
    both = predict(pipeline, frames, actions)
    pipeline.set_adapters("one")
    torch.testing.assert_close(predict(pipeline, frames, actions), both, rtol=1e-4, atol=1e-5)
    silent = predict(pipeline, frames, actions, attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(silent, plain, rtol=1e-4, atol=1e-5)


def test_fusing_keeps_the_output_and_unloading_restores_it(adapted, frames, actions):
    folder, plain, _ = adapted
    pipeline = loaded(folder)
    applied = predict(pipeline, frames, actions)
    pipeline.fuse_lora()
    torch.testing.assert_close(predict(pipeline, frames, actions), applied, rtol=1e-4, atol=1e-5)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(predict(pipeline, frames, actions), plain, rtol=1e-4, atol=1e-5)
    assert not any("lora_" in name for name, _ in pipeline.transformer.named_parameters())


def test_pickles_are_read_only_if_named(adapted, frames, actions):
    folder, _, _ = adapted
    torch.save(load_file(folder / "pytorch_lora_weights.safetensors"), folder / "pytorch_lora_weights.bin")
    (folder / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        loaded(folder)
    pipeline = loaded(folder / "pytorch_lora_weights.bin")
    assert not torch.allclose(predict(pipeline, frames, actions), predict(tiny_pipeline(), frames, actions))


def save_with_encoder(folder, shift=1.0, parts=("action_embed.", "null_action"), targets=("to_q",)):
    """Save an adapter and `parts` of a changed action encoder in the format of train_lora.py."""
    pipeline = tiny_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=list(targets)))
    torch.manual_seed(9)
    for name, parameter in pipeline.transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    encoder = {
        name: value + shift
        for name, value in tiny_pipeline().transformer.state_dict().items()
        if name.startswith(parts)
    }
    pipeline.save_lora_weights(
        folder, transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer) | encoder
    )
    return folder


def test_fused_weights_keep_their_action_encoder(frames, actions, tmp_path):
    folder = save_with_encoder(tmp_path / "lora")
    pipeline = loaded(folder)
    applied = predict(pipeline, frames, actions)
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match="LoRA layers are fused into the current one"):
        pipeline.load_lora_weights(folder, adapter_name="second")
    pipeline.unload_lora_weights()
    torch.testing.assert_close(predict(pipeline, frames, actions), applied, rtol=1e-4, atol=1e-5)
    pipeline.save_pretrained(tmp_path / "merged")
    merged = IRASimPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(predict(merged, frames, actions), applied, rtol=1e-4, atol=1e-5)

    pipeline.load_lora_weights(save_with_encoder(tmp_path / "other", shift=2.0))
    assert not torch.allclose(predict(pipeline, frames, actions), applied)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(predict(pipeline, frames, actions), applied, rtol=1e-4, atol=1e-5)


def test_unfusing_restores_the_action_encoder(frames, actions, tmp_path):
    plain = predict(tiny_pipeline(), frames, actions)
    pipeline = loaded(save_with_encoder(tmp_path))
    applied = predict(pipeline, frames, actions)
    pipeline.fuse_lora()
    pipeline.unfuse_lora()
    torch.testing.assert_close(predict(pipeline, frames, actions), applied, rtol=1e-4, atol=1e-5)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(predict(pipeline, frames, actions), plain, rtol=1e-4, atol=1e-5)


def test_unloading_restores_everything_replaced(frames, actions, tmp_path):
    plain = predict(tiny_pipeline(), frames, actions)
    pipeline = loaded(save_with_encoder(tmp_path / "first", parts=("null_action",)))
    pipeline.load_lora_weights(save_with_encoder(tmp_path / "second", shift=2.0), adapter_name="second")
    sharing = IRASimPipeline.from_pipe(pipeline)
    sharing.unload_lora_weights()
    torch.testing.assert_close(predict(pipeline, frames, actions), plain, rtol=1e-4, atol=1e-5)


def test_action_encoder_with_adapters_is_replaced(frames, actions, tmp_path):
    file = save_with_encoder(tmp_path / "encoder")
    pipeline = loaded(save_with_encoder(tmp_path / "adapter", parts=("none",), targets=["action_embed.linear_2"]))
    pipeline.load_lora_weights(file, adapter_name="second")
    pipeline.set_adapters("second")
    torch.testing.assert_close(predict(pipeline, frames, actions), predict(loaded(file), frames, actions))
    pipeline.unload_lora_weights()
    plain = predict(tiny_pipeline(), frames, actions)
    torch.testing.assert_close(predict(pipeline, frames, actions), plain, rtol=1e-4, atol=1e-5)


def test_offloaded_action_encoder_raises(frames, actions, tmp_path):
    pipeline = tiny_pipeline()
    plain = predict(pipeline, frames, actions)
    pipeline.enable_sequential_cpu_offload(device="cpu")  # parameters are on the meta device between calls
    with pytest.raises(ValueError, match=r"only if it is in memory .* `remove_all_hooks\(\)` ends sequential offload"):
        pipeline.load_lora_weights(save_with_encoder(tmp_path))
    assert not pipeline.get_list_adapters()
    pipeline.remove_all_hooks()
    pipeline.load_lora_weights(tmp_path)
    pipeline.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="only if it is in memory"):
        pipeline.unload_lora_weights()
    pipeline.remove_all_hooks()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(predict(pipeline, frames, actions), plain, rtol=1e-4, atol=1e-5)


def test_action_encoder_on_disk_raises(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "offload")
    )
    with pytest.raises(ValueError, match="load LoRA before enabling group offload to disk"):
        pipeline.load_lora_weights(save_with_encoder(tmp_path / "lora"))
    assert not pipeline.get_list_adapters()


def test_wrapped_model_is_adapted_and_restored(frames, actions, tmp_path):
    file = save_with_encoder(tmp_path)
    plain, applied = predict(tiny_pipeline(), frames, actions), predict(loaded(file), frames, actions)
    pipeline = tiny_pipeline()
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    with torch.compiler.set_stance("force_eager"):  # the test needs the wrapper of torch.compile, but no compiled code
        pipeline.load_lora_weights(file)
        torch.testing.assert_close(predict(pipeline, frames, actions), applied, rtol=1e-4, atol=1e-5)
        pipeline.unload_lora_weights()
        torch.testing.assert_close(predict(pipeline, frames, actions), plain, rtol=1e-4, atol=1e-5)


def test_adapter_with_action_encoder(frames, actions, tmp_path):
    pipeline = tiny_pipeline()
    plain = predict(pipeline, frames, actions)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipeline.transformer.null_action.data += 1
    pipeline.transformer.action_embed.linear_2.bias.data += 1
    encoder = {
        name: value
        for name, value in pipeline.transformer.state_dict().items()
        if name.startswith(("action_embed.", "null_action"))
    }
    layers = get_peft_model_state_dict(pipeline.transformer)
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers | encoder)
    changed = predict(pipeline, frames, actions)
    assert not torch.allclose(changed, plain)

    fresh = loaded(tmp_path)
    torch.testing.assert_close(predict(fresh, frames, actions), changed)
    fresh.load_lora_weights(tmp_path, adapter_name="again")
    fresh.unload_lora_weights()
    torch.testing.assert_close(predict(fresh, frames, actions), plain)

    other = tiny_pipeline(action_dim=5, action_scale=1.0, action_offset=0.0)
    with pytest.raises(
        ValueError,
        match=r"must have the names and shapes of this model's, which differ for \['action_embed.linear_1.weight'\]",
    ):
        other.load_lora_weights(tmp_path)
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers | {"proj_out.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"other keys \['proj_out.bias'\]"):
        fresh.load_lora_weights(tmp_path)
