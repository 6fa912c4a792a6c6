"""The forms of a checkpoint, and how each is written."""
