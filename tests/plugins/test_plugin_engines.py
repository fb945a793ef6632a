"""TensorRT for RTX parses site graphs with the plugins and builds engines of them, without a GPU; nothing runs them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edgeprune.bundle import Bundle
from edgeprune.manifest import MANIFEST_FILE, manifest_from_json
from edgeprune.plugins.plugin_library import PATH_VARIABLE, PluginLibrary
from edgeprune.runtimes.build_options import BuildOptions
from edgeprune.runtimes.engine_build import build
from edgeprune.runtimes.engine_builder import build_engine
from edgeprune.runtimes.engine_plugin import PLUGIN_OFF, PLUGIN_ON, choose_plugin, plugin_nodes
from edgeprune.runtimes.engine_profiles import ONE, Limits, profiles
from edgeprune.runtimes.onnx_operators import operator_nodes
from edgeprune.runtimes.score_select import fuse_score_select
from edgeprune.runtimes.tensorrt_library import library_for
from edgeprune.targets import find_target

# One worker builds the libraries and runs all tests of them.
pytestmark = pytest.mark.xdist_group("plugins")

SM = 89


def profiles_of(bundle):
    return profiles(bundle.manifest, Limits.of(bundle.manifest), ONE)


@pytest.fixture
def rtx_plugins(reference_plugins, monkeypatch):
    """The plugins over the references: TensorRT asks them everything but to run."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is in the extra 'dev' on x86-64 Linux")
    if PluginLibrary.open(reference_plugins).tensorrt[0] != 11:
        pytest.skip("TensorRT for RTX 1.7 takes plugins compiled with headers of TensorRT 11 only")
    monkeypatch.setenv(PATH_VARIABLE, str(reference_plugins))
    return reference_plugins


@pytest.mark.parametrize("bundle", ["atp_float16_bundle", "combined_bundle", "cdpruner_bundle"])
def test_every_operator_becomes_a_plugin(rtx_plugins, bundle, request):
    opened = Bundle.open(request.getfixturevalue(bundle))
    entries = profiles_of(opened)
    library = library_for(find_target("rtx40"))
    plugin = choose_plugin(PLUGIN_ON, library, SM, opened, [entries], pytest.fail)
    assert plugin.library.path == rtx_plugins
    assert plugin.nodes
    for name in plugin.nodes:
        graph = opened.manifest.graphs[name]
        path = opened.file(graph.file)
        functions = build_engine(library, path, graph, entries[name], sm=SM)
        plugins = build_engine(library, path, graph, entries[name], sm=SM, plugin=plugin.library)
        assert functions.plugin_layers == ()
        assert len(plugins.plugin_layers) == len(operator_nodes(fuse_score_select(path.read_bytes())))
        assert (plugins.inputs, plugins.outputs) == (functions.inputs, functions.outputs)
        assert plugins.data.nbytes < functions.data.nbytes


def test_a_build_records_the_plugin_and_rebuilds_what_it_changes(rtx_plugins, cdpruner_bundle, tmp_path):
    bundle = Path(shutil.copytree(cdpruner_bundle, tmp_path / "bundle"))
    options = BuildOptions("rtx40", profile_choice=ONE)
    plugins = build(bundle, options)
    assert plugins.plugin_version == "1"
    assert build(bundle, options) == plugins
    functions = build(bundle, replace(options, plugin=PLUGIN_OFF))
    assert functions.plugin_version is None
    assert manifest_from_json(bundle / MANIFEST_FILE).engines["rtx40"] == functions
    opened = Bundle.open(bundle)
    changed = {name for name, entry in plugins.engines.items() if functions.engines[name].key != entry.key}
    assert changed == set(plugin_nodes(opened, [profiles_of(opened)])) != set()
