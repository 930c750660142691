"""The same as the command `mtpjax generate`; see `mtpjax/cli/generate.py`."""

import sys

from mtpjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
