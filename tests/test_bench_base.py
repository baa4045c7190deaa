"""`bench.run --base`: the process that measures another tree's library. Checking out and building that tree is not
tested here: it takes a minute."""

from __future__ import annotations

import pathlib

import pytest

from bench import base, cases

ROOT = pathlib.Path(__file__).resolve().parent.parent


def started(tree: pathlib.Path) -> base.Base:
    other = base.Base("HEAD", "cpu")
    other._tree = tree
    other._start()
    return other


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this copy of the project is no git repository")
@pytest.mark.parametrize("has_library", [True, False])
def test_the_other_trees_library_is_measured_or_nothing_is(tmp_path: pathlib.Path, has_library: bool) -> None:
    if has_library:
        for name in ("rl4llm_fast", "kernels"):
            (tmp_path / name).symlink_to(ROOT / name)
    case = next(iter(cases.select("smoke")))
    other = started(tmp_path)
    try:
        if has_library:
            other.load(case, "cpu")
            assert other.sample() > 0
        else:  # whatever else can be imported, this tree's among it, would be measured against itself
            with pytest.raises(RuntimeError, match="wanted the one in"):
                other.load(case, "cpu")
    finally:
        other._child.communicate()
