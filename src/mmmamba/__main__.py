"""``python -m mmmamba`` is ``mmmamba``."""

import sys

from mmmamba.cli import main

if __name__ == "__main__":
    sys.exit(main())
