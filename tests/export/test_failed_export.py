"""What an export that fails or is interrupted leaves behind."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgeprune.bundle import Bundle
from edgeprune.errors import BundleError, CheckpointError, ParityError, PruningError
from edgeprune.export.exporter import export
from edgeprune.export.passes import fold_transposed_weights
from edgeprune.manifest import MANIFEST_FILE
from edgeprune.prune.random_tokens import RandomTokens
from edgeprune.runtimes.session import open_session


@pytest.fixture
def older(unpruned_bundle, tmp_path) -> Path:
    """A bundle at the place where the next one is to be written."""
    return Path(shutil.copytree(unpruned_bundle, tmp_path / "out" / "bundle"))


def beside(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir()}


def answers(path: Path) -> bool:
    with open_session(path, threads=1) as session:
        return bool(session.answer([np.zeros((24, 24, 3), np.uint8)], "What is it?").token_ids)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "int8"}, CheckpointError, "dtype 'int8' is unknown, allowed: float32, float16"),
        ({"opset": 19}, CheckpointError, "opset 19 is out of range, allowed: 20 … 23"),
        ({"opset": 24}, CheckpointError, "opset 24"),
        ({"methods": [RandomTokens(keep=99)]}, PruningError, "a picture has 36"),
    ],
)
def test_refused_before_anything_is_written(tied_folder, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        export(tied_folder, tmp_path / "new" / "bundle", **arguments)
    assert not (tmp_path / "new").exists()


def test_foreign_folder_is_refused_and_untouched(tied_folder, tmp_path):
    target = tmp_path / "out" / "photos"
    target.mkdir(parents=True)
    (target / "cat.png").write_text("meow")
    with pytest.raises(BundleError, match="exists and is no bundle"):
        export(tied_folder, target)
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("cat.png", "meow")]
    assert beside(target) == {"photos"}


def test_checkpoint_is_not_overwritten(tied_folder):
    before = {path.name for path in tied_folder.iterdir()}
    with pytest.raises(BundleError, match="exists and is no bundle"):
        export(tied_folder, tied_folder)
    assert {path.name for path in tied_folder.iterdir()} == before


def test_older_bundle_is_replaced(tied_folder, older):
    (older / "left over").write_text("")
    opened = export(tied_folder, older, methods=[RandomTokens(keep=5)])
    assert opened.manifest == Bundle.open(older, check_all=True).manifest
    assert opened.manifest.geometry.tokens_per_image == 5
    assert not (older / "left over").exists()
    assert beside(older) == {"bundle"}
    assert answers(older)


@dataclass
class Interrupting:
    """Progress that interrupts the export before a step."""

    where: tuple[str, str]

    def graph(self, name: str, step: str, done: int, steps: int) -> None:  # noqa: ARG002 - the protocol's
        if (name, step) == self.where:
            raise KeyboardInterrupt


def test_interrupt_in_the_middle_leaves_the_older_bundle(tied_folder, older):
    manifest = Bundle.open(older).manifest
    with pytest.raises(KeyboardInterrupt):
        export(tied_folder, older, progress=Interrupting(("vision", "compare")))
    assert beside(older) == {"bundle"}
    assert Bundle.open(older, check_all=True).manifest == manifest
    assert answers(older)


@pytest.mark.parametrize("graph", ["vision", "embed"])
def test_interrupted_command(tied_folder, older, graph):
    """Ctrl-C while a graph is traced, written or checked."""
    manifest = (older / MANIFEST_FILE).read_text()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeprune.cli", "export", str(tied_folder), "-o", str(older)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell that runs the tests in the background makes its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 600
        while not list(older.parent.glob(f".bundle.partial-*/{graph}.onnx.data")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "edgeprune: interrupted; nothing was left half-written"
    assert "Traceback" not in errors
    assert beside(older) == {"bundle"}
    assert (older / MANIFEST_FILE).read_text() == manifest
    Bundle.open(older, check_all=True)


def test_graph_that_computes_something_else_is_not_exported(tied_folder, older, monkeypatch):
    def damage(model) -> None:
        """One weight of the tower's patches is another."""
        name = next(n for n in model.graph.initializers if "patch_embedding" in n)
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array.flat[0] += 1
        value.const_value = ir.tensor(array, name=name)

    monkeypatch.setattr(fold_transposed_weights, "apply", damage)
    with pytest.raises(ParityError, match=r"vision\.onnx, output patch_features"):
        export(tied_folder, older)
    assert beside(older) == {"bundle"}
    Bundle.open(older, check_all=True)


def test_full_disk(tied_folder, tmp_path):
    """A file system of 32 KiB: the weights of the vision tower do not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(BundleError, match=r"No space left on device.*free disk space") as caught:
            export(tied_folder, disk / "bundle")
        assert "\n" not in str(caught.value)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_size_limit(tied_folder, older):
    """The same without root: files beyond 32 KiB are refused by the system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, limits[1]))
    try:
        with pytest.raises(BundleError, match="File too large"):
            export(tied_folder, older)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert beside(older) == {"bundle"}
    Bundle.open(older, check_all=True)


def test_killed_export_is_cleared_away_by_the_next(tied_folder, tmp_path):
    """What a killed process leaves is a folder with its id; only the next export can remove it."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    abandoned = tmp_path / f".bundle.partial-{process.pid}"
    abandoned.mkdir()
    (abandoned / "vision.onnx.data").write_bytes(bytes(100))
    with pytest.raises(KeyboardInterrupt):
        export(tied_folder, tmp_path / "bundle", progress=Interrupting(("vision", "trace")))
    assert not list(tmp_path.iterdir())


def test_clip_without_tokenizer(ivtp_folder, clip_folder, tmp_path):
    """transformers would make up a tokenizer that knows no word."""
    clip = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    (clip / "tokenizer.json").unlink()
    with pytest.raises(PruningError, match="has no tokenizer: save the one of CLIP there"):
        export(ivtp_folder, tmp_path / "bundle", clip=clip)
    assert beside(tmp_path / "bundle") == {"clip"}
