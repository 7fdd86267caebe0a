"""Learns segmentations with nnU-Net's trainer, and predicts them."""
