"""autoseg: self-configuring medical image segmentation with self-supervised pretraining.

The Python API has the commands' names and options (`import_` for `import`, which Python keeps for itself)::

    import autoseg
    autoseg.plan_and_preprocess(17)
    autoseg.pretrain(17, method="voco")
    autoseg.train(17, pretrained="voco")
    autoseg.predict("scans", "masks", dataset=17)

Nothing heavy is imported before a function runs.
"""

from __future__ import annotations

from autoseg.commands import (
    compare,
    convert_folder,
    convert_msd,
    demo,
    evaluate,
    export,
    import_,
    inspect_weights,
    methods,
    plan_and_preprocess,
    predict,
    pretrain,
    pull,
    push,
    train,
    verify,
)

__version__ = "0.1.0"

__all__ = [
    "compare",
    "convert_folder",
    "convert_msd",
    "demo",
    "evaluate",
    "export",
    "import_",
    "inspect_weights",
    "methods",
    "plan_and_preprocess",
    "predict",
    "pretrain",
    "pull",
    "push",
    "train",
    "verify",
]
