"""``python -m ptkernels env | bench | gradcheck | explain | replace``."""

from __future__ import annotations

import sys

from ptkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
