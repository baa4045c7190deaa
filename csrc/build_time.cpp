// When the extension was built. A file of its own because setup.py compiles it again after any other object.
const char* rl4llm_build_time() { return __DATE__ " " __TIME__; }
