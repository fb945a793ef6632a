"""Checkpoints that many tests share. They are read-only: a test that edits one takes a copy (``llava_copy``)."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """Tiny tensors are slower on many threads, and tests run side by side."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpruned LLaVA checkpoint (``tiny_checkpoints.TINY``)."""
    from tiny_checkpoints import build_llava

    return build_llava(tmp_path_factory.mktemp("checkpoint") / "llava")


@pytest.fixture(scope="session")
def atp_folder(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with ATP before layers 1, 2 and 3."""
    from tiny_checkpoints import add_atp

    folder = tmp_path_factory.mktemp("checkpoint") / "atp"
    shutil.copytree(llava_folder, folder)
    return add_atp(folder, [1, 2, 3])


@pytest.fixture(scope="session")
def clip_folder(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP checkpoint with the vision tower of ``llava_folder``."""
    from tiny_checkpoints import build_clip

    return build_clip(tmp_path_factory.mktemp("checkpoint") / "clip", llava_folder)


@pytest.fixture
def llava_copy(llava_folder: Path, tmp_path: Path) -> Path:
    """A copy of ``llava_folder`` to edit."""
    return Path(shutil.copytree(llava_folder, tmp_path / "llava"))
