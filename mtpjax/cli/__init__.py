"""The command line: `mtpjax generate`, `mtpjax convert`, `mtpjax info`."""
