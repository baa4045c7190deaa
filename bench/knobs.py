"""What can be tuned: each constant of the launch tables with its candidates, and the cases that tell them apart.

A knob is one row or constant, changed alone, so that its figure answers one question. ``cut`` says whether a candidate
changes how V or T is cut or in which order parts combine, and with it the last bits of a result: such a choice may hang
on V, T and the dtype, never on N. Kernels that write each element by itself (cut False) are free of that.

No number of stages is here: Triton keeps loads in flight across iterations for products alone, and no kernel has one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch, tiles

from .cases import BACKWARD, BOTH, CASES, FORWARD, Case
from .ops import HALVED

Candidate = tuple[Any, ...]
TRITON_ONLY = ("preference_loss", "kto_loss")  # measured ops without CUDA C++
_ROW_BYTES = 2**33  # of one side's logits: three of them and what a check copies stay below 40 GB
# Shapes (N, V), what matters most first: a run that is cut off has then seen every knob at the first of its cases.
_ROWS = ((8_192, 131_072), (64, 131_072), (131_072, 32_768), (64, 262_144), (8_192, 32_768), (1_024, 262_144))


@dataclass(frozen=True)
class Place:
    """A constant of modules of ``rl4llm_fast`` (the first defines it, others imported it), or a row of a table."""

    modules: tuple[str, ...]
    name: str
    key: Hashable = None

    def _holders(self) -> list[Any]:
        return [importlib.import_module(f"rl4llm_fast.{module}") for module in self.modules]

    def read(self) -> Any:
        value = getattr(self._holders()[0], self.name)
        return value if self.key is None else value[self.key]

    def write(self, value: Any) -> None:
        for holder in self._holders():
            if self.key is None:
                setattr(holder, self.name, value)
            else:
                getattr(holder, self.name)[self.key] = value

    @property
    def file(self) -> str:
        module = self.modules[0].replace(".", "/") + ".py"
        return module if module.startswith("kernels/") else f"rl4llm_fast/{module}"


@dataclass(frozen=True, eq=False)
class Knob:
    """Constants that are set together, and what they may be set to."""

    name: str
    places: tuple[Place, ...]
    candidates: tuple[Candidate, ...]
    cases: tuple[Case, ...]
    cut: bool
    memory: bool = False  # whether peak memory is part of the answer
    group: str = "constants"

    def now(self) -> Candidate:
        """What the tables say."""
        return tuple(place.read() for place in self.places)

    def all(self) -> tuple[Candidate, ...]:
        """The present value first, then the other candidates."""
        now = self.now()
        return (now, *(c for c in self.candidates if c != now))

    @contextlib.contextmanager
    def applied(self, candidate: Candidate) -> Iterator[None]:
        """Inside, the Triton kernels run with the candidate."""
        before = self.now()
        try:
            for place, value in zip(self.places, candidate, strict=True):
                place.write(value)
            with rf.use_backend("triton"):
                yield
        finally:
            for place, value in zip(self.places, before, strict=True):
                place.write(value)

    def label(self, candidate: Candidate) -> str:
        return ", ".join(f"{place.name} {_short(v)}" for place, v in zip(self.places, candidate, strict=True))

    def line(self, candidate: Candidate, why: str) -> str:
        """What to write where the constant stands, and the file."""
        places = self.places
        if len({place.file for place in places}) < len(places) or len(places) == 1:
            names, values = ", ".join(p.name for p in places), ", ".join(map(_literal, candidate))
            return f"{places[0].file}: {names} = {values}  # {why}"
        return "\n".join(f"{p.file}: {p.name} = {_literal(v)}  # {why}" for p, v in zip(places, candidate, strict=True))


class LaunchKnob(Knob):
    """Fields of one row of configs.LAUNCHES; a candidate is the values of ``fields`` in it."""

    def _row(self) -> Any:
        return self.places[0].read()

    def _fields(self) -> tuple[str, ...]:
        return ("maxnreg",) if self.name.endswith("maxnreg") else ("block", "warps")

    def now(self) -> Candidate:
        return tuple(getattr(self._row(), name) for name in self._fields())

    @contextlib.contextmanager
    def applied(self, candidate: Candidate) -> Iterator[None]:
        before = self._row()
        try:
            self.places[0].write(self._with(candidate))
            with rf.use_backend("triton"):
                yield
        finally:
            self.places[0].write(before)

    def _with(self, candidate: Candidate) -> Any:
        return dataclasses.replace(self._row(), **dict(zip(self._fields(), candidate, strict=True)))

    def label(self, candidate: Candidate) -> str:
        return ", ".join(f"{name} {value}" for name, value in zip(self._fields(), candidate, strict=True))

    def line(self, candidate: Candidate, why: str) -> str:
        row, (kernel, size) = self._with(candidate), self.places[0].key  # type: ignore[misc]
        cap = "" if row.maxnreg is None else f", maxnreg={row.maxnreg}"
        numbers = f"{row.block}, {row.warps}, {row.registers}"
        return f'{self.places[0].file}: ("{kernel}", {size}): Launch({numbers}, "{why}"{cap}),'


class WorkspaceKnob(Knob):
    """The workspace of the ops from hidden states, which is their tokens a chunk."""

    def label(self, candidate: Candidate) -> str:
        vocabulary, dtype = self.cases[0].shape[-1], self.cases[0].dtype
        (place,), before = self.places, self.now()
        try:
            place.write(candidate[0])
            tokens = tiles.chunk_rule(vocabulary, dtype, "cuda")
        finally:
            place.write(before[0])
        return f"{candidate[0] // tiles.MIB} MiB ({tokens:,} tokens a chunk at V {vocabulary:,})"


class BackendKnob(Knob):
    """Triton or CUDA C++ for one public op; what ``dispatch`` takes by itself is the present value."""

    @property
    def op(self) -> str:
        return self.cases[0].op

    def now(self) -> Candidate:
        return (dispatch.MEASURED.get(self.op, self.candidates[0][0]),)

    @contextlib.contextmanager
    def applied(self, candidate: Candidate) -> Iterator[None]:
        with rf.use_backend(candidate[0]):
            yield

    def label(self, candidate: Candidate) -> str:
        return str(candidate[0])

    def line(self, candidate: Candidate, why: str) -> str:
        """A row of dispatch.MEASURED for the op, and for those that are the same kernels and have no case."""
        measured = {case.op for case in CASES if "gpu" in case.suites}
        same = [op for op, kernels in dispatch.OP_KERNELS.items() if kernels == dispatch.OP_KERNELS[self.op]]
        rows = [self.op, *(op for op in same if op not in measured)]
        return "\n".join(f'rl4llm_fast/dispatch.py: MEASURED "{op}": "{candidate[0]}",  # {why}' for op in rows)


def _short(value: Any) -> str:
    return f"{value // 2**20} MiB" if isinstance(value, int) and value >= 2**24 else str(value)


def _literal(value: Any) -> str:
    if isinstance(value, int) and value >= 2**24:
        return f"{value // 2**20} * MIB"
    return f"{value:_}" if isinstance(value, int) else repr(value)


def _rows(op: str, mode: str, dtype: torch.dtype, shapes: Sequence[tuple[int, int]] = _ROWS) -> tuple[Case, ...]:
    call, variant = ("token_logprobs_entropy", "") if op == "token_logprobs" else (op, "reverse")
    fit = [shape for shape in shapes if shape[0] * shape[1] * dtype.itemsize <= _ROW_BYTES]
    return tuple(Case(op, call, mode, dtype, shape, ("tune",), (), variant) for shape in fit)


def _launches() -> Iterator[Knob]:
    """Block and warps of each row of the table: 1 to 8 loads of 16 bytes a thread; and its cap on registers."""
    for dtype in (torch.bfloat16, torch.float32):
        for op in ("token_logprobs", "kl_divergence"):
            for kernel, mode, loads in ((f"{op}_fwd", FORWARD, (2, 4, 8)), (f"{op}_bwd", BACKWARD, (1, 2, 4))):
                size = dtype.itemsize
                row = (Place(("kernels.configs",), "LAUNCHES", (kernel, size)),)
                sizes = tuple((32 * warps * n * 16 // size, warps) for warps in (4, 8, 16) for n in loads)
                sums = mode == FORWARD  # the backward writes each logit's gradient by itself
                name, cases = f"LAUNCHES {kernel} {size}", _rows(op, mode, dtype)
                yield LaunchKnob(name, row, sizes, cases, sums, group="launches")
                caps = tuple((cap,) for cap in (None, 48, 64, 96, 128))
                yield LaunchKnob(f"{name} maxnreg", row, caps, cases[:2], False, group="registers")


def _case(op: str, mode: str, shape: tuple[int, ...], variant: str = "", call: str = "") -> Case:
    dtype = torch.bfloat16 if op.startswith("linear_") else torch.float32
    return Case(op, call or op, mode, dtype, shape, ("tune",), (), variant)


_GAE = tuple(_case("gae", FORWARD, shape, "padded") for shape in ((512, 4_096), (16, 131_072), (8_192, 2_048)))
_PACKED = (_case("gae", FORWARD, (512, 2_048), "packed"), _case("gae", FORWARD, (64, 16_384), "packed holes skip"))
_POLICY = _case("policy_loss", BOTH, (256, 4_096), "grpo k3")
_GSPO = _case("policy_loss", BOTH, (512, 4_096), "gspo k3", "policy_loss_gspo")
_DPO = _case("preference_loss", BOTH, (64, 2_048), "dpo")
_WHITEN = _case("whiten", FORWARD, (512, 4_096), "masked")
_PROCESS = _case("process_advantages", FORWARD, (512, 4_096))
_KL_ESTIMATE = _case("kl_estimate", BOTH, (512, 4_096), "k3")
_HEAD = (8_192, 4_096, 131_072)
_LINEAR = (
    _case("linear_policy_loss", BOTH, _HEAD, "grpo k3"),
    _case("linear_token_logprobs", BOTH, _HEAD),
    _case("linear_token_logprobs", FORWARD, _HEAD),
)


def _constants() -> Iterator[Knob]:
    def knob(names: str, candidates: Sequence[Any], cases: Sequence[Case], cut: bool = True, **more: Any) -> Knob:
        """names: "module.NAME[,NAME]"; module may be several joined by "+", the first of which defines the name."""
        modules, _, constants = names.partition(".")
        held = tuple(f"kernels.{module}" for module in modules.split("+"))
        places = tuple(Place(held, name) for name in constants.split(","))
        tuples = tuple(c if len(places) > 1 else (c,) for c in candidates)
        return Knob(f"{modules.partition('+')[0]}.{constants}", places, tuples, tuple(cases), cut, **more)

    few = _rows("token_logprobs", FORWARD, torch.bfloat16, ((64, 131_072), (8_192, 131_072), (64, 262_144)))
    yield knob("configs.MAX_PART", (8_192, 16_384, 32_768, 65_536, 131_072, 262_144), few)
    kl = _rows("kl_divergence", FORWARD, torch.bfloat16, _ROWS[:1])
    yield knob("configs.VECTOR_BYTES", (8, 16, 32, 64), (few[1], *kl))
    yield knob("configs.SCAN_PART", (1_024, 2_048, 4_096, 8_192, 16_384), (_GAE[1], _GAE[0], *_PACKED))
    rows = ((512, 2), (512, 4), (1_024, 2), (1_024, 4), (1_024, 8), (2_048, 4), (2_048, 8), (4_096, 8))
    yield knob("configs.SCAN_ROWS", rows, (*_GAE, _case("vtrace", FORWARD, (512, 4_096), "padded")))
    yield knob("configs.SCAN_PACKED", ((256, 1), (256, 2), (512, 2), (512, 4), (1_024, 4), (1_024, 8)), _PACKED)
    segments = ((512, 4), (1_024, 4), (1_024, 8), (2_048, 8), (4_096, 8), (4_096, 16))
    held = "token_loss+token_loss_sequences+kl_estimate"
    yield knob(f"{held}.SEGMENT,WARPS", segments, (_POLICY, _GSPO, _KL_ESTIMATE))
    caps = ({}, {"maxnreg": 64}, {"maxnreg": 80}, {"maxnreg": 96}, {"maxnreg": 128})
    yield knob("token_loss.REGISTERS", caps, (_POLICY,), False)
    yield knob("token_loss_sequences.REGISTERS", caps, (_GSPO,), False)
    yield knob("token_loss.FINISH_TILE", (512, 1_024, 2_048, 4_096), (_POLICY,))
    yield knob("token_loss_sequences.TILE_B", (256, 512, 1_024, 2_048), (_GSPO,), False)
    yield knob("preference.BLOCK_T,WARPS", ((1_024, 4), (1_024, 8), (2_048, 4), (2_048, 8), (4_096, 8)), (_DPO,))
    yield knob("preference.TILE_B,FINISH_WARPS", ((64, 2), (128, 4), (256, 4), (256, 8), (512, 8)), (_DPO,))
    yield knob("preference.FINISH_REGISTERS", ({}, {"maxnreg": 96}, {"maxnreg": 128}, {"maxnreg": 168}), (_DPO,), False)
    group = _case("group_advantages", FORWARD, (2**20,), "shuffled")
    yield knob("configs.GROUP_BLOCK", (32, 64, 128, 256), (group,))
    blocks = ((8, 128), (16, 128), (16, 256), (16, 512), (32, 128), (32, 256))
    yield knob("configs.PROCESS_BLOCK", blocks, (_PROCESS,), False)
    sizes = ((512, 4), (1_024, 4), (2_048, 4), (2_048, 8), (4_096, 8))
    yield knob("configs.WHITEN_BLOCK,WHITEN_WARPS", sizes, (_WHITEN,))
    yield knob("configs.WHITEN_JOIN_BLOCK", (256, 512, 1_024, 2_048), (_WHITEN,))
    steps = (_case("n_step_returns", FORWARD, (512, 4_096), "padded"),)
    yield knob("configs.N_STEP_BLOCK,N_STEP_WARPS", ((512, 4), (1_024, 4), (1_024, 8), (2_048, 8)), steps, False)
    ids = _rows("token_logprobs", FORWARD, torch.bfloat16, ((131_072, 32_768),))
    yield knob("configs.IDS_BLOCK", (16, 32, 64, 128), ids, False)
    scaled = (_case("linear_policy_loss", BOTH, (128, *_HEAD[1:]), f"grpo k3 {HALVED}"),)
    scales = ((4_096, 4), (8_192, 8), (16_384, 8), (32_768, 8), (32_768, 16), (65_536, 16))
    yield knob("configs.SCALE_BLOCK,SCALE_WARPS", scales, scaled, False)


def _workspace() -> Knob:
    sizes = tuple((mib * tiles.MIB,) for mib in (64, 128, 256, 512, 1_024, 2_048))
    place = (Place(("tiles",), "GPU_WORKSPACE"),)
    return WorkspaceKnob("tiles.GPU_WORKSPACE", place, sizes, _LINEAR, True, memory=True, group="chunk")


def _backends() -> Iterator[Knob]:
    """A knob an op that both backends have, over its cases of the suite gpu and a few with other N and V."""
    more: list[Case] = []
    for op in ("token_logprobs", "kl_divergence"):
        more += _rows(op, FORWARD, torch.bfloat16, _ROWS[1:4]) + _rows(op, BACKWARD, torch.bfloat16, _ROWS[:3])
    known = [*(case for case in CASES if "gpu" in case.suites), *_PACKED, _PROCESS, *more]
    for op in dict.fromkeys(case.op for case in known):
        cases = tuple({c.name: c for c in known if c.op == op}.values())
        if op not in TRITON_ONLY:
            yield BackendKnob(f"backend {op}", (), (("triton",), ("cuda",)), cases, True, group="backends")


GROUPS = ("backends", "chunk", "launches", "constants", "registers")


def knobs() -> list[Knob]:
    """All of them, in the order of GROUPS."""
    found = [*_backends(), _workspace(), *_launches(), *_constants()]
    return sorted(found, key=lambda knob: GROUPS.index(knob.group))
