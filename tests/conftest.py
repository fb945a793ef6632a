"""Checkpoints and bundles that many tests share: read-only; a test that edits one takes ``llava_copy``."""

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


@pytest.fixture(scope="session")
def llava_next_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpruned LLaVA-NeXT checkpoint (``tiny_llava_next.TINY_NEXT``)."""
    from tiny_llava_next import build_llava_next

    return build_llava_next(tmp_path_factory.mktemp("checkpoint") / "llava-next")


@pytest.fixture
def llava_next_copy(llava_next_folder: Path, tmp_path: Path) -> Path:
    """A copy of ``llava_next_folder`` to edit."""
    return Path(shutil.copytree(llava_next_folder, tmp_path / "llava-next"))


@pytest.fixture(scope="session")
def atp_bundle(atp_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``atp_folder`` exported."""
    from edgeprune.export.exporter import export

    return export(atp_folder, tmp_path_factory.mktemp("bundle") / "atp").path


@pytest.fixture(scope="session")
def atp_float16_bundle(atp_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``atp_folder`` exported in half precision."""
    from edgeprune.export.exporter import export

    return export(atp_folder, tmp_path_factory.mktemp("bundle") / "atp-float16", dtype="float16").path


@pytest.fixture(scope="session")
def ivtp_folder(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA checkpoint with IVTP: 36 → 20 tokens in the tower, → 10 in two groups of decoder layers."""
    from tiny_checkpoints import write_pruning

    folder = Path(shutil.copytree(llava_folder, tmp_path_factory.mktemp("checkpoint") / "ivtp"))
    # Random towers agree on little; a threshold of 0 splits the instruction into relevant and other tokens.
    parameters = {
        "tokens_after_vision": 20,
        "tokens_after_decoder": 10,
        "decoder_layers": 4,
        "group_size": 2,
        "relevance_threshold": 0.0,
    }
    return write_pruning(folder, [{"method": "ivtp", "parameters": parameters}])


@pytest.fixture(scope="session")
def ivtp_bundle(ivtp_folder: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ivtp_folder`` exported with its CLIP guide."""
    from edgeprune.export.exporter import export

    return export(ivtp_folder, tmp_path_factory.mktemp("bundle") / "ivtp", clip=clip_folder).path


@pytest.fixture(scope="session")
def random_folder(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA checkpoint with 9 random tokens per picture."""
    from tiny_checkpoints import write_pruning

    folder = Path(shutil.copytree(llava_folder, tmp_path_factory.mktemp("checkpoint") / "random"))
    return write_pruning(folder, [{"method": "random", "parameters": {"keep": 9}}])


@pytest.fixture(scope="session")
def random_bundle(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``random_folder`` exported at opset 20."""
    from edgeprune.export.exporter import export

    return export(random_folder, tmp_path_factory.mktemp("bundle") / "random", opset=20).path


@pytest.fixture(scope="session")
def combined_folder(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA checkpoint with two methods: AdaptPrune, then PyramidDrop, which renumbers positions."""
    from tiny_checkpoints import write_pruning

    folder = Path(shutil.copytree(llava_folder, tmp_path_factory.mktemp("checkpoint") / "combined"))
    pyramid = {"layers": [2, 3], "keep_ratios": [0.3, 0.1], "positions": "upstream"}
    return write_pruning(
        folder,
        [
            {"method": "adaptprune", "parameters": {"layer": 1, "keep": 18}},
            {"method": "pyramiddrop", "parameters": pyramid},
        ],
    )


@pytest.fixture(scope="session")
def combined_bundle(combined_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``combined_folder`` exported."""
    from edgeprune.export.exporter import export

    return export(combined_folder, tmp_path_factory.mktemp("bundle") / "combined").path


@pytest.fixture(scope="session")
def sparsevlm_folder(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA checkpoint with SparseVLM, which merges tokens and numbers rows anew."""
    from tiny_checkpoints import write_pruning

    folder = Path(shutil.copytree(llava_folder, tmp_path_factory.mktemp("checkpoint") / "sparsevlm"))
    parameters = {"layers": [0, 2], "keep": [20, 9], "positions": "upstream"}
    return write_pruning(folder, [{"method": "sparsevlm", "parameters": parameters}])


@pytest.fixture(scope="session")
def sparsevlm_bundle(sparsevlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``sparsevlm_folder`` exported."""
    from edgeprune.export.exporter import export

    return export(sparsevlm_folder, tmp_path_factory.mktemp("bundle") / "sparsevlm").path


@pytest.fixture(scope="session")
def cdpruner_folder(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA checkpoint with CDPruner, which numbers rows anew before layer 0, and DART before layer 2."""
    from tiny_checkpoints import write_pruning

    folder = Path(shutil.copytree(llava_folder, tmp_path_factory.mktemp("checkpoint") / "cdpruner"))
    cdpruner = {"method": "cdpruner", "parameters": {"preset": "openvino", "keep": 20}}
    dart = {"method": "dart", "parameters": {"preset": "paper", "keep": 9}}
    return write_pruning(folder, [cdpruner, dart])


@pytest.fixture(scope="session")
def cdpruner_bundle(cdpruner_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cdpruner_folder`` exported."""
    from edgeprune.export.exporter import export

    return export(cdpruner_folder, tmp_path_factory.mktemp("bundle") / "cdpruner").path


@pytest.fixture(scope="session")
def dart_folder(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA checkpoint with DART on the embedded prompt, its only site."""
    from tiny_checkpoints import write_pruning

    folder = Path(shutil.copytree(llava_folder, tmp_path_factory.mktemp("checkpoint") / "dart"))
    return write_pruning(folder, [{"method": "dart", "parameters": {"preset": "edge-llm", "keep": 13}}])


@pytest.fixture(scope="session")
def dart_bundle(dart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dart_folder`` exported."""
    from edgeprune.export.exporter import export

    return export(dart_folder, tmp_path_factory.mktemp("bundle") / "dart").path


@pytest.fixture(scope="session")
def dyrate_folder(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA checkpoint with DyRate before layer 2, whose rate grows with the attention to the response."""
    from tiny_checkpoints import add_dyrate

    folder = Path(shutil.copytree(llava_folder, tmp_path_factory.mktemp("checkpoint") / "dyrate"))
    return add_dyrate(folder, layer=2)


@pytest.fixture(scope="session")
def dyrate_bundle(dyrate_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dyrate_folder`` exported."""
    from edgeprune.export.exporter import export

    return export(dyrate_folder, tmp_path_factory.mktemp("bundle") / "dyrate").path


@pytest.fixture(scope="session")
def host_folder(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA checkpoint with two sites at which the host may choose; by itself it keeps 60 and 36 %."""
    from tiny_checkpoints import write_pruning

    folder = Path(shutil.copytree(llava_folder, tmp_path_factory.mktemp("checkpoint") / "host"))
    parameters = {"layers": [1, 3], "keep_ratio": 0.6}
    return write_pruning(folder, [{"method": "host", "parameters": parameters}])


@pytest.fixture(scope="session")
def host_bundle(host_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``host_folder`` exported."""
    from edgeprune.export.exporter import export

    return export(host_folder, tmp_path_factory.mktemp("bundle") / "host").path


@pytest.fixture(scope="session")
def tower_folder(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA checkpoint with ToMe in the vision tower and FastV in the decoder."""
    from tiny_checkpoints import write_pruning

    folder = Path(shutil.copytree(llava_folder, tmp_path_factory.mktemp("checkpoint") / "tower"))
    fastv = {"method": "fastv", "parameters": {"layer": 2, "keep": 9}}
    return write_pruning(folder, [{"method": "tome", "parameters": {"r": 5}}, fastv])


@pytest.fixture(scope="session")
def tower_bundle(tower_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tower_folder`` exported."""
    from edgeprune.export.exporter import export

    return export(tower_folder, tmp_path_factory.mktemp("bundle") / "tower").path


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpruned checkpoint with tied embeddings."""
    from tiny_checkpoints import TinyLlava, build_llava

    spec = TinyLlava(tied=True, layers=2, vision_layers=2, seed=3)
    return build_llava(tmp_path_factory.mktemp("checkpoint") / "tied", spec)


@pytest.fixture(scope="session")
def unpruned_bundle(tied_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tied_folder`` exported."""
    from edgeprune.export.exporter import export

    return export(tied_folder, tmp_path_factory.mktemp("bundle") / "unpruned").path
