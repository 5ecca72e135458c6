"""How much the slow tests repeat: a stated part by default, everything with `pytest --full`."""

FULL = False  # set by conftest.py before any test is collected


def some(by_default, full):
    """Returns the first value by default, the second with `--full`."""
    return full if FULL else by_default
