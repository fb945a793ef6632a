"""The checkpoint that a training leaves: the original's files with the learned weights beside or in them."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from edgeprune.checkpoint import PRUNING_FILE, PRUNING_WEIGHTS_FILE
from edgeprune.checkpoint_weights import weight_files
from edgeprune.models.families import Family
from edgeprune.prune.method import PruningMethod
from edgeprune.prune.registry import methods_to_json

CURVES_FILE = "training.json"
PLOT_FILE = "training.png"


def write_fitted(
    folder: Path,
    source: Path,
    method: PruningMethod,
    weights: Mapping[str, Tensor],
    decoder: Mapping[str, Tensor],
    family: Family,
) -> None:
    """Fill an empty folder.

    Files of weights that stay as they are share the original's disk space where the file system can (hard links).

    Args:
        folder: The folder.
        source: The original checkpoint; nothing in it is touched.
        method: What ``pruning.json`` will name, alone.
        weights: What ``pruning.safetensors`` will hold.
        decoder: The language model's tensors by the model's names, where it was trained; empty = as it was.
        family: Of the checkpoint.

    Raises:
        OSError: Something cannot be read or written.
    """
    replaced = {PRUNING_FILE, PRUNING_WEIGHTS_FILE, CURVES_FILE, PLOT_FILE}
    rewritten = {path.name: path for path in weight_files(source)} if decoder else {}
    for path in sorted(source.iterdir()):
        if path.name in replaced or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, copy_function=_link_or_copy)
        elif path.name in rewritten:
            _rewrite(path, folder / path.name, decoder, family)
        else:
            _link_or_copy(str(path), str(folder / path.name))
    text = json.dumps({"methods": methods_to_json([method])}, indent=2)
    (folder / PRUNING_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / PRUNING_WEIGHTS_FILE).write_bytes(save(dict(weights)))


def _rewrite(source: Path, target: Path, decoder: Mapping[str, Tensor], family: Family) -> None:
    """Copy one file of weights with the trained tensors in place of the old ones, in the types of the old ones."""
    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt", device="cpu") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 - the handle is no mapping
            old = file.get_tensor(name)
            new = decoder.get(family.canonical_name(name))
            tensors[name] = old if new is None else new.to(old.dtype).contiguous()
    save_file(tensors, target, metadata=metadata)
    shutil.copymode(source, target)


def _link_or_copy(source: str, target: str) -> None:
    """Weights are linked; what a user may edit in the new folder is copied."""
    real = os.path.realpath(source)
    if source.endswith(".safetensors"):
        try:
            os.link(real, target)
        except OSError:
            pass
        else:
            return
    shutil.copy2(real, target)
