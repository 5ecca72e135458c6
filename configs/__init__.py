"""Installed configs: `--config=tiny` finds tiny.py here; a path to a file works as well."""
