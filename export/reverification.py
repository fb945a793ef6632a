"""The parity check of an export, again, on a bundle that exists."""

from pathlib import Path

from edgeprune.bundle import Bundle
from edgeprune.checkpoint import load_checkpoint
from edgeprune.checkpoint_weights import release_pages
from edgeprune.errors import BundleError
from edgeprune.export.exporter import DTYPES, FUSED_OPSET, check_prompts, checkpoint_hash
from edgeprune.export.parity import check_graph, record_cases, reference_arithmetic
from edgeprune.manifest import ParityEntry
from edgeprune.prune.registry import method_from_parameters
from edgeprune.runtimes.preprocessing_kinds import preprocessing_from_json
from edgeprune.runtimes.prompt import PromptFormat


def compare_with_checkpoint(
    bundle: Bundle, checkpoint: Path, clip: str | Path | None
) -> dict[str, ParityEntry]:
    """Compare every graph with the torch reference of the checkpoint.

    Raises:
        BundleError: The bundle was exported from another checkpoint, or is quantized.
        ParityError: A graph differs.
    """
    manifest = bundle.manifest
    if manifest.quantization is not None:
        raise BundleError(
            "a quantized bundle differs from its checkpoint: compare the one that it was made from, "
            "edgeprune inspect shows what quantizing changed"
        )
    if checkpoint_hash(checkpoint) != manifest.source.sha256:
        raise BundleError(
            f"{checkpoint} is not the checkpoint of this bundle ('{manifest.source.name}'), or it was changed since: "
            "give the original or export again"
        )
    model = load_checkpoint(
        checkpoint,
        methods=[method_from_parameters(entry.method, entry.parameters) for entry in manifest.pruning],
        clip=clip,
        dtype=DTYPES[manifest.dtype],
        fused_rotary=manifest.opset >= FUSED_OPSET,
    )
    with reference_arithmetic(model):
        prompts = check_prompts(
            model,
            preprocessing_from_json(manifest.preprocessing),
            PromptFormat.from_json(manifest.prompt),
            bundle.path,
            manifest.probe,
            (),
        )
        cases = record_cases(model, prompts)
    release_pages(model.model.parameters())
    return {
        name: check_graph(bundle.file(graph.file), cases.get(name, []), model.dtype)
        for name, graph in manifest.graphs.items()
    }
