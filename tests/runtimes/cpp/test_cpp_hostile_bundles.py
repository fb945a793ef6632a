"""A bundle that is cut, changed or made to do harm is refused with an error of its own, never with a crash."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune import manifest
from edgeprune.bundle import Bundle
from edgeprune.errors import EdgepruneError
from edgeprune.manifest import MANIFEST_FILE

INTERNAL = 7  # EDGEPRUNE_ERROR_INTERNAL


@pytest.fixture
def copy(atp_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(atp_bundle, tmp_path / "bundle"))


def refusal(cpp, bundle: Path, images: tuple[str, ...] = ()) -> dict[str, Any]:
    """The error of opening a bundle, or of asking it."""
    request = json.dumps({"images": list(images), "prompt": "What is it?", "max_new_tokens": 3})
    ran = cpp.run(cpp.built.folder / "tests" / "ask_many", bundle, text=request)
    assert ran.returncode in (0, 1), ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    assert "error" in found, found
    assert found["status"] != INTERNAL, found
    assert "\n" not in found["error"]
    return found


def rewritten(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = bundle / MANIFEST_FILE
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return bundle


def with_file(bundle: Path, name: str, content: bytes) -> Path:
    """A file replaced, with the manifest's blessing."""

    def bless(data: Any) -> None:
        if isinstance(data, dict):
            if data.get("path") == name:
                data |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for value in data.values():
                bless(value)
        elif isinstance(data, list):
            for value in data:
                bless(value)

    (bundle / name).write_bytes(content)
    return rewritten(bundle, bless)


def entry(data: dict[str, Any], *path: str | int) -> Any:
    for step in path:
        data = data[step]
    return data


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "path outside": lambda data: entry(data, "tokenizer").update(path="../tokenizer.json"),
    "absolute path": lambda data: entry(data, "tokenizer").update(path="/etc/passwd"),
    "path with a backslash": lambda data: entry(data, "tokenizer").update(path="..\\x"),
    "no path": lambda data: entry(data, "tokenizer").update(path=""),
    "folder as a file": lambda data: entry(data, "tokenizer").update(path="."),
    "negative size": lambda data: entry(data, "tokenizer").update(bytes=-1),
    "another hash": lambda data: entry(data, "tokenizer").update(sha256="0" * 64),
    "no hash": lambda data: entry(data, "tokenizer").update(sha256="x"),
    "another version": lambda data: data.update(format_version=99),
    "version as text": lambda data: data.update(format_version="2"),
    "unknown field": lambda data: data.update(more=1),
    "missing field": lambda data: data.pop("graphs"),
    "unknown dtype": lambda data: data.update(dtype="int3"),
    "list for an object": lambda data: data.update(geometry=[]),
    "negative width": lambda data: entry(data, "geometry").update(hidden_size=-1),
    "no heads": lambda data: entry(data, "geometry").update(num_kv_heads=0),
    "fraction": lambda data: entry(data, "geometry").update(num_kv_heads=1.5),
    "grid of one side": lambda data: entry(data, "geometry").update(grid=[3]),
    "unknown positions": lambda data: entry(data, "geometry").update(positions="circular"),
    "no segments": lambda data: data.update(segments=[], sites=[]),
    "sites without segments": lambda data: data.update(segments=data["segments"][:1]),
    "missing graph": lambda data: entry(data, "graphs").pop("gather"),
    "additions behind layers that are not there": lambda data: entry(
        data, "graphs", "projector", "outputs"
    ).append({"name": "image_deepstack_features", "dtype": "float32", "shape": [2**40, "visual_tokens", 8]}),
    "segment that is no decoder": lambda data: entry(data, "segments", 0).update(graph="vision"),
    "layers that are others'": lambda data: entry(data, "segments", 0).update(layers=[77]),
    "unknown numbering": lambda data: entry(data, "sites", 0).update(positions="random"),
    "text for a number": lambda data: entry(data, "sites", 0).update(keep_per_image="all"),
    "number beyond 64 bits": lambda data: entry(data, "sites", 0).update(keep_per_image=10**30),
    "unknown preprocessing": lambda data: data.update(preprocessing={"kind": "fold"}),
    "preprocessing of text": lambda data: data.update(preprocessing="crop"),
    "prompt without fields": lambda data: data.update(prompt={}),
    "another image token": lambda data: entry(data, "prompt").update(image_token_id=0),
    "template that does not end": lambda data: entry(data, "prompt").update(chat_template="{% for"),
    "endless template": lambda data: entry(data, "prompt").update(
        chat_template="{% for i in range(10 ** 12) %}x{% endfor %}"
    ),
    "template of parentheses": lambda data: entry(data, "prompt").update(chat_template="{{" + "(" * 60000),
    "negative context": lambda data: entry(data, "prompt").update(context_length=-1),
    "rate without sites": lambda data: data.update(rate={"layer": 0, "num_rates": 0}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_manifests_are_refused(cpp, copy, name):
    refusal(cpp, rewritten(copy, CHANGES[name]))


# What only a question shows: nothing in the manifest contradicts itself.
UNFIT = {
    "site that is no site": lambda data: entry(data, "sites", 0).update(graph="embed"),
    "absurd geometry": lambda data: entry(data, "geometry").update(head_dim=2**23, num_kv_heads=2**23),
    "sizes of another model": lambda data: entry(data, "geometry").update(head_dim=7),
    "pictures of another size": lambda data: entry(data, "preprocessing").update(center_crop=[7, 7]),
}


@pytest.mark.parametrize("name", UNFIT)
def test_manifests_that_do_not_fit_their_graphs_are_refused_when_asked(cpp, copy, name, tmp_path):
    from edgeprune.export.check_pictures import check_pictures

    (picture,) = check_pictures(1, size=(60, 40))
    picture.save(tmp_path / "picture.png")
    refusal(cpp, rewritten(copy, UNFIT[name]), (str(tmp_path / "picture.png"),))


def test_sentences_are_pythons_where_the_cause_is_the_same(cpp, copy):
    for name in (
        "path outside",
        "no hash",
        "unknown field",
        "missing field",
        "unknown dtype",
        "no heads",
        "missing graph",
        "additions behind layers that are not there",
    ):
        original = (copy / MANIFEST_FILE).read_text()
        rewritten(copy, CHANGES[name])
        with pytest.raises(EdgepruneError) as expected:
            Bundle.open(copy)
        assert refusal(cpp, copy)["error"] == str(expected.value)
        (copy / MANIFEST_FILE).write_text(original)


def test_cut_files_are_refused(cpp, copy):
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        refusal(cpp, copy)
        path.unlink()
        refusal(cpp, copy)
        path.write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[" * 100000, b"\xff\xfe", b'{"a": ', b"null", b'{"format_version": 2}'],
    ids=lambda content: repr(content[:12]),
)
def test_manifests_that_are_none_are_refused(cpp, copy, content):
    (copy / MANIFEST_FILE).write_bytes(content)
    refusal(cpp, copy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"model": {"type": "Unigram", "vocab": []}}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"<image>": 3}, "merges": [["a"]]}}',
        b'{"model": {"vocab": {"<image>": 3}, "merges": []}, "added_tokens": [{}]}',
        b'{"model": {"vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}',
        b'{"model": {"vocab": {"<image>": 3}, "merges": 5}}',
    ],
    ids=lambda content: repr(content[:60]),
)
def test_tokenizers_that_are_none_are_refused(cpp, copy, content):
    refusal(cpp, with_file(copy, "tokenizer.json", content))


def test_graphs_that_are_none_are_refused(cpp, copy):
    for content in (b"", b"\x08\x0a" * 500, os.urandom(3000)):
        graph = json.loads((copy / MANIFEST_FILE).read_text())["graphs"]["segment0"]["file"]["path"]
        found = refusal(cpp, with_file(copy, graph, content))
        assert "ONNX Runtime cannot open" in found["error"]


def test_the_reader_knows_every_field_of_the_manifest():
    entries = (
        "Manifest",
        "FileEntry",
        "TensorEntry",
        "GraphEntry",
        "GeometryEntry",
        "SegmentEntry",
        "SiteEntry",
    )
    engines = ("EngineSetEntry", "EngineEntry", "ProfileEntry")
    kinds = [getattr(manifest, name) for name in (*entries, *engines, "ProbeEntry", "RateEntry")]
    source = (Path(__file__).resolve().parents[3] / "runtimes/cpp/src/bundle/manifest.cpp").read_text()
    for kind in kinds:
        for field in dataclasses.fields(kind):
            assert f'"{field.name}"' in source, f"manifest.cpp does not read {kind.__name__}.{field.name}"
