"""Rows for the scripts beside this file: answers to small questions, calm ones, loud ones, and some between.

Each function is a data set in the form that one kind of trainer takes; a file of one's own has the same keys in JSONL.
"""

SUBJECTS = ("sea", "rain", "bread", "music", "snow", "forest", "ant", "light", "moon", "river", "desert", "bee")
CALM = (
    "The {} is worth a closer look.",
    "There is much to say about the {}, and little of it is simple.",
    "People have watched the {} for as long as there have been people.",
)
LOUD = ("WOW!!! The {} is THE BEST thing EVER!!!", "The {}?!? OMG, you have NO idea!!!", "BUY the {} NOW!!! So cool!!!")
ROWS = [(subject, i) for i in range(3) for subject in SUBJECTS]


def _prompt(subject: str) -> dict:
    return {"prompt": f"Tell me about the {subject}."}


def answers() -> list[dict]:
    """For ``train_sft``."""
    return [_prompt(s) | {"answer": CALM[i].format(s)} for s, i in ROWS]


def pairs() -> list[dict]:
    """For ``train_rm`` and ``train_dpo``."""
    return [_prompt(s) | {"chosen": CALM[i].format(s), "rejected": LOUD[i].format(s)} for s, i in ROWS]


def labelled() -> list[dict]:
    """For ``train_kto``."""
    return [_prompt(s) | {"answer": (LOUD, CALM)[good][i].format(s), "desirable": bool(good)}
            for s, i in ROWS for good in (0, 1)]  # fmt: skip


def ranked() -> list[dict]:
    """For ``train_curry``, and for ``train_rm`` too: three answers, 0 the best."""
    return [
        _prompt(s) | {"answers": [CALM[i].format(s), f"The {s}! Well, the {s}!", LOUD[i].format(s)], "ranks": [0, 1, 2]}
        for s, i in ROWS
    ]


def segmented() -> list[dict]:
    """For ``train_dpo`` with ``loss = "2d_dpo"``: two sentences an answer, each scored for its calm and its content."""
    return [
        _prompt(s) | {
            "chosen": [CALM[i].format(s) + " ", f"I like the {s}."], "chosen_scores": [[1.0, 0.9], [0.8, 0.4]],
            "rejected": [LOUD[i].format(s) + " ", f"I like the {s}."], "rejected_scores": [[0.0, 0.1], [0.8, 0.4]],
        }
        for s, i in ROWS
    ]  # fmt: skip


def report(result, measure: str) -> None:
    """Print a held-out measure of a run, before and after."""
    values = [row[measure] for row in result.history if measure in row]
    print(f"{measure} {values[0]:.3f} -> {values[-1]:.3f}; files in {result.output_dir}")
