"""Hostile and damaged weight files are rejected before memory is allocated, without running code."""

import builtins
import collections
import pickle
import struct
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import omegaconf
import pytest
import torch
from fork_server import fork_server
from safetensors.torch import save_file
from test_conversion import case, write
from test_latte import latte_model
from test_opensora import opensora_state
from tiny_models import tiny_vae

from irasim_diffusers.cli import main
from irasim_diffusers.conversion import load_latte, load_opensora, load_released_irasim
from irasim_diffusers.safe_load import MAX_HEADER, Settings, read_checkpoint


def archive(path, pickled, **records):
    """Write a zip archive with the writer of `torch.save`, but with any pickle."""
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in {"data.pkl": pickled, "byteorder": b"little", **records}.items():
        writer.write_record(name.replace("data_", "data/"), content, len(content))
    writer.write_end_of_file()
    return path


def rewrite(path, compression=zipfile.ZIP_STORED, changes=None):
    """Rewrite an archive with Python's zipfile, with changed or added records."""
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as target:
        for name, content in (records | (changes or {})).items():
            target.writestr(name, content)


def storage(numel, key="0", kind=b"FloatStorage"):
    return b"(X\x07\0\0\0storagectorch\n%b\nX\x01\0\0\0%bX\x03\0\0\0cpu\x8a\x06%btQ" % (
        kind, key.encode(), struct.pack("<q", numel)[:6],
    )  # fmt: skip


def tensor(numel, shape, stride, kind=b"FloatStorage", offset=0):
    numbers = [b"".join(b"\x8a\x06" + struct.pack("<q", number)[:6] for number in row) for row in (shape, stride)]
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(numel, kind=kind) + b"\x8a\x06"
        + struct.pack("<q", offset)[:6] + b"(%bt(%bt" % tuple(numbers) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def entry(value):
    """A pickle of {"ema": {"w": value}}."""
    return b"\x80\x02}X\x03\0\0\0ema}X\x01\0\0\0w" + value + b"ss."


def nested(number, opcode=b"\x86"):
    """An object with 2**number leaves in a few bytes: each level contains the level below twice."""
    levels = b"".join(b"q%ch%c" % (level, level) + opcode for level in range(number))
    return b")" + levels


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def with_call(path, function, *arguments):
    return saved(path, {"ema": case("rt1")[2], "args": Call(function, *arguments)})


def torchscript(path):
    class Program(torch.nn.Module):
        @torch.jit.export
        def __getstate__(self):
            return (1, self.training)

        @torch.jit.export
        def __setstate__(self, state: tuple[int, bool]):
            self.training = state[1]
            print("CODE RAN")  # noqa: T201

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Program()), path)
    return path


def padded(path, before=b"", after=b""):
    path.write_bytes(before + path.read_bytes() + after)
    return path


def two_directories(path):
    """Two complete archives in one file; reading from the start and from the end gives different records."""
    other = saved(path.with_suffix(".other"), {"ema": {"w": torch.ones(1)}})
    return padded(saved(path, {"ema": case("rt1")[2]}), after=other.read_bytes())


def shifted_directory(path):
    """An archive with end records that point to another central directory than the preceding one."""
    content = bytearray(saved(path, {"ema": {"w": torch.ones(1)}}).read_bytes())
    offset = struct.unpack("<Q", content[-50:-42])[0]
    content[-50:-42] = struct.pack("<Q", offset - 1)
    content[-6:-2] = struct.pack("<L", offset - 1)
    path.write_bytes(content)
    return path


def relabelled(path):
    """An archive with a directory that declares compressed records."""
    content = saved(path, {"ema": {"w": torch.zeros(4)}}).read_bytes()
    path.write_bytes(content.replace(b"PK\1\2\0\0\0\0\x08\x08\0\0", b"PK\1\2\0\0\0\0\x08\x08\x08\0"))
    assert path.read_bytes() != content
    return path


def compressed(path):
    rewrite(saved(path, {"ema": {"w": torch.zeros(4)}}), zipfile.ZIP_DEFLATED)
    return path


def tar(path):
    import tarfile

    saved(path.with_suffix(".other"), {"ema": {"w": torch.ones(1)}})
    with tarfile.open(path, "w") as file:
        file.add(path.with_suffix(".other"), "storages")
    return path


FLOATS = {"data_0": b"\0" * 16}
FORM = "is not one zip archive"
FILES = {
    # execution of code
    "os.system": (lambda path: with_call(path, __import__("os").system, "echo CODE RAN"), "refers to 'posix.system'"),
    "eval": (lambda path: with_call(path, builtins.eval, "print('CODE RAN')"), r"refers to 'builtins.eval'"),
    "getattr": (lambda path: with_call(path, builtins.getattr, "a", "b"), r"refers to 'builtins.getattr'"),
    "import in settings": (
        lambda path: archive(path, entry(b"comegaconf\nDictConfig\n)\x81}X\x01\0\0\0acos\nsystem\nsb")),
        "refers to 'os.system'",
    ),
    "torch.load": (lambda path: with_call(path, torch.load, "other.pt"), "refers to 'torch.serialization.load'"),
    "stack global": (lambda path: archive(path, b"\x80\x04\x8c\x02os\x8c\x06system\x93."), "pickle instruction"),
    "TorchScript": (torchscript, "is a TorchScript program"),
    "TorchScript, capitals": (
        lambda path: torchscript(path.with_name("Upper.pt")).replace(path),
        "is a TorchScript program",
    ),
    "TorchScript, suffix": (lambda path: padded(torchscript(path), after=b"\0" * 68_000), FORM),
    "TorchScript, prefix": (lambda path: padded(torchscript(path), before=b"\x80\x02N."), FORM),
    # different content for different readers
    "two archives": (two_directories, FORM),
    "shifted directory": (shifted_directory, FORM),
    "zip comment": (lambda path: padded(saved(path, {"ema": {}}), after=b"PK\5\6" + b"\0" * 18), FORM),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"ema": 1})), FORM),
    "legacy": (lambda path: saved(path, {"ema": {}}, _use_new_zipfile_serialization=False), FORM),
    "tar": (tar, FORM),
    "same names": (
        lambda path: archive(path, entry(tensor(4, [4], [1])), **FLOATS, **{"DATA.pkl": b"."}),
        "records of the same name",
    ),
    # excessive memory
    "deflated": (compressed, FORM),
    "declared as deflated": (relabelled, "compressed or overlapping records"),
    "stride 0": (lambda path: archive(path, entry(tensor(4, [1 << 40], [0])), **FLOATS), "declares a tensor"),
    "shape": (lambda path: archive(path, entry(tensor(4, [1 << 40], [1])), **FLOATS), "declares a tensor"),
    "offset": (lambda path: archive(path, entry(tensor(4, [2], [1], offset=3)), **FLOATS), "declares a tensor"),
    "negative offset": (lambda path: archive(path, entry(tensor(4, [2], [1], offset=-1)), **FLOATS), "negative"),
    "storage": (lambda path: archive(path, entry(tensor(1 << 40, [4], [1])), **FLOATS), "record of 16 bytes"),
    "no record": (lambda path: archive(path, entry(tensor(4, [4], [1]))), "the record 'data/0', which does not exist"),
    "bytearray": (lambda path: archive(path, entry(b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\1\0\x85R")), "bytearray"),
    "tensor class": (lambda path: archive(path, entry(b"ctorch\nTensor\n\x8a\x06\0\0\0\0\1\0\x85\x81")), "Tensor"),
    "untyped": (
        lambda path: archive(path, entry(b"ctorch.storage\nUntypedStorage\n\x8a\x06\0\0\0\0\1\0\x85R")),
        "UntypedStorage",
    ),
    "keys": (lambda path: archive(path, b"\x80\x02}" + nested(60) + b"Ns."), "keys are not names or numbers"),
    "call of a list": (lambda path: archive(path, b"\x80\x02" + nested(60) + b")R."), "neither weights nor settings"),
    "memo": (lambda path: archive(path, entry(b"Nr\xff\xff\xff\x7f0")), "pickle instruction POP"),
    "large pickle": (lambda path: archive(path, b"\x80\x02" + b"}" * MAX_HEADER + b"."), "data.pkl must have 1 to"),
    "truncated": (lambda path: path.write_bytes(saved(path, {"ema": {}}).read_bytes()[:-9]), FORM),
    # attributes and hooks of objects in the file
    "attributes": (
        lambda path: archive(path, b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsNsb."),
        "sets attributes",
    ),
    "hooks": (
        lambda path: archive(path, entry(tensor(4, [4], [1]).replace(b")RtR", b")Rq\1X\1\0\0\0aNstR")), **FLOATS),
        "hooks",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", FILES)
def test_hostile_files_raise(name, tmp_path, capfd):
    make, message = FILES[name]
    path = tmp_path / "a.pt"
    make(path)
    with pytest.raises(ValueError, match=message):
        load_released_irasim(path, "rt1")
    output = capfd.readouterr()
    assert "CODE RAN" not in output.out + output.err


def replaced(**tensors):
    return case("rt1")[2] | {name.replace("__", "."): value for name, value in tensors.items()}


NAN = torch.full((24,), torch.nan)
WEIGHTS = {
    "NaN": (replaced(x_embedder__proj__bias=NAN), "patch_embed.proj.bias: NaN or infinite"),
    "infinite": (replaced(x_embedder__proj__bias=NAN.nan_to_num(torch.inf)), "NaN or infinite"),
    "float64 beyond float32": (
        replaced(x_embedder__proj__bias=torch.full((24,), 1e300, dtype=torch.float64)),
        "NaN or infinite",
    ),
    "NaN position table": (replaced(temp_embed=torch.full((1, 5, 24), torch.nan)), "different from what the model"),
    "integer": (
        replaced(x_embedder__proj__bias=torch.ones(24, dtype=torch.int64)),
        "tensor 'x_embedder.* got torch.int64",
    ),
    "bool": (replaced(x_embedder__proj__bias=torch.ones(24, dtype=torch.bool)), "got torch.bool"),
    "complex": (replaced(x_embedder__proj__bias=torch.ones(24, dtype=torch.complex64)), "got torch.complex64"),
    "invented blocks": (
        replaced(**{f"blocks__{index}__a": torch.zeros(1) for index in range(400)}),
        "cannot be converted",
    ),
    "thousands of blocks": (
        replaced(**{f"blocks__{index}__a": torch.zeros(1) for index in range(3000)}),
        "`num_layers` must be an integer of at least 1 and at most 256",
    ),
    "frames": (replaced(temp_embed=torch.zeros(1, 10**5, 1)), "`sample_frames` must be .* at most 4096"),
    "channels": (replaced(x_embedder__proj__weight=torch.zeros(24, 10**4, 2, 2)), "`in_channels` must be"),
    "no patch": (replaced(x_embedder__proj__weight=torch.zeros(24, 1, 0, 0)), "`patch_size` must be"),
    "no width": (replaced(x_embedder__proj__weight=torch.zeros(0, 1, 2, 2)), "`attention_head_dim` must be"),
    "a block twice": (replaced(blocks__00__attn__proj__bias=torch.zeros(24)), "is mapped twice"),
    "prefix": (replaced(module__temp_embed=torch.zeros(1, 5, 24)), "with and without the prefix"),
    "control characters": (replaced(**{"\x1b[2J": torch.zeros(1)}), "invalid name"),
    "long name": (replaced(a=torch.zeros(1)) | {"a" * 10**5: torch.zeros(1)}, "invalid name"),
    "numbers as names": ({3: torch.zeros(1)}, "invalid name"),
    "scalars": (replaced(final_layer__linear__bias=torch.tensor(1.0)), "cannot be converted"),
    "shared memory": (dict.fromkeys(map(str, range(1000)), torch.zeros(10**4)), "share memory"),
    "sparse": (replaced(x_embedder__proj__bias=torch.ones(24).to_sparse()), "refers to 'torch._utils._rebuild_sparse"),
    "meta": (replaced(x_embedder__proj__bias=torch.ones(24, device="meta")), "refers to 'torch._utils._rebuild_meta"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_absurd_weights_raise(name, tmp_path):
    state, message = WEIGHTS[name]
    path = saved(tmp_path / "a.pt", {"ema": state})
    with pytest.raises(ValueError, match=message):
        load_released_irasim(path, "rt1", **case("rt1")[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"action_scale": float("nan")}, "`action_scale` must be .* finite in float32, got nan"),
        ({"action_scale": [20.0] * 6 + [float("inf")]}, "`action_scale` must be .* finite in float32"),
        ({"action_low": [1e300] * 7}, "`action_low` must be"),
        ({"fps": 0}, r"`fps` must be a number in \[0.001, 100000\], got 0"),
        ({"fps": True}, "`fps` must be"),
        ({"final_frame_ada": "yes"}, "`final_frame_ada` must be bool"),
        ({"use_fps": "yes"}, "`use_fps` must be bool"),
        ({"cameras": ["left"]}, "`cameras` must be"),
        ({"num_attention_heads": 10**9}, "`num_attention_heads` must be an integer"),
        ({"num_attention_heads": 5}, "divides the width 24 of the weights, got 5"),
        ({"num_attention_heads": True}, "`num_attention_heads` must be an integer"),
        ({"num_attention_heads": 3.0}, "`num_attention_heads` must be an integer"),
        ({"num_layers": 10**6}, "`num_layers` must be an integer"),
        ({"sample_frames": 10**10}, "`sample_frames` must be an integer"),
        ({"sample_height": -2}, "`sample_height` must be an integer"),
        ({"num_train_timesteps": 10**9}, "`num_train_timesteps` must be an integer"),
        ({"action_frequencies": 10**6}, "`action_frequencies` must be an integer in"),
        ({"beta_end": 7.0}, "`beta_end` must be a number in"),
        ({"base_patch_size": 0.0}, "`base_patch_size` must be a number in"),
        ({"base_patch_size": 1001.0}, r"`base_patch_size` must be a number in \[0.001, 1000\], got 1001.0"),
        ({"color": 3}, "`color` must be an entry of the config"),
    ],
)
def test_absurd_config_entries_raise(config, message, tmp_path):
    _, overrides, state = case("rt1")
    path = saved(tmp_path / "a.pt", {"ema": state})
    with pytest.raises(ValueError, match=message):
        load_released_irasim(path, "rt1", **overrides | config)


def header(length, text=b""):
    return length.to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(1 << 62), "its header has"),
        (header(MAX_HEADER + 1, b" " * (MAX_HEADER + 1)), "its header has"),
        (header(64, b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}'), "not a safetensors file"),
        (b"", "not a safetensors file"),
        ({"rope.freqs": torch.ones(3, dtype=torch.int32)}, "got torch.int32"),
        ({"t_block.1.bias": torch.full((144,), torch.nan)}, "ada_norm_single.1.bias: NaN or infinite"),
        ({"final_layer.linear.bias": torch.tensor(1.0)}, "cannot be converted"),
        ({"spatial_blocks.0.attn.q_norm.weight": torch.zeros(0)}, "q_norm.weight' must contain a value per channel"),
        ({f"spatial_blocks.{index}.a": torch.zeros(1) for index in range(300)}, "`num_layers` must be"),
        ({"\n": torch.zeros(1)}, "invalid name"),
    ],
)
def test_absurd_safetensors_raise(content, message, tmp_path):
    path = tmp_path / "model.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(opensora_state(dim=24, head=6, depth=1, patch=2, channels=4) | content, path)
    with pytest.raises(ValueError, match=message):
        load_opensora(path)


def test_action_encoder_of_absurd_size_raises(tmp_path):
    save_file(opensora_state(dim=24, head=6, depth=1, patch=2, channels=4), tmp_path / "a.safetensors")
    absurd = {"conditioning": "video", "action_activation": None, "sample_frames": 4000}
    with pytest.raises(ValueError, match=r"asks for \d+ new elements"):
        load_opensora(tmp_path, **absurd)


def test_hidden_files_are_not_read_as_shards(tmp_path):
    latte_model(3, 8, 1, 2, 4, 6).save_pretrained(tmp_path)
    expected = load_latte(tmp_path, num_attention_heads=3).proj_out.weight
    (tmp_path / "._diffusion_pytorch_model.safetensors").write_bytes(b"Mac OS X")
    assert torch.equal(load_latte(tmp_path, num_attention_heads=3).proj_out.weight, expected)


def test_settings_of_a_checkpoint_are_inert(tmp_path):
    """Settings (OmegaConf, argparse, paths, NumPy scalars) and optimizer state do not prevent loading."""
    _, overrides, state = case("rt1")
    settings = omegaconf.OmegaConf.create({"a": [1, "b", None, {"c": 2.5}], "d": "${a}", "e": Path("runs"), "f": b"x"})
    others = {
        "namespace": Namespace(lr=np.float64(1e-4), output=Path("runs"), betas=(0.9, 0.999), settings=settings),
        "losses": collections.defaultdict(list, {"train": [0.5, np.float32(0.25)]}),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "size": [True, None, -1, 1 << 40, 1e-300, "ä"],
    }
    path = write(tmp_path / "a.pt", state, ema=collections.OrderedDict(state), **others)
    content = read_checkpoint(path)
    assert isinstance(content["args"], Settings)
    assert isinstance(content["namespace"], Settings)
    assert content["size"] == others["size"]
    assert torch.equal(content["ema"]["temp_embed"], state["temp_embed"])
    model = load_released_irasim(path, "rt1", **overrides)
    path.write_bytes(b"\0" * path.stat().st_size)  # the tensors of the model are not mapped from the file
    assert torch.equal(model.proj_out.weight, state["final_layer.linear.weight"])


@pytest.mark.parametrize("item", [b"}", b"]", b"(", b")\x85", b"ccollections\nOrderedDict\n)R"])
def test_large_pickles_take_bounded_time_and_depth(item, tmp_path):
    """Deep nesting and many small objects are rejected without recursion."""
    path = archive(tmp_path / "a.pt", b"\x80\x02" + item * (100_000 // len(item)) + b".")
    with pytest.raises(ValueError, match=r"safely|contains no weights"):
        load_released_irasim(path, "rt1")


LIMITED = """
import resource, sys
from irasim_diffusers.conversion import load_released_irasim
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), used + (400 << 20)))
for path in sys.argv[1:]:
    try:
        load_released_irasim(path, "rt1")
    except ValueError as error:
        print("refused:", str(error).splitlines()[0][:300])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_rejected_files_take_little_memory(tmp_path):
    """Small files that declare a large model are rejected within 400 MB."""
    generator = torch.Generator().manual_seed(0)

    def zeros(*shape):
        return torch.zeros(1).expand(*shape)

    weights = {
        "x_embedder.proj.weight": zeros(1152, 4, 2, 2),
        "temp_embed": zeros(1, 16, 1152),
        "blocks.1.attn.qkv.weight": zeros(3456, 1152),
    }
    real = {key: torch.zeros(value.shape) for key, value in weights.items()}
    blocks = {f"blocks.{index}.a": torch.randn(1, generator=generator) for index in range(400)}
    files = {
        "frames": weights | {"temp_embed": zeros(1, 4 * 10**6, 1152)},
        "channels": weights | {"x_embedder.proj.weight": zeros(1152, 10**6, 2, 2)},
        "blocks": weights | blocks,
        "real": real | blocks,
    }
    for name, state in files.items():
        torch.save({"ema": state}, tmp_path / f"{name}.pt")
    archive(tmp_path / "empties.pt", b"\x80\x02" + b"}" * (MAX_HEADER - 3) + b".")
    torch.save({"ema": {"w": torch.zeros(4)}}, tmp_path / "bomb.pt")
    rewrite(tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED, {"bomb/data/0": b"\0" * (1 << 29)})
    paths = sorted(map(str, tmp_path.iterdir()))
    result = fork_server().run("-c", LIMITED, *paths)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("refused:")]
    assert len(lines) == len(paths) == 6, result.stdout + result.stderr
    assert not any("MemoryError" in line or "allocate" in line for line in lines)


@pytest.mark.parametrize("name", ["NaN", "shared memory", "invented blocks"])
def test_command_rejects_files_with_one_line(name, tmp_path, capsys):
    saved(tmp_path / "a.pt", {"ema": WEIGHTS[name][0]})
    tiny_vae().save_pretrained(tmp_path / "vae")
    before = sorted(tmp_path.iterdir())
    command = ["convert", "--checkpoint", "a.pt", "--dataset", "rt1", "--vae", "vae", "--output", "out"]
    command = [str(tmp_path / word) if word in ("a.pt", "vae", "out") else word for word in command]
    command += ["--config", "num_attention_heads=3", "sample_height=12", "sample_width=16"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("irasim: error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
