"""The command ``rl4llm-fast``: train, demo, info."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import BackendError

if TYPE_CHECKING:
    from .trainer import TrainResult
    from .trainer.settings import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; a mistake of the user's is one line on stderr and the exit status 2."""
    parser = argparse.ArgumentParser(prog="rl4llm-fast", description="Fused kernels for reinforcement learning on LLMs")
    parser.add_argument("--version", action="version", version=f"rl4llm_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("info", help="versions, what was built with what, backends usable here, GPU")
    commands.add_parser("demo", help="train SmolLM2-135M on arithmetic and compare fused with eager", add_help=False)
    train = commands.add_parser(
        "train",
        help="train a language model",
        epilog="train ALGORITHM --help lists its settings; the folder examples has a TOML file for each algorithm.",
        add_help=False,
    )
    train.add_argument("-h", "--help", action=_Help, nargs=0, help="this; after an algorithm: its settings")
    train.add_argument(
        "algorithm",
        choices=["sft", "rm", "dpo", "curry", "kto", "ppo", "grpo", "r1", "distill"],
        help="README.md says what each learns from",
    )
    train.add_argument("config", nargs="?", help="a TOML file; without it the defaults")
    train.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a setting, e.g. --set learning_rate=2e-5 --set task_options.max_terms=3",
    )
    arguments, others = parser.parse_known_args(argv)
    if others and arguments.command != "demo":  # which has options of its own
        parser.error(f"unrecognized arguments: {' '.join(others)}")

    try:
        if arguments.command == "info":
            from .info import main as info

            info()
        elif arguments.command == "demo":
            from .trainer.demo import main as demo

            return demo(others)
        else:
            _train(arguments.algorithm, arguments.config, arguments.overrides)
    except (ValueError, TypeError, ImportError, OSError, BackendError) as error:  # OSError: a disk that is full, too
        print(f"rl4llm-fast: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        message = _stopped(error)
        if not message:
            raise
        print(f"rl4llm-fast: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted. {interrupt}".rstrip(), file=sys.stderr)
        return 130
    return 0


class _Help(argparse.Action):
    """The help of ``train``; with an algorithm before it, also the settings of that trainer, and no more."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        algorithm = getattr(namespace, "algorithm", None)
        if algorithm is None:
            parser.print_help()
        else:
            from .trainer.described import described

            print(f"Settings of train {algorithm}: keys of the TOML file, or of --set\n")
            print(described(_runs()[algorithm][1]))
        parser.exit()


def _stopped(error: RuntimeError) -> str:
    """What to say of a run that stopped for a reason that is no mistake in the code; "" of any other."""
    import torch

    from .trainer.guard import Diverged

    if isinstance(error, Diverged):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        first = str(error).splitlines()[0]
        return f"{first} A smaller micro_batch_size or gradient_checkpointing = true take less"
    return ""


def _runs() -> dict[str, tuple[Callable[..., TrainResult], type[RunConfig]]]:
    from . import trainer

    return {
        "sft": (trainer.train_sft, trainer.SFTConfig),
        "rm": (trainer.train_rm, trainer.RMConfig),
        "dpo": (trainer.train_dpo, trainer.DPOConfig),
        "curry": (trainer.train_curry, trainer.CurryConfig),
        "kto": (trainer.train_kto, trainer.KTOConfig),
        "ppo": (trainer.train_ppo, trainer.PPOConfig),
        "grpo": (trainer.train_grpo, trainer.GRPOConfig),
        "r1": (trainer.train_r1, trainer.R1Config),
        "distill": (trainer.train_distill, trainer.DistillConfig),
    }


def _train(algorithm: str, path: str | None, overrides: Sequence[str]) -> None:
    from . import trainer

    run, kind = _runs()[algorithm]
    config, start = trainer.fill(kind, path, overrides), time.time()
    try:
        result = run(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_next_run(config, start)) from None
    rewards = [row["reward_mean"] for row in result.history if "reward_mean" in row][-10:]
    if rewards:
        print(f"mean reward of the last {len(rewards)} steps: {sum(rewards) / len(rewards):.3f}")
    measures = {
        key: value
        for row in result.history
        for key, value in row.items()
        if key.startswith("heldout_") and value is not None
    }
    for name, value in measures.items():
        print(f"{name.replace('_', ' ')}: {value:.4g}")
    names = {"model": "the model", "metrics.jsonl": "metrics.jsonl", "checkpoint.pt": "the checkpoint"}
    found = [what for name, what in names.items() if (result.output_dir / name).exists()]
    print(f"In {result.output_dir} lie {', '.join([*found, 'the curves'])}")


def _next_run(config: RunConfig, start: float) -> str:
    """What the same command would do behind a run that began at ``start`` and was cut off."""
    folder = Path(config.output_dir)
    names = ("checkpoint.pt", "done.json", "sampled.jsonl")  # the two latter: of r1's stages, of distill's sampling
    kept = [path for name in names for path in (*folder.glob(name), *folder.glob(f"*/{name}"))]
    if not config.resume:  # what an earlier run left is none of this one's
        kept = [path for path in kept if path.stat().st_mtime >= start]
    if kept:
        last = max(kept, key=lambda path: path.stat().st_mtime)
        return f"The same command{'' if config.resume else ' with resume=true'} goes on from {last}"
    every = config.checkpoint_every
    first = f"the first is at step {every}" if every else "checkpoint_every is 0"
    return f"There is no checkpoint yet ({first}): the same command begins anew"


if __name__ == "__main__":
    sys.exit(main())
