"""What there is to train on, and what is wrong with it: the facts that ``fabriclite doctor`` shows."""
