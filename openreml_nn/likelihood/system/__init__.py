"""The system of the random effects that the solvers share."""
