"""Read untrusted weight files: no code is executed, and memory is bounded by the file size.

A `.pt` file is first read as inert data: the zip archive must have the exact form that `torch.save` writes, so that every
reader sees the same records, and the pickle may only describe containers, tensors and settings. Only then is it loaded, by
`torch.load(weights_only=True, mmap=True)`, which maps the tensors into memory without a copy.
"""

from __future__ import annotations

import _compat_pickle
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

MAX_HEADER = 1 << 21
"""Maximum size of a pickle or a safetensors header in bytes. Reading it takes up to 200 times as much memory."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STORAGES = {  # bytes per element; other storages are rejected
    "torch.FloatStorage": 4,
    "torch.DoubleStorage": 8,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
    "torch.ComplexFloatStorage": 8,
    "torch.ComplexDoubleStorage": 16,
}
SETTINGS_MODULES = ("omegaconf", "typing", "argparse", "pathlib", "numpy")
SETTINGS_NAMES = {f"builtins.{kind}" for kind in ("dict", "list", "tuple", "int", "float", "str", "bool", "object")}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")


class Settings:
    """Inert replacement for a settings object, such as an OmegaConf container. It discards the contents."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Settings:
        """Accept the arguments of any class."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Ignore the state of the pickled object."""


def settings_dict(*args: Any) -> dict:
    """Return an empty replacement for a `collections.defaultdict`."""
    return {}


@dataclass(frozen=True)
class Global:
    """A name that a pickle imports."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A record of the archive that holds the elements of tensors."""

    numel: int


@dataclass
class PickleOutline:
    """Symbolic pickle evaluation without imports or calls.

    Only containers, tensors and settings are accepted.

    Args:
        records: Size in bytes of each record of the archive.
    """

    records: dict[str, int]
    settings: set[str] = field(default_factory=set)  # names that `torch.load` must replace with inert objects
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def read(self, pickled: bytes) -> None:
        """Evaluate a pickle.

        Raises:
            ValueError: If the pickle contains anything other than containers, tensors and settings, or a tensor that does not match
                the size of its record. A damaged pickle may raise an error of any type.
        """
        instructions: Iterator[tuple[Any, Any, Any]] = pickletools.genops(pickled)
        for opcode, argument, _ in instructions:
            name = opcode.name
            if name in CONSTANTS:
                self.stack.append(CONSTANTS[name]())
            elif name in LITERALS:
                self.stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self.stack.append(self._import(argument))
            elif name == "MARK":
                self.marks.append(self.stack)
                self.stack = []
            elif name.startswith("TUPLE"):
                items = self._items(name.removeprefix("TUPLE"))
                self.stack.append(tuple(items))
            elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
                self._fill(name)
            elif name in ("REDUCE", "NEWOBJ", "BUILD", "BINPERSID"):
                self._object(name)
            elif name not in ("PROTO", "STOP"):
                raise ValueError(f"it contains the pickle instruction {name}")

    def _items(self, number: str) -> list[Any]:
        """Pop the last `number` values of the stack, or those after the last mark if `number` is empty."""
        if number:
            items = self.stack[-int(number) :]
            del self.stack[-int(number) :]
            return items
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _import(self, argument: str) -> Global:
        module, _, name = argument.partition(" ")
        if (module, name) in _compat_pickle.NAME_MAPPING:  # names of Python 2, which pickle protocol 2 uses
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if module.split(".")[0] in SETTINGS_MODULES or full in SETTINGS_NAMES or full == "collections.defaultdict":
            self.settings.add(full)
        elif full not in STORAGES and full not in CALLS:
            raise ValueError(
                f"it refers to {full[:200]!r}, which is neither weights nor settings (for a file that you trust, save the weights "
                "alone with torch.save)"
            )
        return Global(full)

    def _fill(self, name: str) -> None:
        single = {"APPEND": "1", "SETITEM": "2"}
        items = self._items(single.get(name, ""))
        target = self.stack[-1]
        if type(target) is list and name.startswith("APPEND"):
            target.extend(items)
        elif type(target) is dict and name.startswith("SETITEM"):
            if not all(isinstance(key, str | int | float | bytes | None) for key in items[::2]):
                raise ValueError("it contains a dictionary whose keys are not names or numbers")
            target.update(zip(items[::2], items[1::2], strict=True))
        else:
            raise ValueError("it adds entries to an object that is not a list or dictionary")

    def _object(self, name: str) -> None:
        argument = self.stack.pop()
        if name == "BINPERSID":
            self.stack.append(self._storage(argument))
            return
        target = self.stack[-1]
        settings = isinstance(target, Global) and target.name in self.settings
        if name == "BUILD":  # torch's state dictionaries have the attribute `_metadata`
            if not isinstance(target, Settings) and not (type(target) is dict and list(argument) == ["_metadata"]):
                raise ValueError("it sets attributes of an object that is not a settings object")
        elif settings and target.name == "collections.defaultdict" and name == "REDUCE":
            self.stack[-1] = {}
        elif settings and target.name != "collections.defaultdict":
            self.stack[-1] = Settings()
        elif name == "REDUCE" and isinstance(target, Global) and target.name in CALLS:
            self.stack[-1] = CALLS[target.name](*argument)
        else:
            raise ValueError("it creates an object that is neither weights nor settings")

    def _storage(self, identifier: Any) -> Storage:
        """Check a reference `("storage", type, key, location, numel)` against the size of the record."""
        kind, storage, key, _, numel = identifier
        if kind != "storage" or storage.name not in STORAGES or type(key) is not str or type(numel) is not int:
            raise ValueError("it contains a reference that is not a storage")
        size = self.records.get(f"data/{key}")
        if size is None:
            raise ValueError(f"it refers to the record 'data/{key[:50]}', which does not exist")
        if size != numel * STORAGES[storage.name]:
            raise ValueError(f"it declares {numel} elements of {storage.name} in a record of {size} bytes")
        return Storage(numel)


def _tensor(
    storage: Storage, offset: int, shape: tuple, stride: tuple, requires_grad: bool, hooks: dict
) -> tuple[int, ...]:
    """Return the shape of a tensor after checking its layout and size against its storage."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or len(shape) != len(stride) or {*map(type, numbers)} != {int}:
        raise ValueError("it contains a tensor with an invalid storage, offset, shape or stride")
    if min(numbers) < 0 or type(requires_grad) is not bool or hooks != {}:
        raise ValueError(
            "it contains a tensor with a negative offset, size or stride, with hooks or an invalid `requires_grad`"
        )
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if len(shape) > 8 or (0 not in shape and not (last < storage.numel and math.prod(shape) <= storage.numel)):
        raise ValueError(
            f"it declares a tensor that has more than 8 dimensions or exceeds its storage of {storage.numel} elements: shape "
            f"{shape}, stride {stride}"
        )
    return shape


def _ordered_dict() -> dict:
    return {}


def _parameter(shape: tuple, requires_grad: bool, hooks: dict) -> tuple:
    if type(shape) is not tuple or type(requires_grad) is not bool or hooks != {}:
        raise ValueError("it contains a parameter without a tensor, or with hooks or an invalid `requires_grad`")
    return shape


def _latin1(text: str, encoding: str) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise ValueError("it encodes an object that is not text")
    return text.encode(encoding)


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "_codecs.encode": _latin1,  # bytes of numpy scalars
}
"""Functions that a pickle may call, with their replacements in an outline."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `torch.save` wrote; see `read_torch_file`.

    Returns:
        The top-level dictionary.

    Raises:
        ValueError: If `read_torch_file` cannot read the file, or the content is not a dictionary with string keys.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(type(key) is str for key in content):
        raise ValueError(f"{str(path)!r} contains no weights: it must contain a dictionary of tensors by name.")
    return content


def read_torch_file(path: Path) -> Any:
    """Read a file that `torch.save` wrote. No code in it is executed.

    Args:
        path: A zip archive of PyTorch 1.6 or newer.

    Returns:
        The content. Its tensors are mapped from the file; settings objects are inert.

    Raises:
        ValueError: If the file is missing, is not such an archive, is damaged, references code, or has inconsistent sizes.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "which is not a file" if path.exists() else "which does not exist"
        raise ValueError(f"`path` must be a checkpoint file, got {str(path)!r}, {found}.")
    try:
        records, pickled = _read_archive(path)
        outline = PickleOutline(records)
        outline.read(pickled)
        inert: list[Any] = [
            (settings_dict if name == "collections.defaultdict" else Settings, name) for name in outline.settings
        ]
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file raises almost any exception
        reason = str(error) if type(error) is ValueError else f"it is damaged ({type(error).__name__}: {error})"
        raise ValueError(f"{str(path)!r} is not a checkpoint that can be read safely: {reason[:500]}") from error
    return content


def _read_archive(path: Path) -> tuple[dict[str, int], bytes]:
    """Return the record sizes and the pickle of an archive of `torch.save`.

    Record names do not include the top folder of the archive.
    """
    size = path.stat().st_size
    directory = _directory_start(path, size)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        top = entries[0].filename.split("/")[0] + "/"
        names, folder = {entry.filename.casefold() for entry in entries}, top.casefold()
        if len(names) < len(entries) or not all(name.startswith(folder) for name in names):
            raise ValueError("it has records of the same name, or more than one top folder")
        if f"{folder}constants.pkl" in names or any(name.startswith(f"{folder}code/") for name in names):
            raise ValueError("it is a TorchScript program, not a checkpoint: loading it would run its code")
        stored = all(
            entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size for entry in entries
        )
        ends = [entry.header_offset + 30 + entry.file_size for entry in entries]
        if not stored or max(ends) > directory or sum(entry.file_size for entry in entries) > size:
            raise ValueError("it has compressed or overlapping records: save it again with torch.save")
        records = {entry.filename.removeprefix(top): entry.file_size for entry in entries}
        if not 0 < records.get("data.pkl", 0) <= MAX_HEADER:
            raise ValueError(f"its data.pkl must have 1 to {MAX_HEADER} bytes, got {records.get('data.pkl', 0)}")
        return records, archive.read(f"{top}data.pkl")


def _directory_start(path: Path, size: int) -> int:
    """Return the offset of the central directory of a zip archive without additional bytes.

    There must be no bytes before, after or between its parts. `torch.save` ends an archive with the zip64 end record
    (56 bytes), its locator (20) and the end record (22).
    """
    message = (
        "it is not one zip archive of torch.save (PyTorch 1.6 or newer) without bytes before or after it; save an older file "
        "again with torch.save"
    )
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(size - 98, 0))
        tail = file.read()
    if start != b"PK\x03\x04" or len(tail) != 98:
        raise ValueError(message)
    signature64, *_, entries, total_entries, length, offset = struct.unpack("<4sQ2H2L4Q", tail[:56])
    locator, disk, end64, disks = struct.unpack("<4sLQL", tail[56:76])
    signature, *_, few, total_few, short_length, short_offset, comment = struct.unpack("<4s4H2LH", tail[76:])
    signatures = (signature64, locator, signature) == (b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06")
    places = (disk, disks, end64, offset + length, comment) == (0, 1, size - 98, size - 98, 0)
    counts = entries == total_entries and few == total_few == min(entries, 0xFFFF)
    short = (short_length, short_offset) == (min(length, 0xFFFFFFFF), min(offset, 0xFFFFFFFF))
    if not (signatures and places and counts and short):
        raise ValueError(message)
    return offset


def check_weights(state: dict[str, torch.Tensor], path: Path) -> None:
    """Check names, types and total size of weights. Values are checked after the conversion to float32.

    Raises:
        ValueError: If a name cannot be that of a parameter, a tensor is not a dense floating-point tensor of 16 to 64 bits on the
            CPU, or the tensors exceed the size of the file, because they share memory.
    """
    for key, tensor in state.items():
        if type(key) is not str or not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", key):
            raise ValueError(f"{str(path)!r} has a tensor with an invalid name, {str(key)[:50]!r}.")
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(
                f"tensor {key!r} in {str(path)!r} must be dense and floating-point with 16 to 64 bits, got {tensor.dtype} "
                f"({tensor.layout})."
            )
    if (size := sum(tensor.nbytes for tensor in state.values())) > path.stat().st_size:
        raise ValueError(
            f"{str(path)!r} has weights that share memory: they need {size} bytes, more than the file has."
        )


def find_nonfinite_weight(module: torch.nn.Module) -> str | None:
    """Return the name of a weight that is NaN or infinite, or None. The cost is one sum per tensor.

    Weights on the meta device, 8-bit weights and quantized weights are not checked.
    """
    for key, value in module.state_dict(keep_vars=True).items():
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_floating_point() and value.itemsize > 1
        if not plain or value.is_meta or torch.isfinite(value.detach().sum(dtype=torch.float32)):
            continue
        if not torch.isfinite(value).all():  # the sum of large finite values may overflow
            return key
    return None


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file, or all safetensors files of a folder except hidden ones.

    Raises:
        ValueError: If a file is missing or damaged, a tensor occurs twice, or `check_weights` rejects a tensor.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"`path` must be a safetensors file or a folder that contains such files, got {str(path)!r}.")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        try:
            if header > (most := min(MAX_HEADER, file.stat().st_size)):
                raise ValueError(f"its header has {header} bytes, more than {most}")
            part = load_file(file)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(
                f"{str(file)!r} is not a safetensors file (for shards, pass the folder instead of the index): {error}"
            ) from error
        check_weights(part, file)
        if duplicates := sorted(state.keys() & part.keys()):
            raise ValueError(
                f"{str(path)!r} contains {len(duplicates)} tensors more than once, first {duplicates[0]}: pass one file, or "
                "keep one set of shards in the folder."
            )
        state |= part
    return state
