"""What autoseg costs beside nnU-Net v2 and others: `python -m benchmarks list`. Not installed with the packages."""
