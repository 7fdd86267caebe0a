"""MedDINOv3: DINOv3's self-distillation on slices. So far its parts: masks, heads, losses and what tells of collapse."""
