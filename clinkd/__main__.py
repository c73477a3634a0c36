"""``python -m clinkd``."""

import sys

from clinkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
