"""The command line: ``fabriclite checkpoint ...``, ``fabriclite doctor``, ``fabriclite report``."""
