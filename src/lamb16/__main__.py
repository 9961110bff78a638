"""`python -m lamb16` is the `lamb16` command."""

import sys

from lamb16.cli import main

if __name__ == "__main__":
    sys.exit(main())
