"""Sentences from film reviews, each rated by people from -4 to 4, as data for the trainers.

    pip download --no-deps --no-build-isolation --no-binary :all: vaderSentiment==3.3.2
    python examples/film_reviews.py vaderSentiment-3.3.2.tar.gz data/film_reviews

The ratings (Hutto and Gilbert 2014, MIT licence) lie in the source package of vaderSentiment. Written are

    answers.jsonl    positive sentences, for sft
    pairs.jsonl      a positive against a negative one, for dpo and rm
    labelled.jsonl   single sentences, positive or negative, for kto
    ranked.jsonl     four sentences from four ranges of ratings, for rm and curry
    segments.jsonl   a review of two sentences against another, for 2d_dpo: of a pair's four one is positive, one
                     negative, two are in between; each scored from 0 to 1 over two aspects, the mean rating and the
                     share of raters whom the sentence pleased
    prompts.jsonl    the first four words of sentences between good and bad, which are in no pair, for ppo

No sentence is in a file twice, so rows held out hold sentences out.
"""

import hashlib
import io
import json
import random
import sys
import tarfile
from pathlib import Path

SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
PROMPT = "Write a sentence of a film review."
TESTS = (lambda rating: rating >= 1.5, lambda rating: rating <= -1.5, lambda rating: -1.5 < rating < 1.5)
RANGES = ((2.0, 4.0), (0.5, 2.0), (-1.5, 0.5), (-4.0, -1.5))


def ratings(sdist: Path) -> list[tuple[float, str, list[int]]]:
    """Every sentence with its mean rating, and those of all raters."""
    data = sdist.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise SystemExit(f"{sdist}: not the source package of vaderSentiment 3.3.2")

    def member(archive: bytes, ending: str) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            name = next(name for name in tar.getnames() if name.endswith(ending))
            return tar.extractfile(name).read()

    archive = member(data, "hutto_ICWSM_2014.tar.gz")
    lines = {}  # by the sentence's number
    for line in member(archive, "movieReviewSnippets_anonDataRatings.txt").decode().splitlines():
        if line.count("\t") >= 3:
            number, _, _, given = line.split("\t", 3)
            lines[number] = json.loads(given)
    text = member(archive, "movieReviewSnippets_GroundTruth.txt").decode()
    rows = [line.split("\t", 2) for line in text.splitlines() if line.count("\t") >= 2]
    sentences = {s.strip(): (float(rating), lines[number]) for number, rating, s in rows if s.strip()}
    return [(rating, sentence, given) for sentence, (rating, given) in sentences.items()]


def two_sentences(good: list, bad: list, between: list) -> list[dict]:
    """Pairs of reviews: in the chosen and in the rejected one, the telling sentence stands at the same place."""
    rng, rows = random.Random(2), []
    for better, worse, *rest in zip(good, bad, between[::2], between[1::2], strict=False):
        row, first = {"prompt": "Write a film review of two sentences."}, rng.random() < 0.5
        for side, telling, other in (("chosen", better, rest[0]), ("rejected", worse, rest[1])):
            both = (telling, other) if first else (other, telling)
            row[side] = [both[0][1] + " ", both[1][1]]
            row[f"{side}_scores"] = [
                [round((rating + 4) / 8, 3), round(sum(r > 0 for r in given) / len(given), 3)]
                for rating, _, given in both
            ]
        rows.append(row)
    return rows


def main(sdist: Path, folder: Path) -> None:
    rated = ratings(sdist)
    random.Random(0).shuffle(rated)
    good = [s for rating, s, _ in rated if rating >= 1.5]
    bad = [s for rating, s, _ in rated if rating <= -1.5]
    ranges = [[s for rating, s, _ in rated if low <= rating < high] for low, high in RANGES]
    thirds = [[row for row in rated if test(row[0])] for test in TESTS]
    # Every other sentence of either kind: answers to one prompt that are no pairs.
    labelled = [(s, True) for s in good[::2]] + [(s, False) for s in bad[1::2]]
    random.Random(1).shuffle(labelled)
    openings = {" ".join(s.split()[:4]) for rating, s, _ in rated if -1.5 < rating < 1.5 and len(s.split()) >= 8}
    files = {
        "answers": [{"prompt": PROMPT, "answer": s} for s in good],
        "pairs": [{"prompt": PROMPT, "chosen": w, "rejected": l} for w, l in zip(good, bad, strict=False)],
        "labelled": [{"prompt": PROMPT, "answer": s, "desirable": desirable} for s, desirable in labelled],
        "segments": two_sentences(*thirds),
        "ranked": [{"prompt": PROMPT, "answers": four, "ranks": [0, 1, 2, 3]} for four in zip(*ranges, strict=False)],
        "prompts": [
            {"prompt": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": words}]}
            for words in sorted(openings)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
