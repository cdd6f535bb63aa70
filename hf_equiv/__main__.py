"""Run the command line as `python -m hf_equiv` or `accelerate launch -m hf_equiv`."""

from __future__ import annotations

from hf_equiv.cli.main import main

if __name__ == "__main__":
    main()
