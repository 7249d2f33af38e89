"""`python -m forkd` is the `forkd` command."""

import sys

from forkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
