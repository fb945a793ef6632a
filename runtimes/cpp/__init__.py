"""libedgeprune, the C++ runtime: its sources, and :mod:`edgeprune.runtimes.cpp.build`, which builds them."""
