"""`hf-earlyexit evaluate` as a script for use in a checkout, with the same arguments; see `--help`.

    python scripts/evaluate_exits.py --max-inputs 64 --output results.json

The script is not named `evaluate.py`, because that name would hide the library `evaluate` from its imports.
"""

from __future__ import annotations

import sys

from hf_earlyexit.cli.main import main


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
