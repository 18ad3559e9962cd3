"""Normalisation layers that know nothing of training, and what exchanges them in a network."""
