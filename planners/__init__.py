"""Knows the data: datasets, fingerprints, plans and preprocessed cases. Imports nothing of pretrain, trainers, autoseg."""
