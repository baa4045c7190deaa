"""Which backends can run here, and which one an op takes.

The argument ``backend=`` wins over :func:`use_backend`, that over the environment variable ``RL4LLM_FAST_BACKEND``,
that over the choice by device. Only the choice by device may fall back; a backend asked for by name either runs or
raises :class:`BackendError` with the reason.

``choose`` is plain Python on strings and device types, so that Dynamo folds it into a compiled graph.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import chunked, chunked_kl, chunked_losses, schemas
from .checks import environment, environment_key, without_contents
from .errors import BackendError
from .machine import driver_too_old

BACKENDS = ("eager", "cpu", "triton", "cuda")

# Choice by device, best first. Triton before CUDA C++ where MEASURED does not say otherwise.
_PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "eager"),
    "cuda": ("triton", "cuda", "eager"),
}

# op -> the faster backend on a GPU, with the GPU and by how much; `python -m bench.tune` prints the rows. By the op
# alone: the two order their sums differently, so a choice by N would change a row's bits with the batch around it.
MEASURED: dict[str, str] = {}

_LINEAR_LOSS = (
    "linear_policy_loss_fwd", "token_logprobs_fwd", "token_logprobs_bwd_", "policy_loss_fwd", "token_loss_bwd"
)  # fmt: skip

# What must be registered with torch.library before a public op can use a backend; (): plain PyTorch on every device.
OP_KERNELS: dict[str, tuple[str, ...]] = {
    "token_logprobs": ("token_logprobs_fwd", "token_logprobs_bwd"),
    "token_entropy": ("token_logprobs_fwd", "token_logprobs_bwd"),
    "linear_token_logprobs": ("linear_token_logprobs_fwd", "token_logprobs_fwd", "token_logprobs_bwd_"),
    "kl_divergence": ("kl_divergence_fwd", "kl_divergence_bwd"),
    "linear_kl_divergence": ("linear_kl_divergence_fwd", "kl_divergence_fwd", "kl_divergence_bwd_"),
    "group_advantages": ("group_advantages",),
    "gae": ("gae_fwd", "gae_bwd"),
    "discounted_returns": ("gae_fwd", "gae_bwd"),
    "lambda_returns": ("gae_fwd", "gae_bwd"),
    "n_step_returns": ("n_step_returns",),
    "vtrace": ("vtrace",),
    "shape_rewards": (),
    "process_advantages": ("process_advantages",),
    "whiten": ("whiten_stats", "whiten_apply"),
    "kl_estimate": ("kl_estimate_fwd", "token_loss_bwd"),
    "linear_kl_estimate": (
        "linear_token_logprobs_fwd",
        "token_logprobs_fwd",
        "token_logprobs_bwd_",
        "kl_estimate_fwd",
        "token_loss_bwd",
    ),
    "policy_loss": ("policy_loss_fwd", "token_loss_bwd"),
    "linear_policy_loss": _LINEAR_LOSS,
    "linear_sft_loss": _LINEAR_LOSS,
    "linear_preference_loss": (
        "linear_token_logprobs_fwd",
        "token_logprobs_fwd",
        "token_logprobs_bwd_",
        "preference_loss_fwd",
        "preference_loss_bwd",
    ),
    "value_loss": ("policy_loss_fwd", "token_loss_bwd"),
    "sft_loss": ("policy_loss_fwd", "token_loss_bwd"),
    "preference_loss": ("preference_loss_fwd", "preference_loss_bwd"),
    "kto_loss": ("preference_loss_fwd", "preference_loss_bwd"),
    "reward_model_loss": ("preference_loss_fwd", "preference_loss_bwd"),
    "ranked_reward_loss": (),
}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_override: str | None = None  # use_backend's; process-wide, like torch.set_num_threads
_overrides: list[list[str]] = []  # of the blocks that are open, in any thread; the last one is in force
_libraries: list[torch.library.Library] = []  # a Library unregisters its ops when it is collected
_extension_error: str | None = None
_triton_error: str | None = None
extension: ModuleType | None = None


class _Final(torch.autograd.Function):
    """Gradients as they are; what would differentiate them again raises."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """``count`` gradients, and behind them what they are gradients of."""
        ctx.message = message
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.message)


def _refuse_double_backward(namespace: str, name: str, library: torch.library.Library, functional: bool) -> None:
    message = (
        f"rl4llm_fast::{name} cannot be differentiated again: the library's gradients are explicit formulas without a "
        "second derivative (use backend='eager' for a double backward)"
    )

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(message)

    def in_place(*args: Any) -> Any:
        op = getattr(getattr(torch.ops, namespace), name).default
        sources = [a for a in args if isinstance(a, Tensor) and a.requires_grad] if torch.is_grad_enabled() else []
        if sources and not op._schema.returns:  # the gradient would be written where no graph could know of it
            raise RuntimeError(message)
        for argument, declared in zip(args, op._schema.arguments, strict=True):
            if argument is not None and declared.alias_info is not None and declared.alias_info.is_write:
                torch.autograd.graph.increment_version(argument)  # what makes other consumers' backward raise
        with torch._C._AutoDispatchBelowAutograd():
            grads = op(*args)
        return _Final.apply(message, len(grads), *grads, *sources) if sources else grads  # type: ignore[no-untyped-call]

    if functional:
        torch.library.register_autograd(f"{namespace}::{name}", backward, lib=library)
    else:  # torch.library knows no autograd formula for an op that mutates its input
        library.impl(name, in_place, "Autograd")


def _define(namespace: str) -> None:
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    for name, op in schemas.OPS.items():
        library.define(name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", op.fake, lib=library)
        if op.no_double_backward:
            _refuse_double_backward(namespace, name, library, functional="!" not in op.schema)
    chunked.register(library, namespace)
    chunked_kl.register(library, namespace)
    chunked_losses.register(library, namespace)


def _load_extension() -> None:
    global extension, _extension_error
    if os.environ.get("RL4LLM_FAST_NO_EXT") == "1":
        _extension_error = "RL4LLM_FAST_NO_EXT=1 is set"
        return
    if importlib.util.find_spec("rl4llm_fast._C") is None:
        _extension_error = "the compiled extension rl4llm_fast._C is not installed (pip install --no-build-isolation .)"
        return
    try:
        extension = importlib.import_module("rl4llm_fast._C")
    except ImportError as error:
        _extension_error = f"the compiled extension rl4llm_fast._C does not load: {error}"


def _load_triton() -> None:
    global _triton_error
    if importlib.util.find_spec("triton") is None:
        _triton_error = "triton is not installed (pip install triton)"
    elif not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        # Importing triton costs a third of a second that a CPU user would pay for nothing.
        _triton_error = "Triton needs a GPU, or TRITON_INTERPRET=1 set before the import of rl4llm_fast"
    else:
        try:
            importlib.import_module("rl4llm_fast.kernels.register")
        except ImportError as error:
            _triton_error = f"the Triton kernels do not load: {error}"


_define(schemas.NAMESPACE)
_define(schemas.TRITON_NAMESPACE)
_load_extension()
_load_triton()


def _probe(op: str, backend: str, device: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on a device type; None where it can."""
    if backend == "eager":
        return None
    if not OP_KERNELS[op]:
        return f"{op} exists as plain PyTorch only"
    if backend == "triton":
        if _triton_error:
            return _triton_error
        namespace, key = schemas.TRITON_NAMESPACE, "CUDA" if device == "cuda" else "CPU"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "on CPU tensors Triton runs in its interpreter only (TRITON_INTERPRET=1)"
    else:
        if _extension_error:
            return _extension_error
        if backend != device:
            return f"backend {backend!r} takes {backend} tensors, these are on {device!r}"
        if backend == "cuda" and extension and (too_old := driver_too_old(extension.build_info()["cuda"])):
            return too_old
        namespace, key = schemas.NAMESPACE, backend.upper()
    for kernel in OP_KERNELS[op]:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{kernel}", key):
            without = extension.build_info()["no_cuda_reason"] if backend == "cuda" and extension else None
            return f"{op} has no {backend} kernel for {device} tensors" + (
                f" (built without: {without})" if without else ""
            )
    return None


_UNUSABLE: dict[tuple[str, str, str], str | None] = {}
_AUTOMATIC: dict[tuple[str, str], str] = {}


def _build_tables() -> None:
    for op in OP_KERNELS:
        for device in ("cpu", "cuda"):
            for backend in BACKENDS:
                _UNUSABLE[op, backend, device] = _probe(op, backend, device)
            faster = [MEASURED[op]] if device == "cuda" and op in MEASURED else []
            order = (*faster, *_PREFERENCE[device])
            _AUTOMATIC[op, device] = next(b for b in order if _UNUSABLE[op, b, device] is None)


_build_tables()


_VARIABLE = "RL4LLM_FAST_BACKEND"
_variable_key = environment_key(_VARIABLE)


def named(backend: str | None) -> str | None:
    """The backend asked for by name, by the argument, ``use_backend`` or the environment; None: the choice is ours."""
    asked = backend or _override
    return asked or environment(_VARIABLE, _variable_key) or None


def choose(op: str, tensor: Tensor, backend: str | None = None) -> str:
    """The backend that ``op`` takes for ``tensor``.

    Raises:
        ValueError: the name is none of ``BACKENDS``.
        BackendError: a backend asked for by name cannot run here.
    """
    name = named(backend)
    device = tensor.device.type
    if name is None:
        chosen = _AUTOMATIC.get((op, device), "eager")
        # fp64 is for gradient checks on the CPU; a GPU user who passes it gets the oracle.
        return "eager" if tensor.dtype == torch.float64 and chosen != "cpu" else chosen
    if name not in BACKENDS:
        raise ValueError(f"backend: wanted one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "eager":
        return name
    reason = _UNUSABLE.get((op, name, device), f"{op} has no {name} kernel for {device} tensors")
    if reason is None and name != "cpu" and tensor.dtype not in _DTYPES:
        reason = f"{op} takes fp32, bf16 and fp16 there, got {tensor.dtype}"
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run {op}: {reason}")
    return name


def ops(backend: str) -> Any:
    """The torch.ops namespace that holds a backend's kernels."""
    return torch.ops.rl4llm_fast_triton if backend == "triton" else torch.ops.rl4llm_fast


def run_backward(backend: str, name: str, *args: Any) -> Any:
    """Call a backend's backward op.

    Its autograd rule does nothing but refuse to be differentiated, in 20 µs of Python: passed by where nobody can.
    """
    op = getattr(ops(backend), name)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def is_last_backward() -> bool:
    """Whether what the backward pass that runs has saved may be overwritten, or handed on as its result.

    Not where it keeps its graph, where it is differentiated again, which must raise, nor under compile, where the graph
    decides.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return _keeps_graph is not None and not _keeps_graph()


def is_one(grad: Tensor) -> bool:
    """Whether an upstream gradient is one number, 1, on the CPU: looking at it costs no synchronisation there."""
    return grad.dim() == 0 and grad.device.type == "cpu" and not without_contents() and grad.item() == 1


def backends() -> dict[str, list[str]]:
    """Every op of the library with the backends that can run here, on any device this machine has.

    Returns:
        ``{op: [backend, ...]}``, ``"eager"`` always among them.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {op: [b for b in BACKENDS if any(_UNUSABLE[op, b, d] is None for d in devices)] for op in OP_KERNELS}


def why_not(op: str, backend: str, device: str) -> str | None:
    """Why a backend cannot run an op on a device type ("cpu", "cuda"); None where it can."""
    return _UNUSABLE[op, backend, device]


def use_backend(backend: str) -> contextlib.AbstractContextManager[None]:
    """Run every op in the ``with`` block on ``backend`` ("eager", "cpu", "triton" or "cuda"), in the whole process.

    Raises:
        ValueError: another name, at the call already.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: wanted one of {', '.join(BACKENDS)}, got {backend!r}")
    return _using(backend)


@contextlib.contextmanager
def _using(backend: str) -> Iterator[None]:
    global _override
    mine = [backend]  # found again by what it is, not by its name: blocks of two threads may end in either order
    _overrides.append(mine)
    _override = backend
    try:
        yield
    finally:
        del _overrides[next(i for i, block in enumerate(_overrides) if block is mine)]
        _override = _overrides[-1][0] if _overrides else None
