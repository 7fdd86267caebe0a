"""For nnU-Net's own commands: `nnUNet_extTrainer=<this folder> nnUNetv2_train … -tr AutosegTrainer`.

nnU-Net imports every file of that folder as a top-level module and forgets it again, so the class stays where it lives.
"""

from trainers.base import AutosegTrainer

__all__ = ["AutosegTrainer"]
