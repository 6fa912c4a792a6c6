"""The page that is looked at after a run, or during it: one HTML file that needs nothing else."""
