"""Drop-ins for TRL, verl, OpenRLHF and Hugging Face models: their signatures over this library's ops.

Each submodule has the functions of one library, with its names, arguments, dtypes and edge cases, so that one import
line changes; ``patch()`` swaps them inside the installed library instead, ``unpatch()`` restores it. Where a namesake
differs from the rest of this library (values at masked tokens, groups of one, rows without a live token), the namesake
wins, in here and nowhere else. Importing any of this imports none of those libraries and patches nothing.
"""

from . import hf, openrlhf, trl, verl
from .patching import Patch

__all__ = ["Patch", "hf", "openrlhf", "trl", "verl"]
