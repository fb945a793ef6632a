"""Reading safetensors: one file or shards with an index, memory-mapped, checked before anything is used."""

import ctypes
import json
import mmap
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import CheckpointError
from edgeprune.extras import require

FLOAT_DTYPES = ("F32", "F16", "BF16")
MAX_LISTED = 12
# madvise's MADV_PAGEOUT (Linux 5.4): unlike MADV_DONTNEED it never loses what was written to a page.
_PAGEOUT = 21


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing or is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): copy the file again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object: copy the file again")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the order of its index.

    Raises:
        CheckpointError: There are none, or the index names a missing one.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no usable 'weight_map': copy the file again")
        shards = [folder / name for name in dict.fromkeys(weight_map.values())]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(shards)} shards are missing in {folder}: {_listed(missing)}; copy them there"
            )
        return shards
    if single.is_file():
        return [single]
    if list(folder.glob("*.bin")):
        raise CheckpointError(f"{folder} holds .bin weights: save it again with safe_serialization=True")
    raise CheckpointError(f"{folder} holds no model.safetensors: is it a Hugging Face checkpoint?")


def open_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of the files, memory-mapped: nothing is read before it is used.

    Raises:
        CheckpointError: A file is truncated or no safetensors file.
    """
    safetensors = require("safetensors", extra="export", purpose="to read checkpoints")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                    tensors[name] = file.get_tensor(name)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}): copy the file again") from error
    return tensors


def fit_to_shapes(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str, remedy: str
) -> dict[str, Tensor]:
    """Pick the tensors of ``shapes`` and check them, all problems in one message.

    Args:
        tensors: What a file holds.
        shapes: What is needed.
        what: The file, for the message.
        remedy: What the user can do.

    Raises:
        CheckpointError: Tensors are missing, have other shapes, or are not floating point.
    """
    problems: list[str] = []
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"{name} is missing")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected a float type")
    if problems:
        raise CheckpointError(f"{what} does not fit: {_listed(problems)}; {remedy}")
    return {name: tensors[name] for name in shapes}


def assign_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, what: str
) -> None:
    """Give a module built on the meta device its weights, without a copy where the dtype is right already.

    Raises:
        CheckpointError: See :func:`fit_to_shapes`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    fitting = fit_to_shapes(
        tensors, shapes, what, "the config.json belongs to another checkpoint or weights are lost"
    )
    module.load_state_dict(
        {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in fitting.items()}, assign=True
    )
    module.requires_grad_(requires_grad=False)


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Give the memory back that reading memory-mapped weights took; whoever uses them again reads the file again.

    Linux only, and of files that the user may write; elsewhere nothing happens, and the system takes that memory when
    it needs it. Tensors that lie in no file are left alone.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    mapped = _mapped_files()
    for address, size in {(tensor.data_ptr(), tensor.nbytes) for tensor in tensors}:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and any(first <= address < last for first, last in mapped):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _PAGEOUT)


def _mapped_files() -> list[tuple[int, int]]:
    """First and behind-the-last address of everything that this process has mapped from a file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            first, last = addresses.split("-")
            ranges.append((int(first, 16), int(last, 16)))
    return ranges


def _listed(items: list[str]) -> str:
    shown = "; ".join(items[:MAX_LISTED])
    return shown if len(items) <= MAX_LISTED else f"{shown}; and {len(items) - MAX_LISTED} more"
