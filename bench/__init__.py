"""What the kernels cost and save, measured: ``python -m bench.run``, ``bench.report``, ``bench.verify``."""
