"""Whole segmentation networks, and the exact table of what plans may name."""
