"""The rule for reward functions that raise: the answer scores 0, and the run says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from .distributed import Ranks, say


class Attempts:
    """Calls of reward functions on the answers of a step; :meth:`report` is their end.

    A function that raises gives its default for that answer and the run goes on: nonsense is what models write. One
    that raises on every answer is broken, and learning from its zeros would be noise.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.raised: list[tuple[str, str]] = []  # the function's name, and what it raised
        self.first: Exception | None = None

    def call(self, name: str, default: Any, function: Callable[..., Any], *given: Any) -> Any:
        """``function(*given)``, or ``default`` where it raises."""
        self.calls[name] += 1
        try:
            return function(*given)
        except Exception as error:
            self.first = self.first or error
            self.raised.append((name, repr(error)))
            return default

    def report(self, ranks: Ranks = Ranks()) -> None:  # noqa: B008
        """Say what was raised since the last report, in all processes.

        Raises:
            ValueError: a function raised on every answer that it was asked about.
        """
        raised, calls = ranks.gather(self.raised), Counter[str]()
        for part in ranks.gather([dict(self.calls)]):
            calls.update(part)
        cause = self.first
        self.calls, self.raised, self.first = Counter(), [], None
        for name in dict.fromkeys(name for name, _ in raised):
            errors = [error for own, error in raised if own == name]
            if len(errors) == calls[name]:
                raise ValueError(f"reward {name!r}: raised on every answer: {errors[0]}") from cause
            say(f"reward {name!r}: raised on {len(errors)} of {calls[name]} answers, which score 0: {errors[0]}")
