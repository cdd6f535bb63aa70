"""Recompute stored rows and compare them."""

from hf_equiv.verify.directory import verify_run

__all__ = ["verify_run"]
