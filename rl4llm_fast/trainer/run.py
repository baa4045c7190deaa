"""The run around every trainer: seeds, model, checkpoints, metrics, held-out measures, the saved model, the curves."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

import rl4llm_fast as rf

from . import checkpoint
from .data import DataConfig, Limits
from .devices import choose_device
from .distributed import Ranks, join, say
from .guard import Diverged, gradient_problem, problem_of, save_batch
from .metrics import Averages, History, Phases, phase_table
from .model import load_model, recompute_layers
from .optimizer import MasterAdamW, learning_rate
from .settings import RunConfig
from .sharding import shard, whole_state
from .tasks import examples_of_step

Item = TypeVar("Item")


@dataclass
class TrainResult:
    """What a trainer returns: the trained model, one row of metrics a step, and where the files lie."""

    model: nn.Module
    tokenizer: Any
    history: list[dict[str, Any]]
    output_dir: Path


def differences(model: nn.Module, config: RunConfig, ranks: Ranks) -> str:
    """In what a model differs from the device and the precision that the config asks for; "" if in nothing."""
    largest = max(model.parameters(), key=torch.Tensor.numel)  # heads may have a precision of their own
    device = choose_device(config.device)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    found = []
    if largest.device.type != device.type or device.index not in (None, largest.device.index):
        found.append(f"on {largest.device}, where device asks for {device}")
    cut = config.parallel == "fsdp" and ranks.size > 1  # into parts that are fp32, whatever it was
    if largest.dtype != dtype and not cut:
        found.append(f"in {largest.dtype}, where precision = {config.precision} asks for {dtype}")
    return " and ".join(found)


class Trainer:
    """What trainers have in common. Each sets ``optimizer`` and says what a step, a held-out row and a plot are.

    Dropout is off throughout: the loss of a step is a function of weights and data alone.
    """

    name = "train"
    many_processes = False  # whether torchrun may start several of it
    can_shard = False  # whether they may hold parts of the model: every forward pass then takes all of them
    data_key = ""  # a digest of the rows, where a step's place in them is all that a checkpoint knows of the data
    optimizer: MasterAdamW
    updates = 0  # how often the weights have been changed since the run was started

    def __init__(self, config: RunConfig, model: nn.Module | None, tokenizer: Any) -> None:
        self.ranks = join()
        if self.ranks.size > 1 and not self.many_processes:
            raise ValueError(f"train {self.name.lower()}: runs in one process, but {self.ranks.size} were started")
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.evaluators = self.ranks  # who shares the held-out rows
        if config.parallel == "fsdp" and self.ranks.size > 1:
            config.wanted(self.can_shard, "parallel", f"ddp for train {self.name.lower()}")
            size = getattr(config, "batch_size", 0)
            config.wanted(size % self.ranks.size == 0, "batch_size", f"a multiple of {self.ranks.size} under fsdp")
            self.evaluators = Ranks()  # each process all of them: their forward passes must be as many
        self.run_config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        if model is None:
            model, loaded = load_model(config.model, precision=config.precision, device=choose_device(config.device))
            tokenizer = tokenizer or loaded
        elif unlike := differences(model, config, self.ranks):
            say(f"model: is trained as it was given, {unlike}")
        if isinstance(config, DataConfig) and getattr(tokenizer, "eos_token_id", 0) is None:
            say("tokenizer: has no end token; answers of the data that are text are learned without one")
        self.model: Any = model.eval()
        self.ranks.copy_first([*model.parameters(), *model.buffers()])
        self.tokenizer = tokenizer
        self.limits = Limits.of(model)
        if config.gradient_checkpointing:
            recompute_layers(self.model)
        self.device: torch.device = next(model.parameters()).device
        self.phases = Phases(self.device)

    # What a trainer fills in

    def step(self, step: int) -> dict[str, Any]:
        """One step, counted from 1: its row of metrics."""
        raise NotImplementedError

    def heldout_row(self) -> dict[str, float]:
        """The held-out measures now; none without held-out data."""
        raise NotImplementedError

    def brief(self, row: dict[str, Any]) -> str:
        """A row in a few words, for the progress bar."""
        raise NotImplementedError

    def plot(self, rows: list[dict[str, Any]], folder: Path) -> None:
        """Draw the curves into ``folder``."""
        raise NotImplementedError

    def before_first_step(self) -> dict[str, float]:
        """Held-out measures of the model as it came, where they cost little: the row of step 0."""
        return {}

    def state(self) -> dict[str, Any]:
        """What steps change, for the checkpoint: tensors and plain values."""
        return self.optimizer.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Back to where ``state`` was taken."""
        self.optimizer.load_state_dict(state)

    def finish(self) -> None:
        """What is left to do on the trained model before it is saved."""

    # What they share

    def make_optimizer(self, model: nn.Module) -> MasterAdamW:
        c = self.run_config
        if c.parallel == "fsdp" and self.ranks.size > 1:
            shard(model, self.ranks, c.precision)
        return MasterAdamW(
            model, lr=c.learning_rate, betas=c.adam_betas, eps=c.adam_eps, weight_decay=c.weight_decay,
            ranks=self.ranks,
        )  # fmt: skip

    def run(self) -> TrainResult:
        """All steps, from the last checkpoint in ``output_dir`` where there is one."""
        from tqdm.auto import tqdm

        c, folder = self.run_config, Path(self.run_config.output_dir)
        path, first = folder / "checkpoint.pt", 0
        if c.resume and path.is_file():
            state = checkpoint.load(path, c, self.data_key)
            first = state["step"]
            self.load_state(state["optimizer"])
            checkpoint.restore_rng(state, self.generator)
        if len(set(self.ranks.gather([first]))) > 1:
            raise ValueError(f"output_dir: {folder} holds a checkpoint that only some of the processes see")
        one = self.ranks.first  # the process that writes
        history = History(folder / "metrics.jsonl", keep_steps=first, events=c.tensorboard, write=one)
        if first == 0 and c.eval_every and (row := self.before_first_step()):
            history.add({"step": 0, **row})
        progress = tqdm(
            total=c.steps, initial=first, desc=self.name, unit="step", disable=not (c.progress and one), ncols=90
        )
        with progress:
            for step in range(first + 1, c.steps + 1):
                row = self.step(step)
                if c.eval_every and (step % c.eval_every == 0 or step == c.steps):
                    row |= self.heldout_row()
                history.add(row)
                progress.set_postfix_str(f"{self.brief(row)}  {row['seconds']:.1f} s/step", refresh=False)
                progress.update()
                if c.checkpoint_every and (step % c.checkpoint_every == 0 or step == c.steps):
                    self.save(step)
        history.close()
        if c.progress and one and history.rows:
            print(phase_table(history.rows))
        self.finish()
        if c.save_model:
            self.save_model(folder / "model")
        if one:
            self.plot(history.rows, folder)
        return TrainResult(self.model, self.tokenizer, history.rows, folder)

    def save(self, step: int) -> None:
        path, state = Path(self.run_config.output_dir) / "checkpoint.pt", self.state()
        if self.ranks.first:
            checkpoint.save(
                path, step=step, config=self.run_config, data_key=self.data_key, optimizer=state,
                generator=self.generator,
            )  # fmt: skip

    def save_model(self, folder: Path) -> None:
        """The trained model and its tokenizer as a folder that is there whole or not at all.

        Raises:
            OSError: it cannot be written, as on a full disk.
        """
        sharded = self.run_config.parallel == "fsdp" and self.ranks.size > 1
        options = {"state_dict": whole_state(self.model, self.run_config.precision, self.ranks)} if sharded else {}
        if not self.ranks.first:
            return
        from safetensors import SafetensorError

        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self.model.save_pretrained(partial, **options)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(partial)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            path = folder.parent / "checkpoint.pt"
            kept = f"; {path} has its weights, and the same run started again saves it" if path.is_file() else ""
            raise OSError(f"{folder}: the model cannot be saved: {error}{kept}") from error
        shutil.rmtree(folder, ignore_errors=True)  # of a run before this one
        partial.rename(folder)

    def update_weights(self, step: int, metrics: Mapping[str, float], batch: Any = None) -> float:
        """The optimizer's step on the gradients that are there; the gradient's norm before clipping.

        ``metrics`` holds their "loss", and "ratio_max" where there are ratios. A step that would spoil the weights is
        not taken: the run stops with ``batch`` saved, or goes on without it (``on_divergence``; the norm is then NaN).

        Raises:
            Diverged: under ``on_divergence = "stop"``, saying what is wrong and where the batch lies.
        """
        c, rate = self.run_config, learning_rate(self.run_config, step)
        problem = problem_of(metrics, c.max_ratio)
        if problem:
            self.optimizer.discard()
            norm = math.nan
        else:
            norm = self.optimizer.step(rate, c.max_grad_norm)
            self.updates += 1
            if not math.isfinite(norm):
                problem = gradient_problem(norm, self.optimizer.nonfinite, len(self.optimizer.names))
        self.phases.mark("optimizer")
        if problem and c.on_divergence == "stop":
            path = Path(c.output_dir) / "diverged" / f"step-{step}.pt"
            if self.ranks.first:  # every process knows all of the batch
                save_batch(path, step, problem, metrics, batch)
            raise Diverged(
                f"step {step}: {problem}. The update was not taken and the batch lies in {path}; "
                f"on_divergence=skip leaves such updates out and goes on from the last checkpoint"
            )
        return norm

    def take_step(self, step: int, metrics: dict[str, float], batch: Any = None) -> dict[str, Any]:
        """``update_weights``, and the row of the step."""
        norm = self.update_weights(step, metrics, batch)
        rate = learning_rate(self.run_config, step)
        seconds = {phase: value for phase, value in self.phases.seconds.items() if value}
        return {
            "step": step,
            **metrics,
            "grad_norm": norm,
            "updates_skipped": float(not math.isfinite(norm)),
            "learning_rate": rate,
            "seconds": sum(seconds.values()),
            **{f"seconds_{phase}": value for phase, value in seconds.items()},
        }

    def micro_batches(self, items: Sequence[Item]) -> list[list[Item]]:
        """This process's share of ``items`` in pieces of ``micro_batch_size``."""
        items = self.ranks.share(items)
        size = self.run_config.micro_batch_size or max(len(items), 1)
        return [list(items[i : i + size]) for i in range(0, len(items), size)]

    def chosen_backend(self) -> contextlib.AbstractContextManager[None]:
        name = self.run_config.backend
        return contextlib.nullcontext() if name == "auto" else rf.use_backend(name)


class MeanLossTrainer(Trainer):
    """A trainer whose loss and metrics are means over rows, in which every row counts the same."""

    many_processes = True
    config: Any  # with batch_size
    train: list[Any]
    heldout: list[Any]

    def loss(self, rows: Sequence[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The mean loss of ``rows``, and the means of its metrics."""
        raise NotImplementedError

    def batch(self, step: int) -> list[Any]:
        """The rows of a step, counted from 1."""
        return examples_of_step(self.train, step, self.config.batch_size, self.config.seed)

    def before_rows(self, rows: Sequence[Any]) -> None:
        """Called with all rows of a step, and with the held-out ones, before ``loss`` sees them in parts."""

    def step(self, step: int) -> dict[str, Any]:
        self.phases = Phases(self.device)
        batch = self.batch(step)
        self.before_rows(batch)
        averages, total = Averages(), torch.zeros((), device=self.device)
        for micro in self.micro_batches(batch):
            loss, metrics = self.loss(micro)
            share = loss * (len(micro) / len(batch))  # the parts add up to the batch
            self.phases.mark("loss")
            share.backward()  # type: ignore[no-untyped-call]
            self.phases.mark("backward")
            averages.add(metrics, len(micro))
            total += share.detach()
        return self.take_step(step, {"loss": self.ranks.sum(total), **averages.result(self.ranks)}, batch)

    def heldout_parts(self) -> list[list[Any]]:
        size, own = self.config.micro_batch_size or self.config.batch_size, self.evaluators.share(self.heldout)
        return [own[i : i + size] for i in range(0, len(own), size)]

    @torch.no_grad()
    def heldout_row(self) -> dict[str, float]:
        """Loss and metrics of the held-out rows."""
        if not self.heldout:
            return {}
        self.before_rows(self.heldout)
        averages = Averages()
        for part in self.heldout_parts():
            loss, metrics = self.loss(part)
            averages.add({"loss": loss, **metrics}, len(part))
        return {f"heldout_{name}": value for name, value in averages.result(self.evaluators).items()}

    def before_first_step(self) -> dict[str, float]:
        return self.heldout_row()
