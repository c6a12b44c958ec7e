"""Baselines without a Hopfield network."""
