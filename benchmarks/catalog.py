"""Every benchmark and what is asked of it: a literal table. Modules are imported when a benchmark runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from benchmarks.measuring import Made, Scale


@dataclass(frozen=True)
class Benchmark:
    """One row of the table of results."""

    function: str
    """"benchmarks.export:labels_14", which makes from a Scale a Duel, or a context manager that gives one."""
    goal: float
    """CPU time of the reference over ours, at least."""
    what: str
    """What is done, for readers."""
    memory_goal: float | None = None
    """Peak memory of ours over the reference's, at most."""
    against: str = "nnunet"
    """Whose code the reference is."""

    def make(self, scale: Scale) -> Made:
        """What `benchmarks.measuring.opened` opens."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)(scale)


CATALOG = {
    "image": Benchmark("benchmarks.resampling:image", 10, "image to a finer grid, cubic", 0.6),
    "image_separate_z": Benchmark("benchmarks.resampling:image_separate_z", 4, "the same, slices one by one", 0.6),
    "labels_3": Benchmark("benchmarks.resampling:labels_3", 25, "labels to a finer grid, 3 of them", 0.6),
    "labels_62": Benchmark("benchmarks.resampling:labels_62", 100, "labels to a finer grid, 62 of them", 0.6),
    "labels_separate_z": Benchmark("benchmarks.resampling:labels_separate_z", 25, "62 labels, slices one by one", 0.6),
    # A CT has voxels of exactly zero, each a hole to be filled, which both leave to SciPy.
    "crop": Benchmark("benchmarks.preprocessing:crop", 1, "crop to what is not zero"),
    "locations": Benchmark("benchmarks.preprocessing:locations", 2, "voxels to centre patches on"),
    "saving": Benchmark("benchmarks.preprocessing:saving", 5, "saving of a case"),
    "case_2": Benchmark("benchmarks.preprocessing:case_2", 6, "a case, files to files, 2 labels", 0.6),
    "case_62": Benchmark("benchmarks.preprocessing:case_62", 20, "a case, files to files, 62 labels", 0.6),
    "hippocampus": Benchmark("benchmarks.commands:hippocampus", 3, "170 MR cases, command to command"),
    "export_14": Benchmark("benchmarks.export:labels_14", 7, "logits of 14 classes to a mask", 0.1),
    "export_104": Benchmark("benchmarks.export:labels_104", 25, "logits of 104 classes to a mask", 0.1),
    "export_regions": Benchmark("benchmarks.export:regions_3", 7, "logits of 3 nested regions to a mask", 0.1),
    "folder_prediction": Benchmark("benchmarks.prediction:folder", 3, "folder of 2 scans to masks, toy network"),
    "patches_2": Benchmark("benchmarks.training_data:patches_2", 1.5, "training patches, 2 labels"),
    "patches_60": Benchmark("benchmarks.training_data:patches_60", 4, "training patches, 60 labels"),
    "help": Benchmark("benchmarks.startup:help", 20, "help of training"),
    "wrong_argument": Benchmark("benchmarks.startup:wrong_argument", 13, "training of a data set that is not there"),
    "first_step": Benchmark("benchmarks.startup:first_step", 2, "training up to its first step"),
    "crops_whole_volume": Benchmark(
        "benchmarks.pretraining_data:whole_volume", 10, "VoCo views of a CT, volume read for each", against="voco"
    ),
    "crops_cached": Benchmark(
        "benchmarks.pretraining_data:cached", 3, "VoCo views of a CT, volume cached on disk", against="voco"
    ),
}
