"""`python -m fastattn`: the command fastattn, where it is not on PATH."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
