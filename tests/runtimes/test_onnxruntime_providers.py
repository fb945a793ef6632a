"""What ONNX Runtime's TensorRT providers are told of each graph, and what is said where they are missing."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import onnxruntime
import pytest

from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, MissingExtraError
from edgeprune.runtimes.engine_profiles import ONE, Limits, profiles
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.onnxruntime_providers import PROVIDERS, find_provider, graph_options
from edgeprune.runtimes.session import open_session

# The tests of engines export the same bundles.
pytestmark = pytest.mark.xdist_group("engines")

BUNDLES = ("atp_bundle", "combined_bundle", "ivtp_bundle", "dyrate_bundle")
KINDS = (("min", 0), ("opt", 1), ("max", 2))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def parsed(text: str) -> dict[str, tuple[int, ...]]:
    """``input:1x2,…`` as ONNX Runtime reads it."""
    found = {}
    for part in text.split(","):
        name, _, sizes = part.rpartition(":")
        found[name] = tuple(int(size) for size in sizes.split("x"))
    return found


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize(("provider", "prefix"), [("tensorrt", "trt"), ("tensorrt_rtx", "nv")])
def test_every_dynamic_input_has_its_three_shapes(bundle, provider, prefix, request, cache):
    """ONNX Runtime ignores profiles that leave one out."""
    opened = Bundle.open(request.getfixturevalue(bundle))
    manifest = opened.manifest
    expected = profiles(manifest, Limits.of(manifest), ONE)
    for name, graph in manifest.graphs.items():
        options = graph_options(find_provider(provider), opened, name)
        ranges = expected[name][0].ranges
        for kind, place in KINDS:
            shapes = parsed(options[f"{prefix}_profile_{kind}_shapes"])
            assert set(shapes) == {
                tensor.name
                for tensor in graph.inputs
                if tensor.name == "num_keep" or any(isinstance(dim, str) for dim in tensor.shape)
            }
            for tensor in graph.inputs:
                if tensor.name == "num_keep":
                    assert shapes["num_keep"] == (ranges["num_keep"][place],)
                elif tensor.name in shapes:
                    assert shapes[tensor.name] == tuple(
                        ranges[dim][place] if isinstance(dim, str) else dim for dim in tensor.shape
                    )


def test_a_segment_in_full(atp_bundle, cache):
    opened = Bundle.open(atp_bundle)
    options = graph_options(find_provider("tensorrt_rtx"), opened, "segment1")
    assert options == {
        "nv_runtime_cache_path": str(
            cache / "edgeprune" / "tensorrt_rtx" / opened.manifest.graphs["segment1"].file.sha256[:16]
        ),
        "nv_profile_min_shapes": "hidden_states:1x1x32,position_ids:1x1,past_key_values.1.key:1x2x0x8,"
        "past_key_values.1.value:1x2x0x8",
        "nv_profile_opt_shapes": "hidden_states:1x82x32,position_ids:1x82,past_key_values.1.key:1x2x146x8,"
        "past_key_values.1.value:1x2x146x8",
        "nv_profile_max_shapes": "hidden_states:1x512x32,position_ids:1x512,past_key_values.1.key:1x2x511x8,"
        "past_key_values.1.value:1x2x511x8",
    }


def test_engines_are_kept_outside_the_bundle(atp_bundle, atp_float16_bundle, cache):
    opened = Bundle.open(atp_bundle)
    provider = find_provider("tensorrt")
    folders = {
        name: graph_options(provider, opened, name)["trt_engine_cache_path"]
        for name in opened.manifest.graphs
    }
    assert len(set(folders.values())) == len(folders)
    assert all(Path(folder).is_relative_to(cache) for folder in folders.values())
    assert graph_options(provider, opened, "embed")["trt_fp16_enable"] == "False"
    assert graph_options(provider, Bundle.open(atp_float16_bundle), "embed")["trt_fp16_enable"] == "True"


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_other_providers_are_told_nothing(atp_bundle, provider):
    assert graph_options(find_provider(provider), Bundle.open(atp_bundle), "segment0") == {}


def test_the_names_are_those_of_onnxruntime():
    known = onnxruntime.get_all_providers()
    assert {provider.title for provider in PROVIDERS.values()} <= set(known)


@pytest.mark.skipif(
    "TensorrtExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this onnxruntime has TensorRT",
)
def test_tensorrt_is_not_in_this_onnxruntime(atp_bundle):
    with pytest.raises(BackendError, match=r"no TensorrtExecutionProvider .*edgeprune\[gpu\]") as caught:
        open_session(atp_bundle, provider="tensorrt")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx") is not None,
    reason="the provider's package is installed",
)
def test_the_package_of_tensorrt_rtx_is_missing(atp_bundle):
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'edgeprune[rtx-provider]'")):
        open_session(atp_bundle, provider="tensorrt_rtx")


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx") is None,
    reason="the extra 'rtx-provider' (300 MB) is not installed",
)
def test_tensorrt_rtx_without_a_driver_or_gpu():
    """The real library: it does not load without a driver, and finds no device without a GPU."""
    from edgeprune.this_machine import this_machine

    if this_machine() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="NvTensorRTRTXExecutionProvider") as caught:
        OnnxRuntimeBackend("tensorrt_rtx")
    assert "\n" not in str(caught.value)


def test_a_provider_that_is_a_library_of_its_own(atp_bundle, cache, monkeypatch, tmp_path):
    """ONNX Runtime cannot register a library that is not there; the line says so."""
    package = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    package.get_library_path = lambda: str(tmp_path / "missing.so")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    with pytest.raises(
        BackendError, match=r"cannot load NvTensorRTRTXExecutionProvider .*missing\.so"
    ) as caught:
        open_session(atp_bundle, provider="tensorrt_rtx")
    assert "\n" not in str(caught.value)
