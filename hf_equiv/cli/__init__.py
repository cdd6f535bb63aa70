"""The command line."""

from hf_equiv.cli.main import main

__all__ = ["main"]
