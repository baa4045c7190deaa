"""How positive a film review's sentence reads by VADER's lexicon (Hutto and Gilbert 2014), from -1 to 1.

A reward that no reward model has seen, for the held-out answers of examples/ppo_film_reviews.toml. It correlates at
0.43 with what people say of sentences of film reviews.
"""

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError as error:
    raise ImportError("vaderSentiment missing: pip install --no-deps vaderSentiment==3.3.2") from error

ANALYSER = SentimentIntensityAnalyzer()


def lexicon(example, completion: str) -> float:
    """The score of the whole sentence: the words that it began with, and the completion."""
    return ANALYSER.polarity_scores(example["prompt"][-1]["content"] + completion)["compound"]
