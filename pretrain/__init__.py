"""Learns encoders from unlabelled scans, on the network and the data that a plan describes."""
