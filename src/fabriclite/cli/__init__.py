"""The command line: ``fabriclite checkpoint ...``."""
