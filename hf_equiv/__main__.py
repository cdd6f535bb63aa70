"""`python -m hf_equiv`, the same as `hf-equiv`; what `accelerate launch -m hf_equiv` starts."""

from hf_equiv.cli import main

if __name__ == "__main__":
    main()
