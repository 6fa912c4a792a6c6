"""How parameters come into the world."""
