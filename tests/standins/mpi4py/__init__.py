"""Stands in for mpi4py, which needs an MPI: the few calls that are used, over torch's store. Only for tests."""
