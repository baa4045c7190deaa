"""Triton kernels, imported as ``rl4llm_fast.kernels`` only. Nothing imports Triton before ``register`` is imported."""

if __name__ == "kernels":
    # Found as a top-level `kernels` because the checkout's root is on sys.path. That name belongs to another project,
    # which libraries probe for: offer nothing and hand the name to the next one on the path, if there is one.
    import importlib.machinery as _machinery
    import importlib.util as _util
    import pathlib as _pathlib
    import sys as _sys

    _root = _pathlib.Path(__file__).resolve().parent.parent
    _elsewhere = [p for p in _sys.path if _pathlib.Path(p or ".").resolve() != _root]
    _spec = _machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None:
        _module = _util.module_from_spec(_spec)
        _sys.modules["kernels"] = _module  # the import statement returns what stands here
        _spec.loader.exec_module(_module)
    else:
        __path__ = []  # so that `import kernels.anything` fails as if the package were not there
