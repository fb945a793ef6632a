"""The operators of domain ``edgeprune`` for devices: kernels, and what makes a runtime use them.

``kernels/`` has CUDA kernels that know pointers and streams only, and a reference for the host of each; they compute
what the torch references in :mod:`edgeprune.operators` compute. ``tensorrt/`` makes plugins of them. ``build`` builds
all with CMake, ``kernel_library`` calls kernels and references from Python, and ``load`` gives the plugins to a
TensorRT. Every bundle also runs without them, through the ONNX functions of the operators.
"""

from edgeprune.plugins.plugin_library import PluginLibrary, find, load

__all__ = ["PluginLibrary", "find", "load"]
