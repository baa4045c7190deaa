"""These tests need the emulated kernels in Triton's place: tests/test_cuda_on_cpu.py starts a process of their own."""

import os

collect_ignore_glob = [] if os.environ.get("RL4LLM_FAST_EMULATED") else ["test_*.py"]
