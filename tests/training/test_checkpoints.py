import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from fork_server import fork_server
from safetensors.torch import save_file
from tiny_models import tiny_pipeline, tiny_transformer

from irasim_diffusers.data.content_hash import tensors_hash
from irasim_diffusers.training import check_output_dir, lock_output, newest_checkpoint, save_finished
from irasim_diffusers.training.checkpoints import SETTINGS, check_resume, load_average, save_checkpoint
from irasim_diffusers.training.loop import TrainingRun, frozen_weights
from irasim_diffusers.training.saving import finished_pipeline


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


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "null", '{"files": []}', '{"files": {}}', '{"files": {"optimizer.bin": 1}, "seconds": "x"}', "\\x00"],
)
def test_settings_of_something_else_are_damage(output, content, caplog):
    (output / "checkpoint-4" / SETTINGS).write_text(content)
    assert newest_checkpoint(output, {}) == output / "checkpoint-2"
    assert "skipped damaged checkpoint" in caplog.text


def test_renamed_checkpoint_is_damage(output, caplog):
    (output / "checkpoint-4").rename(output / "checkpoint-1000")
    assert newest_checkpoint(output, {}) == output / "checkpoint-2"
    assert "settings.json belongs to step 4" in caplog.text


def test_second_run_in_the_same_folder_raises(tmp_path):
    code = f"from pathlib import Path; from irasim_diffusers.training import lock_output; lock_output(Path({str(tmp_path)!r}))"
    lock_output(tmp_path)
    lock_output(tmp_path)  # a second run of this process
    result = fork_server().run("-c", code)
    assert "is in use by another training run: wait for it, or use another folder" in result.stderr


def test_frozen_weights_define_a_run():
    model = torch.nn.Linear(3, 2)
    assert frozen_weights(model) == {}
    model.weight.requires_grad_(False)
    before = frozen_weights(model)
    with torch.no_grad():
        model.bias.add_(1)  # the bias is trained
        assert frozen_weights(model) == before
        model.weight[0, 0] += 1
    assert frozen_weights(model) != before


def test_hash_of_tensors_keeps_identities():
    weight = torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4)
    tensors = {"b": torch.tensor(3), "a": weight.to(memory_format=torch.channels_last)}
    known = hashlib.sha256(b"a" + weight.numpy().tobytes() + b"b" + np.array(3).tobytes()).hexdigest()
    assert tensors_hash(tensors) == tensors_hash(dict(sorted(tensors.items()))) == known
    half = {"a": weight.bfloat16()}
    assert tensors_hash(half) != tensors_hash({"a": weight}) == tensors_hash(half, torch.float32)


def test_average_without_steps_raises(tmp_path):
    model = torch.nn.Linear(3, 2)
    save_file(dict(model.state_dict()), tmp_path / "ema.safetensors")
    with pytest.raises(ValueError, match=r"metadata of ema\.safetensors must contain the number `optimization_step`"):
        load_average(EMAModel(model.parameters()), model, tmp_path)


def test_checkpoint_without_hashes_is_accepted(output):
    path = output / "checkpoint-4" / SETTINGS
    settings = json.loads(path.read_text())
    del settings["hashes"]
    path.write_text(json.dumps(settings))
    assert newest_checkpoint(output, {}) == output / "checkpoint-4"


def test_a_chunk_longer_than_the_window_is_dropped():
    transformer = tiny_transformer(sample_frames=4)  # 2 predicted frames
    sampler = (
        DDIMScheduler.from_config(tiny_pipeline().scheduler.config),
        {"chunk_length": 10, "num_inference_steps": 3},
    )
    pipeline = finished_pipeline(None, transformer, sampler)
    assert (pipeline.chunk_length, pipeline.config.num_inference_steps) == (2, 3)


def test_foreign_checkpoints_are_kept(output):
    accelerator = Accelerator(cpu=True)
    (output / "checkpoint-3").mkdir()
    (output / "checkpoint-3" / "trainer_state.json").touch()
    save_checkpoint(accelerator, output, 6, 1, {})
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize("name", ["checkpoint-9", "partial-4", ".finished", "transformer"])
def test_files_with_names_of_folders_raise(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=f"{name}' must be a folder and not a link: remove it, or choose another `output_dir`"
    ):
        lock_output(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{name}' must be a folder"):
        lock_output(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "model_index.json"])
def test_folders_with_names_of_files_are_kept(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{name}' must be a file, but is a folder: rename it, or choose another"):
        check_output_dir(tmp_path)
    with pytest.raises(ValueError, match=f"{name}' must be a file, but is a folder"):
        save_finished(tmp_path, lambda folder: (folder / name).touch())
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [name, f"{name}/notes.txt"]


def test_an_interrupted_final_save_leaves_no_complete_pipeline(tmp_path, monkeypatch):
    def save(folder):
        (folder / "model_index.json").touch()
        (folder / "transformer").mkdir()

    save_finished(tmp_path, save)
    assert (tmp_path / "model_index.json").is_file()
    replace = Path.replace

    def interrupt(path, target):
        if path.name == "transformer":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_finished(tmp_path, save)
    assert not (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize("kind", ["file", "loop", "dangling"])
def test_unusable_output_folders_raise(kind, tmp_path):
    output = tmp_path / "out"
    if kind == "file":
        output.touch()
    else:
        output.symlink_to(output if kind == "loop" else tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"`output_dir` must be (a folder, got the file|writable, got) '.*out'"):
        check_output_dir(output)
    check_output_dir(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_fewer_steps_than_those_of_a_checkpoint_raise(output):
    check_resume(output, {}, None, 4)
    with pytest.raises(ValueError, match=r"`max_train_steps` must be at least 4, the step of '.*checkpoint-4', got 3"):
        check_resume(output, {}, None, 3)


FULL_DISK = """
import resource, sys
from pathlib import Path

import torch
from accelerate import Accelerator

from irasim_diffusers.training import run_script, save_checkpoint

accelerator, model = Accelerator(cpu=True), torch.nn.Linear(100, 100)
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer = accelerator.prepare(model, optimizer)
model(torch.ones(1, 100)).sum().backward()
optimizer.step()
save_checkpoint(accelerator, Path("whole"), 4, 2, {})
missing = int(sys.argv[1])
limit = Path("whole/checkpoint-4/optimizer.bin").stat().st_size - missing  # more than the weights
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run_script(lambda: save_checkpoint(accelerator, Path("."), 4, 2, {}))
"""


@pytest.mark.parametrize("missing", [30_000, 100])
def test_full_disk_ends_in_one_line(tmp_path, missing):
    """The limit on the size of a file has the effect of a full disk on the optimizer's file, which torch writes.

    The error of torch is another one if only the end of the file cannot be written.
    """
    result = fork_server().run("-c", FULL_DISK, missing, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("-c: error: cannot write 'partial-4': ")
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("name", ["meta/info.json", "annotation/0.json", "dataset_info.json"])
def test_output_folder_must_not_be_a_dataset(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="`output_dir` must not be a dataset"):
        lock_output(tmp_path)


def test_missing_settings_of_earlier_versions_had_their_default_values(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"rate": 0.1, "files": {}}))
    check_resume(tmp_path, {"rate": 0.1, "share": 0.0}, {"share": 0.0, "rate": 1.0})
    with pytest.raises(ValueError, match=r"belongs to a run with other settings: share was 0.0 and is 0.5"):
        check_resume(tmp_path, {"rate": 0.1, "share": 0.5}, {"share": 0.0, "rate": 1.0})


@pytest.mark.parametrize(("loss", "norm", "name"), [(1.0, np.inf, "gradient norm"), (np.nan, np.nan, "loss")])
def test_gradient_norms_may_be_floats(tmp_path, loss, norm, name):
    """DeepSpeed returns the norm as a float. A non-finite loss is named before the gradient norm."""
    run = TrainingRun.__new__(TrainingRun)
    run.accelerator, run.output, run.step = Accelerator(cpu=True), tmp_path, 3
    run.losses = {"loss": torch.tensor(loss)}
    with pytest.raises(FloatingPointError, match=f"^the {name} is (nan|inf) at step 4; there is no checkpoint"):
        run._check_finite(norm)
    run.losses = {"loss": torch.tensor(1.0)}
    for finite in (2.0, torch.tensor(2.0), None):
        run._check_finite(finite)


@pytest.mark.parametrize("content", [100_000 * "[", "[1]", "{", '{"files": {}, "files": {}}'])
def test_damaged_settings_are_skipped(tmp_path, content):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "settings.json").write_text(content)
    check_resume(tmp_path, {"rate": 0.1})
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete: checkpoint-1"):
        newest_checkpoint(tmp_path, {"rate": 0.1})
