"""Run `mtpjax convert`; see `mtpjax/cli/convert.py`."""

import sys

from mtpjax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
