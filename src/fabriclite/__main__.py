"""``python -m fabriclite``."""

import sys

from fabriclite.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
