"""The same as the command `mtpjax generate`; see `mtpjax/cli/generate.py`."""

import sys

from mtpjax.cli.main import run_process

if __name__ == "__main__":
    sys.exit(run_process(["generate", *sys.argv[1:]]))
