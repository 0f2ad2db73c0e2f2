"""What the likelihood sees of a covariance tree: designs Z, structured covariances G, terms of both."""
