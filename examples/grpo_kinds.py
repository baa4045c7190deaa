"""The kinds of GRPO side by side on one task: sums of three numbers, worked out line by line; one table.

    python examples/grpo_kinds.py runs/grpo_kinds

SmolLM2-135M, the same prompts and seed for all, two optimizer steps a batch so that ratios are not all 1. A run that is
there is not run again, and one that was cut off goes on from its checkpoint. Written are table.md and table.json: the
reward of the first and the last five steps, held-out accuracy before and after, seconds of a step and of its phases.
"""

import argparse
import json
from pathlib import Path

import torch
from step_rewards import sums_in_lines, true_lines

from rl4llm_fast.trainer import GRPOConfig, train_grpo
from rl4llm_fast.trainer.metrics import PHASES

SEQUENCES = {"aggregation": "seq_mean_token_mean"}  # (82)
KINDS = {
    "outcome": SEQUENCES,
    "process": SEQUENCES | {"supervision": "process"},
    "Dr.GRPO": {"advantage_scale": "none", "aggregation": "seq_mean_token_sum_norm"},
    "leave-one-out": SEQUENCES | {"advantage_baseline": "leave_one_out"},
    "GSPO": SEQUENCES | {"loss": "gspo"},
    "CISPO": {"loss": "cispo"},
    "SAPO": {"loss": "sapo"},
    "DAPO": {"loss_options": {"eps_high": 0.28}, "groups_without_spread": "resample", "overlong": "mask"},
    "KL in the loss": SEQUENCES | {"kl_coef": 0.02},
}


def config_of(kind: str, arguments: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(
        model=arguments.model, steps=arguments.steps, prompts_per_step=4, group_size=8, minibatches=2,
        max_new_tokens=24, learning_rate=1e-5, eval_every=arguments.steps, save_model=False, seed=arguments.seed,
        checkpoint_every=max(arguments.steps // 4, 1), progress=not arguments.quiet, log_samples=2,
        output_dir=str(Path(arguments.out) / kind.replace(" ", "_")), **KINDS[kind],
    )  # fmt: skip


def task_of(arguments: argparse.Namespace):
    return sums_in_lines(seed=arguments.seed, heldout=arguments.heldout)


def run(kind: str, arguments: argparse.Namespace) -> dict:
    """One kind's row of the table."""
    config = config_of(kind, arguments)
    path = Path(config.output_dir) / "result.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    history = train_grpo(config, task=task_of(arguments), step_reward=true_lines).history
    before, history = history[0]["heldout_accuracy"], history[1:]
    rewards, last = [row["reward_mean"] for row in history], history[-1]
    middle = {
        name: sorted(row.get(f"seconds_{name}", 0.0) for row in history)[len(history) // 2] for name in PHASES
    }  # the median step
    result = {
        "kind": kind, "steps": len(history), "first": sum(rewards[:5]) / len(rewards[:5]),
        "last": sum(rewards[-5:]) / len(rewards[-5:]), "before": before, "heldout_accuracy": last["heldout_accuracy"],
        "seconds": sum(row["seconds"] for row in history) / len(history), "phases": middle,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    path.write_text(json.dumps(result), encoding="utf-8")
    (path.parent / "checkpoint.pt").unlink(missing_ok=True)  # gigabytes, and the run is done
    return result


def table(results: list[dict]) -> str:
    lines = [
        "| kind | mean reward, first 5 steps | last 5 | held-out accuracy | s a step | sampling | log-probs | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        phases = " | ".join(f"{r['phases'][name]:.2f}" for name in ("sample", "logprobs", "loss"))
        lines.append(
            f"| {r['kind']} | {r['first']:.2f} | {r['last']:.2f} | {r['before']:.2f} -> {r['heldout_accuracy']:.2f} "
            f"| {r['seconds']:.1f} | {phases} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", default="runs/grpo_kinds")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--heldout", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--only", default="", help="kinds, with commas")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if not arguments.only or kind in arguments.only.split(",")]
    results = [run(kind, arguments) for kind in kinds]
    text = table(results)
    (Path(arguments.out) / "table.md").write_text(text, encoding="utf-8")
    (Path(arguments.out) / "table.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
