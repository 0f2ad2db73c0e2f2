"""Sparse symmetric positive-definite matrices: ordering, Cholesky factor, selected inverse."""
