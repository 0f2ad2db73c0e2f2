"""A solver each."""
