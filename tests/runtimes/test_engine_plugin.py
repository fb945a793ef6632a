"""Which graphs are built with TensorRT's plugins; that TensorRT takes them is in ``tests/plugins``."""

import types
from dataclasses import replace

import onnx
import pytest

from edgeprune.bundle import Bundle
from edgeprune.errors import EngineError
from edgeprune.operators.schema import PLUGIN_MODES, TOKEN_SELECT, TOPK
from edgeprune.plugins.plugin_library import PATH_VARIABLE
from edgeprune.runtimes.build_options import BuildOptions
from edgeprune.runtimes.engine_plugin import PLUGIN_AUTO, PLUGIN_OFF, PLUGIN_ON, choose_plugin, plugin_nodes
from edgeprune.runtimes.engine_profiles import ONE, Limits, profiles
from edgeprune.runtimes.tensorrt_library import TensorRtLibrary

SM = 89


def profiles_of(bundle):
    return profiles(bundle.manifest, Limits.of(bundle.manifest), ONE)


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.setattr("edgeprune.runtimes.engine_plugin.find", lambda: None)
    monkeypatch.setattr("edgeprune.plugins.plugin_library.find", lambda: None)


@pytest.mark.parametrize("bundle", ["atp_bundle", "combined_bundle", "cdpruner_bundle"])
def test_graphs_whose_operators_have_kernels(bundle, request):
    opened = Bundle.open(request.getfixturevalue(bundle))
    graphs = {
        name
        for name, graph in opened.manifest.graphs.items()
        if any(node.domain == "edgeprune" for node in onnx.load(opened.file(graph.file)).graph.node)
    }
    assert {"gather", "site0"} <= graphs
    assert set(plugin_nodes(opened, [profiles_of(opened)])) == graphs


def test_an_operator_without_a_kernel_keeps_the_function(cdpruner_bundle, monkeypatch):
    monkeypatch.setitem(PLUGIN_MODES, TOKEN_SELECT, (TOPK,))
    opened = Bundle.open(cdpruner_bundle)
    usable = set(plugin_nodes(opened, [profiles_of(opened)]))
    assert "gather" in usable
    assert "site0" not in usable


def test_a_sequence_that_is_too_long_keeps_the_function(atp_bundle):
    opened = Bundle.open(atp_bundle)
    long = {
        name: tuple(
            replace(entry, ranges={dim: (*sizes[:2], 16385) for dim, sizes in entry.ranges.items()})
            for entry in entries
        )
        for name, entries in profiles_of(opened).items()
    }
    assert set(plugin_nodes(opened, [profiles_of(opened), long])) == {"gather"}


def test_without_a_library_functions_are_built_unless_it_was_asked_for(atp_bundle, no_library):
    opened = Bundle.open(atp_bundle)
    library = TensorRtLibrary("tensorrt", "11.4.0", types.ModuleType("tensorrt"))
    for choice in (PLUGIN_AUTO, PLUGIN_OFF):
        chosen = choose_plugin(choice, library, SM, opened, [profiles_of(opened)], pytest.fail)
        assert (chosen.library, chosen.version, chosen.version_of("site0")) == (None, None, None)
    with pytest.raises(EngineError, match="there is no plugin library: build it with"):
        choose_plugin(PLUGIN_ON, library, SM, opened, [profiles_of(opened)], pytest.fail)


def test_a_library_that_the_variable_names_is_not_passed_over(atp_bundle, monkeypatch):
    opened = Bundle.open(atp_bundle)
    library = TensorRtLibrary("tensorrt", "11.4.0", types.ModuleType("tensorrt"))
    monkeypatch.setenv(PATH_VARIABLE, "/nowhere/plugin.so")
    for choice in (PLUGIN_AUTO, PLUGIN_ON):
        with pytest.raises(EngineError, match=r"/nowhere/plugin\.so does not exist"):
            choose_plugin(choice, library, SM, opened, [profiles_of(opened)], pytest.fail)
    assert choose_plugin(PLUGIN_OFF, library, SM, opened, [], pytest.fail).version is None


def test_a_library_that_is_found_and_does_not_fit_is_passed_over_with_a_warning(
    atp_bundle, tmp_path, monkeypatch
):
    opened = Bundle.open(atp_bundle)
    library = TensorRtLibrary("tensorrt", "11.4.0", types.ModuleType("tensorrt"))
    damaged = tmp_path / "libedgeprune_tensorrt.so"
    damaged.write_text("no library")
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    for place in ("edgeprune.runtimes.engine_plugin.find", "edgeprune.plugins.plugin_library.find"):
        monkeypatch.setattr(place, lambda: damaged)
    warnings = []
    chosen = choose_plugin(PLUGIN_AUTO, library, SM, opened, [profiles_of(opened)], warnings.append)
    assert chosen.version is None
    assert "is no whole library" in warnings[0]
    with pytest.raises(EngineError, match="is no whole library"):
        choose_plugin(PLUGIN_ON, library, SM, opened, [profiles_of(opened)], pytest.fail)


def test_an_unknown_choice_is_refused():
    with pytest.raises(EngineError, match="--plugin is 'maybe': give one of auto, on, off"):
        BuildOptions("rtx40", plugin="maybe")


@pytest.mark.parametrize(
    ("name", "version", "functions_first"),
    [
        ("tensorrt", "10.3.0", True),
        ("tensorrt", "10.6.0", True),
        ("tensorrt", "10.7.0", False),
        ("tensorrt", "11.4.1", False),
        ("tensorrt_rtx", "1.7.1.116", False),
    ],
)
def test_which_tensorrt_takes_functions_first(name, version, functions_first):
    library = TensorRtLibrary(name, version, types.ModuleType(name))
    assert library.takes_functions_first == functions_first
