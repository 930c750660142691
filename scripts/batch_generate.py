"""Run `mtpjax generate`; see `mtpjax/cli/generate.py`."""

import sys

from mtpjax.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
