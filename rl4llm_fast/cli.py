"""The command ``rl4llm-fast``: train, demo, info."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from ._version import __version__

if TYPE_CHECKING:
    from .trainer.settings import RunConfig

C = TypeVar("C", bound="RunConfig")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; a mistake of the user's is one line on stderr and the exit status 2."""
    parser = argparse.ArgumentParser(prog="rl4llm-fast", description="Fused kernels for reinforcement learning on LLMs")
    parser.add_argument("--version", action="version", version=f"rl4llm_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("info", help="versions, what was built with what, backends usable here, GPU")
    commands.add_parser("demo", help="train SmolLM2-135M on arithmetic and compare fused with eager")
    train = commands.add_parser(
        "train",
        help="train a language model",
        epilog="Settings and their defaults are the fields of the trainer's config, as rl4llm_fast.trainer.DPOConfig; "
        "the folder examples has a TOML file for each algorithm.",
    )
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
    arguments = parser.parse_args(argv)

    try:
        if arguments.command == "info":
            from .info import main as info

            info()
        elif arguments.command == "demo":
            from .trainer.demo import main as demo

            return demo([])
        else:
            _train(arguments.algorithm, arguments.config, arguments.overrides)
    except (ValueError, TypeError, ImportError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        print(f"rl4llm-fast: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from .trainer.guard import Diverged

        if not isinstance(error, Diverged):
            raise
        print(f"rl4llm-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


def _train(algorithm: str, path: str | None, overrides: Sequence[str]) -> None:
    from . import trainer
    from .trainer.data import DataConfig, check_files

    def fill(kind: type[C]) -> C:
        config = trainer.fill(kind, path, overrides)
        if isinstance(config, DataConfig):
            check_files(config)  # before a model is loaded
        return config

    if algorithm == "sft":
        result = trainer.train_sft(fill(trainer.SFTConfig))
    elif algorithm == "rm":
        result = trainer.train_rm(fill(trainer.RMConfig))
    elif algorithm == "dpo":
        result = trainer.train_dpo(fill(trainer.DPOConfig))
    elif algorithm == "curry":
        result = trainer.train_curry(fill(trainer.CurryConfig))
    elif algorithm == "kto":
        result = trainer.train_kto(fill(trainer.KTOConfig))
    elif algorithm == "ppo":
        result = trainer.train_ppo(fill(trainer.PPOConfig))
    elif algorithm == "r1":
        result = trainer.train_r1(fill(trainer.R1Config))
    elif algorithm == "distill":
        result = trainer.train_distill(fill(trainer.DistillConfig))
    else:
        result = trainer.train_grpo(trainer.load_config(path, overrides))
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
    print(f"The model, metrics.jsonl, the curves and the checkpoint lie in {result.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
