"""What a fit's formulas say with dense matrices."""

import torch


def covariance(result):
    """V of the rows of a fit, at its estimates."""
    terms = result.source.covariance.terms(result.source.rows)
    return sum(term.detach().dense() for term in terms)


def projection(result):
    """:math:`P = V^{-1} - V^{-1}X(X'V^{-1}X)^{-1}X'V^{-1}`."""
    W, X = torch.linalg.inv(covariance(result)), result.source.X[:, list(result.fixed.columns)]
    return W - W @ X @ torch.linalg.inv(X.mT @ W @ X) @ X.mT @ W


def generalised(y, X, V):
    """Coefficients by generalised least squares, and their covariance."""
    W = torch.linalg.solve(V, X)
    phi = torch.linalg.inv(X.mT @ W)
    return phi @ W.mT @ y, phi
