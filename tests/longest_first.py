"""The order of the test files for pytest-xdist: the longest first; no worker waits at the end.

A worker takes a file whole (`--dist loadfile`), so what its tests share is made once.
"""

# CPU seconds that single tests take, their fixtures included; those without a line take little.
# Only their order matters. From `pytest -n0 --durations=0`, of the default and the slow tests.
SECONDS = {}
OTHERS = 0.2


def sort_files(items: list) -> None:
    """Sorts tests by the sum of their file's seconds, keeping their order within a file."""
    seconds: dict[str, float] = {}
    for item in items:
        name = f"{item.path.name}::{item.originalname}"
        seconds[item.path.name] = seconds.get(item.path.name, 0.0) + SECONDS.get(name, OTHERS)
    items.sort(key=lambda item: -seconds[item.path.name])
