"""Strategies: what users write is in ``configs.py``; what runs has a file each, imported when it is built."""
