"""A folder that mtpjax saved with Orbax. This package only recognises it; mtpjax reads the arrays, which needs JAX."""

from __future__ import annotations

from pathlib import Path

from checkpoints.errors import CheckpointError
from checkpoints.folder import CONFIG, find_tokenizer, list_names, read_generation_config, read_json_file

PARAMS = "params"


class OrbaxDirectory:
    """`config.json` beside a folder `params/` (`params_path`) that holds an Orbax tree of parameters.

    Raises CheckpointError if one of the two is missing or config.json cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_json_file(self.path / CONFIG)
        self.params_path = self.path / PARAMS
        if not self.params_path.is_dir():
            raise CheckpointError(
                f"{self.path}: has no folder {PARAMS}/, found {list_names(self.path)}. Was it saved by mtpjax?"
            )
        self.generation_config = read_generation_config(self.path)
        self.tokenizer_file = find_tokenizer(self.path)
