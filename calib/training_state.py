"""The state of an unfinished training on disk: safetensors and JSON, replaced as a whole."""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from edgeprune.checkpoint_weights import open_weights, read_json
from edgeprune.errors import CheckpointError, DataError
from edgeprune.whole_file import write_whole

STATE_FILE = "state.json"
_FORMAT = 1

C = TypeVar("C")


class StateStore:
    """A folder with one state: weights, the optimizer's moments, curves, and what the training was asked for.

    There is no state of random numbers: every step draws from seeds of its own number.

    Args:
        folder: Made when the first state is saved.
        asked: What has to be the same for a training to go on, as JSON.
        writes: Whether this process is the one that saves.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], *, writes: bool = True) -> None:
        self.folder = folder
        self._asked: dict[str, Any] = json.loads(json.dumps(dict(asked)))
        self._writes = writes

    def check(self) -> None:
        """Refuse to go on with something else.

        Raises:
            DataError: The state there is damaged, or of a training that was asked for something else.
        """
        path = self.folder / STATE_FILE
        if not path.is_file():
            # A first state that was not finished leaves weights at most.
            if self.folder.exists() and any("state-" not in each.name for each in self._files()):
                raise DataError(f"{self.folder} is no unfinished training: move it away")
            return
        asked = self._read().get("asked")
        differing = [
            name
            for name in self._asked
            if not isinstance(asked, dict) or asked.get(name) != self._asked[name]
        ]
        if differing:
            raise DataError(
                f"{self.folder} holds an unfinished training with another {differing[0]}: repeat its settings, or give "
                "--restart to forget it"
            )

    def forget(self) -> None:
        """Remove the state, if it is one."""
        if self._writes and self.folder.is_dir() and all("state" in path.name for path in self._files()):
            shutil.rmtree(self.folder)

    def load(
        self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, curves: type[C]
    ) -> C | None:
        """Put the state into parameters and optimizer; returns the curves, None where there is no state.

        Raises:
            DataError: It is damaged.
        """
        if not (self.folder / STATE_FILE).is_file():
            return None
        data = self._read()
        try:
            tensors = open_weights([self.folder / str(data["weights"])])
            for name, parameter in parameters.items():
                parameter.data.copy_(tensors[name])
            moments: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith("optimizer."):
                    _, index, name = key.split(".")
                    moments.setdefault(int(index), {})[name] = tensor.clone()
            optimizer.load_state_dict(
                {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
            )
            return curves(**data["curves"])
        except (CheckpointError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._damaged() from error

    def save(
        self, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, curves: object
    ) -> None:
        """Replace the state.

        Raises:
            DataError: It cannot be written.
        """
        if not self._writes:
            return
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        for index, moments in optimizer.state_dict()["state"].items():
            for name, tensor in moments.items():
                tensors[f"optimizer.{index}.{name}"] = tensor.detach().cpu().contiguous()
        weights = f"state-{step}.safetensors"
        text = json.dumps(
            {"format": _FORMAT, "asked": self._asked, "weights": weights, "curves": vars(curves)}
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / weights, save(tensors))
            write_whole(self.folder / STATE_FILE, text.encode())
        except OSError as error:
            raise DataError(
                f"{self.folder} cannot be written ({error.strerror or error}): free disk space or choose another output"
            ) from error
        for path in self.folder.glob("state-*.safetensors"):
            if path.name != weights:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _files(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else [self.folder]

    def _read(self) -> dict[str, Any]:
        try:
            data = read_json(self.folder / STATE_FILE)
        except CheckpointError as error:
            raise self._damaged() from error
        if data.get("format") != _FORMAT:
            raise self._damaged()
        return data

    def _damaged(self) -> DataError:
        return DataError(f"{self.folder} holds a damaged state: give --restart to begin anew")
