"""Every loss of the DPO family on film reviews that people rated, in one table; and where IPO settles, DPO grows.

    python examples/film_reviews.py vaderSentiment-3.3.2.tar.gz data/film_reviews   (it says where to get that)
    python examples/dpo_family.py data/film_reviews runs/dpo_family

SmolLM2-135M, 16 steps a loss, in fp32: 19 minutes on two cores with AVX-512, 33 on two with AVX2 only, and the same
figures. A run that is there is not run again, and one that was cut off goes on from its checkpoint, so the same command
finishes what it began. Written are

    table.md, table.json   held-out loss, pair accuracy and margin before and after, exact KL to the first model,
                           seconds a step and peak memory, a line for each loss and seed; the JSON has every margin
    ipo_settles.png        survey §5.2.9: four pairs over and over, on which IPO's margin comes to rest at its target,
                           beta * h = 1/2, and DPO's does not stop

The exit status is 0 if every loss improved its held-out measure.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

import rl4llm_fast as rf
from rl4llm_fast import trainer

REPEATED = 4  # pairs
# Its config, its data, its settings beyond those of all.
METHODS = {
    "dpo": (trainer.DPOConfig, "pairs", {}),
    "dpo, smoothed": (trainer.DPOConfig, "pairs", {"loss_options": {"label_smoothing": 0.1}}),
    "robust": (trainer.DPOConfig, "pairs", {"loss": "robust", "loss_options": {"label_smoothing": 0.1}}),
    "ipo": (trainer.DPOConfig, "pairs", {"loss": "ipo"}),
    "hinge": (trainer.DPOConfig, "pairs", {"loss": "hinge"}),
    "cpo": (trainer.DPOConfig, "pairs", {"loss": "cpo"}),
    "simpo": (trainer.DPOConfig, "pairs", {"loss": "simpo", "beta": 2.0, "loss_options": {"gamma": 0.5}}),
    "orpo": (trainer.DPOConfig, "pairs", {"loss": "orpo", "loss_options": {"lam": 1.0}}),
    "2d_dpo": (trainer.DPOConfig, "segments", {"loss": "2d_dpo", "score_max": 1.0}),
    "kto": (trainer.KTOConfig, "labelled", {}),
    "curry": (trainer.CurryConfig, "ranked", {}),
    "dpo, repeated": (trainer.DPOConfig, "repeated", {}),
    "ipo, repeated": (trainer.DPOConfig, "repeated", {"loss": "ipo"}),
}
TRAIN = {
    trainer.DPOConfig: trainer.train_dpo,
    trainer.KTOConfig: trainer.train_kto,
    trainer.CurryConfig: trainer.train_curry,
}


def config_of(name: str, seed: int, arguments: argparse.Namespace):
    """The run's config; its numbers of answers a step and held out are about the same for all of them."""
    kind, data, settings = METHODS[name]
    folder = run_folder(arguments, name, seed)
    path = Path(arguments.data) / f"{data}.jsonl"
    shared = {
        "model": arguments.model, "steps": arguments.steps, "batch_size": 4, "heldout": 32, "learning_rate": 2e-5,
        "max_length": 256, "seed": seed, "backend": arguments.backend, "eval_every": arguments.steps,
        "precision": "fp32",  # with bf16 weights small updates show in leaps, when they have added up to a bit
        "checkpoint_every": max(arguments.steps // 2, 1), "save_model": False,
        "output_dir": str(folder), "reference_cache": str(Path(arguments.out) / "reference"),
    }  # fmt: skip
    if data == "repeated":
        path = folder / "repeated.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = (Path(arguments.data) / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:REPEATED]
        path.write_text("\n".join(lines), encoding="utf-8")
        shared |= {"batch_size": REPEATED, "heldout": 0, "eval_every": 0, "learning_rate": 1e-5}
        shared |= {"steps": 3 * arguments.steps // 2}
    elif kind is trainer.KTOConfig:
        shared |= {"batch_size": 8, "heldout": 64}
    elif kind is trainer.CurryConfig:
        shared |= {"heldout": 12, "steps": 0, "steps_per_round": max(arguments.steps // 3, 1)}
    return kind(**shared, data=str(path), **settings)


def run_folder(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(arguments.out) / f"{name.replace(', ', '_')}-seed{seed}"


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process has had allocated: on the GPU where it computes there, else on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_one(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train, and write what came of it to result.json."""
    config = config_of(name, seed, arguments)
    trained = TRAIN[type(config)](config)
    folder, history = Path(config.output_dir), trained.history
    steps = [row for row in history if "seconds" in row]
    held = [row for row in history if "heldout_loss" in row]
    seconds = sorted(row["seconds"] for row in steps)
    result = {
        "method": name, "seed": seed, "steps": len(steps), "batch_size": config.batch_size,
        "learning_rate": config.learning_rate, "beta": config.beta, "backend": config.backend, "model": config.model,
        "before": held[0] if held else None, "after": held[-1] if held else None,
        "margins": [row["margin"] for row in steps],
        "seconds_a_step": seconds[len(seconds) // 2],
        "peak_memory_gib": peak_memory_gib(next(trained.model.parameters()).device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "rl4llm_fast": rf.__version__,
        "python": platform.python_version(), "cpu_count": os.cpu_count(),
    }  # fmt: skip
    partial = folder / "result.partial"
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    partial.replace(folder / "result.json")
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # gigabytes, and the run is done


def improved(result: dict) -> bool:
    """The held-out loss fell and more pairs are in the right order: more than by chance, where before all were ties."""
    before, after = result["before"], result["after"]
    chance = 0.5 if before["heldout_accuracy"] < 0.5 and abs(before["heldout_margin"]) < 1e-3 else 0.0
    better = after["heldout_accuracy"] > max(before["heldout_accuracy"], chance)
    return better and after["heldout_loss"] < before["heldout_loss"]


def table(results: list[dict]) -> str:
    head = [
        "method", "seed", "held-out loss", "held-out accuracy", "held-out margin", "KL a token", "s a step", "peak GiB",
        "better",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in results:
        before, after = result["before"], result["after"]
        if after is None:
            continue
        change = [
            f"{before[f'heldout_{k}']:.3f} -> {after[f'heldout_{k}']:.3f}" for k in ("loss", "accuracy", "margin")
        ]
        cells = [
            result["method"], str(result["seed"]), *change, f"{after['heldout_kl']:.4f}",
            f"{result['seconds_a_step']:.2f}", f"{result['peak_memory_gib']:.2f}", "yes" if improved(result) else "no",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    one = results[0]
    return "\n".join([
        *lines, "",
        f"{one['model']}, {one['steps']} steps, learning rate {one['learning_rate']:g}, backend {one['backend']}, "
        f"{one['threads']} threads, torch {one['torch']}. Seconds are the median step's. Where there is a reference "
        "every reward is 0 at first, so no pair is strictly right before; chance is 0.5. For kto accuracy is the share "
        "of answers on their side of z, and the margin that of desirable over undesirable answers.",
    ]) + "\n"  # fmt: skip


def plot(results: list[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for result in results:
        if result["method"].endswith("repeated"):
            name, color = result["method"].split(",")[0], "tab:blue" if "ipo" in result["method"] else "tab:orange"
            axes.plot(
                range(1, result["steps"] + 1), result["margins"], color=color, label=f"{name}, seed {result['seed']}"
            )
    axes.axhline(0.5, color="gray", linestyle="--", label="IPO's target")
    axes.set(xlabel="step", ylabel="margin of the training pairs", title=f"{REPEATED} pairs over and over (§5.2.9)")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the folder that film_reviews.py wrote")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--backend", default="auto", help="eager: plain PyTorch, for comparison (into another folder)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # one run, in a process of its own
    arguments = parser.parse_args()
    if arguments.child:
        run_one(arguments.only[0], arguments.seeds[0], arguments)
        return 0
    results = []
    for seed in arguments.seeds:
        for name in arguments.only:
            path = run_folder(arguments, name, seed) / "result.json"
            if not path.is_file():
                print(f"== {name}, seed {seed}", flush=True)
                own = [*sys.argv[1:], "--child", "--only", name, "--seeds", str(seed)]
                subprocess.run([sys.executable, __file__, *own], check=True)
            results.append(json.loads(path.read_text(encoding="utf-8")))
    out = Path(arguments.out)
    (out / "table.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (out / "table.md").write_text(table(results), encoding="utf-8")
    plot(results, out / "ipo_settles.png")
    print(table(results))
    return 0 if all(improved(result) for result in results if result["after"]) else 1


if __name__ == "__main__":
    sys.exit(main())
