"""Which of the instruction sets that the CPU kernels were built for this machine can run."""

from __future__ import annotations

from rl4llm_fast import dispatch


def usable() -> list[str]:
    """Their names; none where the extension is not built."""
    extension = dispatch.extension
    if extension is None:
        return []
    found = []
    for isa in extension.build_info()["cpu_instruction_sets"]:
        try:
            extension.force_cpu_isa(isa)
            found.append(isa)
        except ValueError:
            continue
        finally:
            extension.force_cpu_isa(None)
    return found
