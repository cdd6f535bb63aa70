"""Stored rows are made again and compared."""

from hf_equiv.verify.directory import verify_run

__all__ = ["verify_run"]
