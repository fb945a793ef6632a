// Opening the graphs of a bundle.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "backend.h"
#include "bundle/bundle.h"

namespace edgeprune {

using Graphs = std::map<std::string, std::unique_ptr<Graph>>;

// All of them by name, as many at once as the backend can. Throws BackendError: the backend cannot run one of them.
Graphs open_graphs(const Bundle& bundle, Backend& backend);

}  // namespace edgeprune
