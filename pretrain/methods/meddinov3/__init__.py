"""MedDINOv3: DINOv3's self-distillation on slices."""
