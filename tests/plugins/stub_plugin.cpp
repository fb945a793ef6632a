// A library that says what it is as a plugin library does, and has no creators.
extern "C" const char* edgeprune_plugin_built_for() { return BUILT_FOR; }
