"""The only room that opens checkpoint files."""
