"""Turns datasets of other layouts into raw nnU-Net datasets."""
