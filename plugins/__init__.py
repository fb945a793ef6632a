"""The operators of domain ``edgeprune`` for devices: kernels, and what makes a runtime use them.

``kernels/`` has CUDA kernels that know pointers and streams only, and a reference for the host of each; they compute
what the torch references in :mod:`edgeprune.operators` compute. ``build`` builds both with CMake, ``kernel_library``
calls them from Python. Every bundle also runs without them, through the ONNX functions of the operators.
"""
