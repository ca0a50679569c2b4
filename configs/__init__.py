"""Packaged configurations: `--config NAME` on the command line."""
