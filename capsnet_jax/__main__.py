"""`python -m capsnet_jax` is the command `capsnet`."""

import sys

from capsnet_jax.cli.main import main

sys.exit(main())
