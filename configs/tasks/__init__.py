"""The benchmarks that `selfrag evaluate --task=NAME` knows, one file each (evaluation/tasks.py)."""
