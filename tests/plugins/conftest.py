"""The native libraries, built once; an xdist worker that builds them runs all tests of this folder."""

from pathlib import Path

import pytest

from edgeprune.plugins.build import NativeLibraries, build
from edgeprune.plugins.kernel_library import KernelLibrary

FOLDER = Path(__file__).parent
OUTPUT = FOLDER.parents[1] / "out" / "plugins"


def pytest_collection_modifyitems(items):
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("plugins"))


@pytest.fixture(scope="session")
def native_libraries() -> NativeLibraries:
    """Both libraries; a machine without a C++ compiler or nvcc fails here."""
    return build(OUTPUT)


@pytest.fixture(scope="session")
def reference() -> KernelLibrary:
    """The references; their folder is their own, so that they are there when a kernel does not compile."""
    return KernelLibrary(build(OUTPUT / "reference", kernels=False).reference, "cpu")
