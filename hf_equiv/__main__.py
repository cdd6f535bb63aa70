"""`python -m hf_equiv`, the same as `hf-equiv`; what `accelerate launch -m hf_equiv` starts."""

from __future__ import annotations

from hf_equiv.cli.main import main

if __name__ == "__main__":
    main()
