"""The package for Jetson: the C++ runtime, kernels and plugin for aarch64, with what installs them there.

``package`` compiles across and packs, ``install.sh`` looks at the device and installs.
"""
