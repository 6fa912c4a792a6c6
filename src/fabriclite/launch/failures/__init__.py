"""The first failure of a run is recorded, ends every rank, and is told once, last. See docs/guides/failures.md."""
