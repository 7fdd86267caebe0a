"""Named label sets: what the values in a benchmark's label files mean."""

from __future__ import annotations

LABEL_SETS: dict[str, dict[str, int]] = {
    # Multi-Atlas Labeling Beyond the Cranial Vault, abdomen (Synapse syn3193805). Kidneys and adrenals: r and l are the
    # patient's right and left; veins are the portal and splenic veins.
    "btcv": {
        "spleen": 1,
        "rkid": 2,
        "lkid": 3,
        "gall": 4,
        "eso": 5,
        "liver": 6,
        "sto": 7,
        "aorta": 8,
        "IVC": 9,
        "veins": 10,
        "pancreas": 11,
        "rad": 12,
        "lad": 13,
    },
}
"""Set → structure → value. Background is 0 in every set."""
