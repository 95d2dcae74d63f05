"""The model card of a published pipeline, written from its config."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

PIPELINE_FILE = "from irasim_diffusers import IRASimPipeline  # noqa: F401\n"
"""`pipeline.py` of a published repository, in which `DiffusionPipeline.from_pretrained` finds the class."""

HOLD = {
    "relative_euler": "zero in position and angles, with the other components unchanged,",
    "relative_6d": "zero in position and (1, 0, 0, 0, 1, 0) in rotation, with the other components unchanged,",
}

TEXT = """
# {title}

A world model of a robot: from {history} of {height}x{width} pixels (height x width) and a sequence of actions, it
predicts the next frames, one per action. The model is {method}. It is a diffusers pipeline of
irasim-diffusers. Install the package with `pip install .` in a clone of its repository.

```python
from diffusers.utils import load_image
from irasim_diffusers import IRASimPipeline

pipe = IRASimPipeline.from_pretrained("{repo_id}")
{images}  # {width} pixels wide, {height} high
actions = [{action}] * {num_actions}
video = pipe({frames_name}, actions).frames[0]
```

## Actions

{space} The network receives `(action - offset) * scale`.

| component | unit | offset | scale |
|---|---|---|---|
{components}

## Model

| | |
|---|---|
| network | {network}; {parameters:.2f} M parameters |
| autoencoder | {autoencoder} |
| window | {frames} frames, {num_history} of them history{fps} |
| objective | {objective} |
| sampler | {scheduler}, {steps} steps |
"""


def describe_method(config: Any) -> str:
    """Describe the architecture and the action conditioning, as a part of a sentence."""
    if "block_out_channels" in config:
        paper = "[Video Diffusion Models](https://arxiv.org/abs/2204.03458)"
        return f"the U-Net of {paper}, a baseline of IRASim, in which the whole trajectory modulates all frames"
    if config.conditioning == "frame":
        return "[IRASim](https://arxiv.org/abs/2406.14540), in which each action modulates its own frame (Frame-Ada)"
    return "[IRASim](https://arxiv.org/abs/2406.14540), in which the whole trajectory modulates all frames (Video-Ada)"


def describe_network(config: Any) -> str:
    """Describe the size of a network in one line."""
    heads = config.num_attention_heads
    if "block_out_channels" in config:
        return f"U-Net of {'-'.join(map(str, config.block_out_channels))} channels, {heads} heads"
    layers, width = config.num_layers, heads * config.attention_head_dim
    return f"{layers} spatial and {layers} temporal blocks, width {width}, {heads} heads, patch {config.patch_size}"


def write_model_card(pipeline: Any, repo_id: str) -> ModelCard:
    """Return the card of a pipeline: its purpose, usage, action space and structure."""
    config, space = pipeline.transformer.config, pipeline.action_space
    height, width = pipeline.frame_size
    units = [unit or "as recorded" for unit in space.units]
    rows = zip(space.names, units, space.offset, space.scale, strict=True)
    flow = config.prediction_type == "flow_prediction"
    longest, is_exact = config.num_history_frames, config.conditioning == "video"
    is_list = is_exact and longest > 1
    text = TEXT.format(
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        history="one frame" if longest == 1 else f"{longest} frames" if is_exact else f"1 to {longest} frames",
        height=height,
        width=width,
        method=describe_method(config),
        action=[round(float(offset), 3) for offset in space.offset],
        images=f'frames = [load_image(f"frame-{{k}}.png") for k in range({longest})]'
        if is_list
        else 'frame = load_image("frame.png")',
        frames_name="frames" if is_list else "frame",
        num_actions=config.sample_frames - longest,
        space="Absolute: an action is a target position."
        if space.has_targets
        else f"Relative: {HOLD.get(space.derivation, 'zero')} means no motion.",
        components="\n".join(f"| {name} | {unit} | {offset:g} | {scale:g} |" for name, unit, offset, scale in rows),
        network=describe_network(config),
        parameters=sum(parameter.numel() for parameter in pipeline.transformer.parameters()) / 1e6,
        autoencoder="none; the model predicts pixels"
        if pipeline.vae is None
        else f"{type(pipeline.vae).__name__}, {config.in_channels} channels at 1/{pipeline.vae_scale_factor} of the frame size",
        frames=config.sample_frames,
        num_history=longest if is_exact or longest == 1 else f"at most {longest}",
        fps="" if config.fps is None else f", {config.fps:g} frames per second",
        objective="rectified flow"
        if flow
        else f"{config.prediction_type}, {config.num_train_timesteps} steps, {config.beta_schedule} betas "
        f"{config.beta_start:g} to {config.beta_end:g}",
        scheduler=type(pipeline.scheduler).__name__,
        steps=pipeline.config.num_inference_steps,
    )
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="robotics",
        tags=["world-model", "irasim", "robotics", "video-prediction"],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
