import json
import re
from dataclasses import replace

import pytest
from calibrations import calibration_of
from tiny_manifest import with_deepstack, write_files

from edgeprune.errors import BundleError
from edgeprune.manifest import (
    MANIFEST_FILE,
    EngineEntry,
    EngineSetEntry,
    FileEntry,
    ProfileEntry,
    manifest_from_json,
    manifest_to_json,
)


@pytest.fixture
def manifest(tmp_path):
    return write_files(tmp_path)


def engine_set() -> EngineSetEntry:
    profile = ProfileEntry("decode", {"past": (1, 64, 511), "sequence": (1, 1, 1)})
    file = FileEntry("engines/orin/vision-0.engine", "1" * 64, 3)
    engine = EngineEntry(file, "2" * 64, "3" * 64, (profile,), 0.5)
    return EngineSetEntry(
        "4" * 64, "tensorrt", "10.3.0", 87, "fp16", None, "one", {"one": 3}, {"vision": engine}
    )


def refuse(path, data, match):
    """The error is one line that matches."""
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleError, match=match) as caught:
        manifest_from_json(path)
    assert "\n" not in str(caught.value)


def test_round_trip(manifest, tmp_path):
    assert manifest_from_json(tmp_path / MANIFEST_FILE) == manifest
    other = replace(
        manifest, calibration=calibration_of(manifest, [[3, 5]]), engines={"orin": engine_set()}, probe=None
    )
    (tmp_path / "other.json").write_text(manifest_to_json(other), encoding="utf-8")
    assert manifest_from_json(tmp_path / "other.json") == other
    assert other != manifest


def test_fields_with_defaults_may_be_absent(manifest, tmp_path):
    data = json.loads(manifest_to_json(manifest))
    del data["calibration"], data["engines"]
    (tmp_path / "short.json").write_text(json.dumps(data))
    assert manifest_from_json(tmp_path / "short.json") == manifest


def test_files_are_listed_once(manifest):
    paths = [entry.path for entry in manifest.files()]
    assert len(paths) == len(set(paths)) == 2 + len(manifest.graphs) + 1
    assert {"shared.data", "tokenizer.json", "guide_tokenizer.json", "site0.onnx"} < set(paths)


def test_missing_manifest(tmp_path):
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest\.json"):
        manifest_from_json(tmp_path / MANIFEST_FILE)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"format_version": 1,}', "[" * 100_000, '{"format_version": ' + "1" * 5000 + "}"],
    ids=["empty", "open", "comma", "deep", "huge number"],
)
def test_malformed_json(text, tmp_path):
    refuse(tmp_path / MANIFEST_FILE, text, "not readable JSON")


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / MANIFEST_FILE).write_bytes(b"\xff\xfe{}")
    with pytest.raises(BundleError, match="not readable JSON"):
        manifest_from_json(tmp_path / MANIFEST_FILE)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, [2]])
def test_unknown_version(manifest, tmp_path, version):
    data = json.loads(manifest_to_json(manifest)) | {"format_version": version}
    expected = f"format_version {version!r}, this edgeprune reads 2"
    refuse(tmp_path / MANIFEST_FILE, data, re.escape(expected))


def test_version_that_only_equals_two(manifest, tmp_path):
    data = json.loads(manifest_to_json(manifest)) | {"format_version": 2.0}
    refuse(tmp_path / MANIFEST_FILE, data, "format_version is")


@pytest.mark.parametrize("data", [[], 3, None, {}, {"format": 1}])
def test_other_json(tmp_path, data):
    refuse(tmp_path / MANIFEST_FILE, data, "format_version None")


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "a/../../x", "a\\b", "..\\x", "C:/x", "c:x", "", "..", "../x\nsecond line"],
)
def test_paths_out_of_the_bundle(manifest, tmp_path, path):
    data = json.loads(manifest_to_json(manifest))
    data["tokenizer"]["path"] = path
    refuse(tmp_path / MANIFEST_FILE, data, "outside the bundle")


@pytest.mark.parametrize("path", ["a", "graphs/a.onnx", "a..b", "...", "ü"])
def test_paths_within_the_bundle(path):
    assert FileEntry(path, "0" * 64, 0).path == path


@pytest.mark.parametrize("hash_", ["", "0" * 63, "0" * 65, "g" * 64, "A" * 64, "0" * 64 + "\n"])
def test_unusable_hash(hash_):
    with pytest.raises(BundleError, match="'x' has no usable sha256"):
        FileEntry("x", hash_, 0)


def test_negative_size():
    with pytest.raises(BundleError, match="'x' has no usable sha256 or size"):
        FileEntry("x", "0" * 64, -1)


@pytest.mark.parametrize("graph", ["vision", "embed", "segment1", "site0", "gather", "guide"])
def test_missing_graph(manifest, tmp_path, graph):
    data = json.loads(manifest_to_json(manifest))
    del data["graphs"][graph]
    refuse(tmp_path / MANIFEST_FILE, data, f"lacks the graph '{graph}'")


def test_sites_and_segments_that_do_not_alternate(manifest, tmp_path):
    data = json.loads(manifest_to_json(manifest))
    data["sites"] = []
    refuse(tmp_path / MANIFEST_FILE, data, "sites do not lie between")


def test_layers_that_deepstack_adds_behind(manifest, tmp_path):
    """Told by the projector's outputs: most families have none."""
    layers = manifest.geometry.num_layers
    assert manifest.deepstack_layers == 0
    whole = with_deepstack(manifest, layers)
    assert whole.deepstack_layers == layers
    data = json.loads(manifest_to_json(whole))
    for wrong in (layers + 1, -1):
        data["graphs"]["projector"]["outputs"][-1]["shape"][0] = wrong
        message = f"features for {wrong} of {layers} decoder layers: export the checkpoint again"
        refuse(tmp_path / MANIFEST_FILE, data, message)


@pytest.mark.parametrize("sizes", [[1, 2], [3, 2, 4], [1, 5, 4], [-1, 0, 1]])
def test_a_profile_that_is_no_range(manifest, tmp_path, sizes):
    data = json.loads(manifest_to_json(replace(manifest, engines={"orin": engine_set()})))
    data["engines"]["orin"]["engines"]["vision"]["profiles"][0]["ranges"]["past"] = sizes
    refuse(tmp_path / "manifest.json", data, "profile 'decode': past is")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("opset", "23", "manifest.json.opset is"),
        ("opset", 23.5, "manifest.json.opset is '23.5', expected int"),
        ("opset", True, "manifest.json.opset is"),
        ("opset", None, "manifest.json.opset is"),
        ("dtype", 32, "manifest.json.dtype is"),
        ("dtype", "int4", "manifest.json.dtype is 'int4', known: float32, float16"),
        ("source", [], "manifest.json.source is"),
        ("source.name", 3, "manifest.json.source.name is"),
        ("geometry.grid", [3, "3"], r"geometry.grid\[1\] is"),
        ("geometry.grid", [9], "geometry.grid is"),
        ("geometry.grid", [3, -3], "geometry.grid is"),
        ("geometry.grid", 9, "geometry.grid is '9', expected a list"),
        ("geometry.head_dim", 0, "geometry.head_dim is 0"),
        ("geometry.num_kv_heads", -1, "geometry.num_kv_heads is -1"),
        ("graphs", [], "manifest.json.graphs is"),
        ("graphs.embed.file.bytes", "4", r"graphs.embed.file.bytes is"),
        ("graphs.embed.data", {}, "graphs.embed.data is"),
        (
            "graphs.embed.inputs",
            [{"name": "x", "dtype": "int64", "shape": [1.5]}],
            r"inputs\[0\].shape\[0\] is",
        ),
        ("graphs.embed.inputs", [{"name": "x", "dtype": "int64"}], r"inputs\[0\] lacks the field 'shape'"),
        ("segments", [3, 4], r"segments\[0\] is"),
        ("probe", "yes", "manifest.json.probe is"),
        ("probe.guided", 1, "probe.guided is"),
        ("sites", [{}], r"sites\[0\] lacks the field 'graph'"),
        ("parity.vision.max_abs_diff", "small", "parity.vision.max_abs_diff is"),
        ("parity.vision.indices_identical", "yes", "parity.vision.indices_identical is"),
        ("preprocessing", [], "manifest.json.preprocessing is"),
        ("engines", None, "manifest.json.engines is"),
        ("surprise", 1, "unknown field 'surprise'"),
        ("geometry.surprise", 1, "geometry has an unknown field 'surprise'"),
        (
            "segments",
            [{"graph": "a", "layers": [1, None], "mlp_layers": [], "probe": False}],
            r"layers\[1\] is",
        ),
        ("opset", "long\n" * 1000, "manifest.json.opset is"),
    ],
)
def test_wrong_values_are_named(manifest, tmp_path, where, value, message):
    data = json.loads(manifest_to_json(manifest))
    *parents, last = where.split(".")
    target = data
    for name in parents:
        target = target[name]
    target[last] = value
    refuse(tmp_path / MANIFEST_FILE, data, message)


@pytest.mark.parametrize("field", ["source", "segments", "probe", "tokenizer", "geometry"])
def test_missing_fields_are_named(manifest, tmp_path, field):
    data = json.loads(manifest_to_json(manifest))
    del data[field]
    refuse(tmp_path / MANIFEST_FILE, data, f"lacks the field '{field}'")
