"""Is a bundle whole, and does it still compute what its checkpoint computes?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.bundle import Bundle
from edgeprune.errors import BundleError
from edgeprune.extras import require
from edgeprune.manifest import ParityEntry
from edgeprune.runtimes.session import open_session


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        files: Files whose hash is right.
        graphs: Graphs that ONNX's checker accepts and ONNX Runtime opens.
        parity: Measured differences from the torch reference by graph; empty without a checkpoint.
    """

    files: int
    graphs: int
    parity: dict[str, ParityEntry]


def verify(
    bundle: str | Path, *, checkpoint: str | Path | None = None, clip: str | Path | None = None
) -> Verification:
    """Check a bundle: every hash, every graph, and, with its checkpoint, the parity again.

    Args:
        bundle: The folder.
        checkpoint: The checkpoint that it was exported from.
        clip: The CLIP checkpoint, if the pruning needs it, or the checkpoint lacks its vision tower.

    Raises:
        BundleError: A file is missing or changed, or the checkpoint is another one.
        ParityError: A graph does not compute what the reference computes.
        MissingExtraError: The check needs the export extra.
    """
    opened = Bundle.open(bundle, check_all=True)
    onnx: Any = require("onnx", extra="export", purpose="to check graphs")
    for name, graph in opened.manifest.graphs.items():
        try:
            onnx.checker.check_model(str(opened.file(graph.file)), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise BundleError(
                f"the graph '{name}' is not valid ONNX ({error}): export the checkpoint again"
            ) from error
    # Opening a session opens every graph.
    open_session(bundle).close()
    parity: dict[str, ParityEntry] = {}
    if checkpoint is not None:
        require("torch", extra="export", purpose="to compare with the checkpoint")
        from edgeprune.export.reverification import compare_with_checkpoint

        parity = compare_with_checkpoint(opened, Path(checkpoint), clip)
    return Verification(len(opened.manifest.files()), len(opened.manifest.graphs), parity)
