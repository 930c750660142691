"""The same as the command `mtpjax convert`; see `mtpjax/cli/convert.py`."""

import sys

from mtpjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
