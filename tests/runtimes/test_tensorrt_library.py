"""Which TensorRT builds for whom, and what it reads."""

import platform
import types

import pytest

from edgeprune.errors import EngineError
from edgeprune.runtimes.tensorrt_library import TensorRtLibrary, library_for
from edgeprune.targets import TARGETS


@pytest.mark.parametrize(
    ("name", "version", "opset", "read"),
    [
        ("tensorrt", "10.3.0", 20, True),
        ("tensorrt", "10.3.0", 23, False),
        ("tensorrt", "10.14.1.48", 23, False),
        ("tensorrt", "10.15.1", 23, True),
        ("tensorrt", "11.4.1", 23, True),
        ("tensorrt_rtx", "1.7.1.116", 23, True),
    ],
)
def test_opset_23_needs_tensorrt_10_15(name, version, opset, read):
    library = TensorRtLibrary(name, version, types.ModuleType(name))
    if read:
        library.check_opset(opset)
        return
    with pytest.raises(
        EngineError, match=f"reads from 10.15 on, and {version} is installed: export with --opset 20"
    ):
        library.check_opset(opset)


@pytest.mark.parametrize("name", TARGETS)
def test_what_cannot_be_built_here_names_the_kit(name):
    target = TARGETS[name]
    if target.architecture != platform.machine():
        with pytest.raises(EngineError, match=f"must be built on {target.architecture}.*--kit DIR"):
            library_for(target)
        return
    pytest.importorskip("tensorrt_rtx")
    library = library_for(target)
    assert library.is_rtx
    assert library.compute_capability(target.sm).name == f"SM{target.sm}"
