"""Entry point of `python -m hf_earlyexit`."""

import sys

from hf_earlyexit.cli.main import main


if __name__ == "__main__":
    sys.exit(main())
