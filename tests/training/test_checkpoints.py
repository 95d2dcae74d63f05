import json

import pytest
import torch
from accelerate import Accelerator

from irasim_diffusers.training import newest_checkpoint
from irasim_diffusers.training.checkpoints import SETTINGS, save_checkpoint


@pytest.fixture
def output(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    for step in (2, 4):
        save_checkpoint(accelerator, tmp_path, step, 2, {})
    return tmp_path


def test_changed_content_is_damage(output, caplog):
    newest = output / "checkpoint-4"
    names = {path.name for path in newest.iterdir()} - {SETTINGS}
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl"} <= names
    for name in names:
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(bytes(len(content)))  # zeros of the same size
        assert newest_checkpoint(output, {}) == output / "checkpoint-2", name
        assert f"the content of {name} has changed" in caplog.text
        (newest / name).write_bytes(content)
    assert newest_checkpoint(output, {}) == newest


def test_checkpoint_without_hashes_is_accepted(output):
    path = output / "checkpoint-4" / SETTINGS
    settings = json.loads(path.read_text())
    del settings["hashes"]
    path.write_text(json.dumps(settings))
    assert newest_checkpoint(output, {}) == output / "checkpoint-4"
