"""`python -m p2p_subject`: the command line."""

from __future__ import annotations

import sys

from p2p_subject.cli import main

if __name__ == "__main__":
    sys.exit(main())
