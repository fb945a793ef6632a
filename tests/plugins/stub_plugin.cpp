// A library that answers what edgeprune asks of a plugin library, as the options say, and has no creators.
extern "C" {
int edgeprune_plugin_library_version() { return LIBRARY_VERSION; }
int edgeprune_plugin_tensorrt_major() { return TENSORRT_MAJOR; }
int edgeprune_plugin_tensorrt_minor() { return 3; }
const char* edgeprune_plugin_architectures() { return "80,87,89"; }
}
