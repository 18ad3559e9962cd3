"""Normalisation layers, which know nothing about training, and the functions that put them into a network."""
