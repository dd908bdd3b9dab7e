"""`hf-earlyexit evaluate` as a script, for a checkout: the same arguments, see `--help`.

    python scripts/evaluate_exits.py --max-inputs 64 --output results.json

It is not named `evaluate.py`: a script of that name hides the library `evaluate` from what it imports.
"""

from __future__ import annotations

import sys

from hf_earlyexit.cli import main


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
