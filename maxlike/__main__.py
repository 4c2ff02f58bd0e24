"""`python -m maxlike`."""

import sys

from maxlike.cli import main

if __name__ == "__main__":
    sys.exit(main())
