"""torch.compile of the eager formula, for exactly this shape: the best that the compiler can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..cases import Case
from . import Absent, eager, pick


def version() -> str:
    return torch.__version__


def build(case: Case, device: str) -> Callable[..., Any]:
    if case.op == "group_advantages":
        raise Absent("torch.unique has a data-dependent shape: the compiler breaks the graph there")
    if case.op == "vtrace":
        raise Absent("a loop over positions: the compiler unrolls it, for minutes")
    function = pick(eager.FUNCTIONS, case)
    return torch.compile(function, fullgraph=True, dynamic=False)
