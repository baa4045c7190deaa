"""Nothing here can run beside compiled Triton: tests/test_triton_interpret.py starts a process of its own for it."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
