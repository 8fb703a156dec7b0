"""Damaged and hostile inputs for every public reader: `make fuzz N=10000`, or `python -m fuzz` in `tests/`."""
