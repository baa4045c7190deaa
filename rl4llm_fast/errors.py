"""The library's own exceptions. Everything else is a ValueError, TypeError or IndexError that names the argument."""


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""
