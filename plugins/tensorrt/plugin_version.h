// What edgeprune checks before it gives this library to TensorRT; the same in edgeprune/operators/schema.py.
#pragma once

// Raised whenever engines that were built with an older library must not run with this one.
#define EDGEPRUNE_PLUGIN_LIBRARY_VERSION 1

// Of the creators: every node carries both as attributes.
#define EDGEPRUNE_PLUGIN_NAMESPACE "edgeprune"
#define EDGEPRUNE_PLUGIN_VERSION "1"
