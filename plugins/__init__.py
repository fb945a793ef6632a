"""The operators of domain ``edgeprune`` for devices: kernels, and what makes a runtime use them.

Here belong CUDA kernels that know pointers and streams only, the TensorRT ``IPluginV3`` glue round them, a CPU
reference for each, and their CMake files. They must compute what the torch references in :mod:`edgeprune.operators`
compute. Built libraries are found through ``edgeprune.plugins.__path__``. There is no code yet: every bundle runs
without plugins, through the ONNX functions of the operators.
"""
