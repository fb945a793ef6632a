"""Engines and ONNX Runtime's providers on an NVIDIA GPU, compared with ONNX Runtime on the CPU.

Not collected by itself: ``make test-gpu`` runs it where there is a GPU, with TF32 switched off, because the kept
indices must be equal. What is not installed is skipped and says what installs it.
"""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_comparison import CPU, KINDS, PICTURES, QUESTION, answers, compare_answers, compare_logits

from edgeprune.errors import BackendError, EngineError, MissingExtraError
from edgeprune.export.exporter import export
from edgeprune.manifest import MANIFEST_FILE, manifest_from_json
from edgeprune.runtimes.build_options import BuildOptions
from edgeprune.runtimes.engine_build import build
from edgeprune.runtimes.engine_profiles import ONE, SPLIT
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.session import open_session

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
EXAMPLE_QUESTION = "which letter is in the green diamond?"
WAYS: dict[str, dict[str, Any]] = {
    "engines": {"backend": "tensorrt"},
    "cuda": {"provider": "cuda"},
    "tensorrt provider": {"provider": "tensorrt"},
    "tensorrt_rtx provider": {"provider": "tensorrt_rtx"},
}


@pytest.fixture(params=WAYS)
def way(request) -> dict[str, Any]:
    """How to run; skipped where a package or the provider is missing, but not where it fails."""
    options = WAYS[request.param]
    if "provider" in options:
        try:
            OnnxRuntimeBackend(options["provider"])
        except (BackendError, MissingExtraError) as error:
            pytest.skip(str(error))
    return options


def built(bundle: Path, folder: Path, strategy: str) -> Path:
    """A copy of a bundle with engines for this GPU."""
    copy = Path(shutil.copytree(bundle, folder / bundle.name))
    try:
        engines = build(copy, BuildOptions("this", profile_choice=strategy))
    except EngineError as error:
        if "is installed" in str(error) or "pip install" in str(error):
            pytest.skip(str(error))
        raise
    assert manifest_from_json(copy / MANIFEST_FILE).engines["this"] == engines
    return copy


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """A method and its bundle, and a folder for the one with engines."""
    return request.param, request.getfixturevalue(f"{request.param}_bundle"), tmp_path_factory.mktemp("built")


@pytest.fixture
def bundle(kind, way) -> Iterator[Path]:
    _, bundle, folder = kind
    if way.get("backend") == "tensorrt":
        done = folder / bundle.name
        yield done if done.exists() else built(bundle, folder, SPLIT)
        return
    yield bundle


def test_answers_are_those_of_the_cpu(kind, bundle, way):
    compare_answers(bundle, kind[0], **way)


def test_logits_are_those_of_the_cpu(bundle, way):
    compare_logits(bundle, **way)


@pytest.mark.parametrize("strategy", [ONE, SPLIT])
def test_the_example_with_its_engines(tmp_path, strategy):
    """The checkpoint that really answers questions about pictures."""
    exported = export(SHAPES / "checkpoint", tmp_path / "shapes").path
    folder = built(exported, tmp_path / "built", strategy)
    pictures = sorted((SHAPES / "pictures").glob("scene*.png"))
    assert pictures
    for picture in pictures:
        ours = answers(folder, pictures=[picture], question=EXAMPLE_QUESTION, backend="tensorrt")
        assert ours == answers(folder, pictures=[picture], question=EXAMPLE_QUESTION, **CPU)


def test_sessions_give_their_memory_back(tmp_path, atp_bundle):
    from cuda.bindings import runtime

    folder = built(atp_bundle, tmp_path, SPLIT)
    free: list[int] = []
    for _ in range(4):
        with open_session(folder, backend="tensorrt") as session:
            session.answer(PICTURES[:1], QUESTION)
        del session
        gc.collect()
        free.append(runtime.cudaMemGetInfo()[1])
    # What CUDA and TensorRT load once stays.
    assert free[-1] >= free[0] - 16 * 2**20
