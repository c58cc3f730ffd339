"""Short scripts for downstream use, each a command from the repository root: `python -m examples.NAME`."""
