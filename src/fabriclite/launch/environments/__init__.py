"""Who started this process: each launcher's documented variables, read into one value."""
