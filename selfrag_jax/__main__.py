"""Runs the command line: `python -m selfrag_jax COMMAND` is the same as `selfrag COMMAND`."""

import sys

from selfrag_jax.cli import main

sys.exit(main())
