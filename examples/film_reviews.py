"""Sentences from film reviews, each rated by people from -4 to 4, as data for the trainers.

    pip download --no-deps --no-build-isolation --no-binary :all: vaderSentiment==3.3.2
    python examples/film_reviews.py vaderSentiment-3.3.2.tar.gz data/film_reviews

The ratings (Hutto and Gilbert 2014, MIT licence) lie in the source package of vaderSentiment. Written are answers.jsonl
(positive sentences, for sft), pairs.jsonl (a positive against a negative one, for dpo and rm), labelled.jsonl (single
sentences, positive or negative, for kto) and ranked.jsonl (four sentences from four ranges of ratings, for rm). No
sentence is in a file twice, so rows held out hold sentences out.
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
RANGES = ((2.0, 4.0), (0.5, 2.0), (-1.5, 0.5), (-4.0, -1.5))


def ratings(sdist: Path) -> list[tuple[float, str]]:
    """Every sentence with its mean rating."""
    data = sdist.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise SystemExit(f"{sdist}: not the source package of vaderSentiment 3.3.2")

    def member(archive: bytes, ending: str) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            name = next(name for name in tar.getnames() if name.endswith(ending))
            return tar.extractfile(name).read()

    text = member(member(data, "hutto_ICWSM_2014.tar.gz"), "movieReviewSnippets_GroundTruth.txt").decode()
    rows = [line.split("\t", 2) for line in text.splitlines() if line.count("\t") >= 2]
    sentences = {sentence.strip(): float(rating) for _, rating, sentence in rows if sentence.strip()}
    return [(rating, sentence) for sentence, rating in sentences.items()]


def main(sdist: Path, folder: Path) -> None:
    rated = ratings(sdist)
    random.Random(0).shuffle(rated)
    good = [s for rating, s in rated if rating >= 1.5]
    bad = [s for rating, s in rated if rating <= -1.5]
    ranges = [[s for rating, s in rated if low <= rating < high] for low, high in RANGES]
    # Every other sentence of either kind: answers to one prompt that are no pairs.
    labelled = [(s, True) for s in good[::2]] + [(s, False) for s in bad[1::2]]
    random.Random(1).shuffle(labelled)
    files = {
        "answers": [{"prompt": PROMPT, "answer": s} for s in good],
        "pairs": [{"prompt": PROMPT, "chosen": w, "rejected": l} for w, l in zip(good, bad, strict=False)],
        "labelled": [{"prompt": PROMPT, "answer": s, "desirable": desirable} for s, desirable in labelled],
        "ranked": [{"prompt": PROMPT, "answers": four, "ranks": [0, 1, 2, 3]} for four in zip(*ranges, strict=False)],
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
