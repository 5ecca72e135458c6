import sys

from selfrag_jax.cli import main

sys.exit(main())
