"""A small consistent manifest with its files, for tests that need no graph that runs."""

from dataclasses import replace
from pathlib import Path

from geometries import geometry_entry

from edgeprune.bundle import file_entry
from edgeprune.manifest import (
    MANIFEST_FILE,
    GraphEntry,
    Manifest,
    MethodEntry,
    ParityEntry,
    ProbeEntry,
    SegmentEntry,
    SiteEntry,
    SourceEntry,
    TensorEntry,
    manifest_to_json,
)


def write_files(folder: Path) -> Manifest:
    """Write files of a few bytes and their ``manifest.json``; returns the manifest."""
    folder.mkdir(parents=True, exist_ok=True)

    def file(name: str):
        (folder / name).write_text(f"content of {name}")
        return file_entry(folder, folder / name)

    def graph(name: str) -> GraphEntry:
        tensor = TensorEntry("hidden_states", "float32", (1, "sequence", 8))
        return GraphEntry(file(f"{name}.onnx"), (file("shared.data"),), (tensor,), (tensor,))

    names = ("vision", "projector", "embed", "segment0", "site0", "gather", "segment1", "guide")
    manifest = Manifest(
        edgeprune_version="0.1.0",
        source=SourceEntry("llava", "llava", "0" * 64),
        dtype="float32",
        opset=23,
        geometry=geometry_entry(),
        pruning=(MethodEntry("atp", {"layers": [1], "self_norm": "none", "sample_scale": 3.0}),),
        segments=(
            SegmentEntry("segment0", (0,), (0,), probe=True),
            SegmentEntry("segment1", (1,), (1,), probe=False),
        ),
        sites=(SiteEntry("site0", "atp", "before layer 1", 1, before_mlp=False, keep_per_image=None),),
        probe=ProbeEntry(guided=True, guide_tokenizer=file("guide_tokenizer.json"), guide_context_length=77),
        graphs={name: graph(name) for name in names},
        preprocessing={"size": 24},
        prompt={"image_token_id": 3},
        tokenizer=file("tokenizer.json"),
        parity={"vision": ParityEntry(3, 1.5e-7, 1e-4, indices_identical=True)},
    )
    (folder / MANIFEST_FILE).write_text(manifest_to_json(manifest), encoding="utf-8")
    return manifest


def with_deepstack(manifest: Manifest, layers: int) -> Manifest:
    """The same with a projector that gives features for the first ``layers`` decoder layers."""
    projector = manifest.graphs["projector"]
    features = TensorEntry("image_deepstack_features", "float32", (layers, "visual_tokens", 8))
    graph = replace(projector, outputs=(*projector.outputs, features))
    return replace(manifest, graphs={**manifest.graphs, "projector": graph})
