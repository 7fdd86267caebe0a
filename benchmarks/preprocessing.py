"""A case from NIfTI files to preprocessed ones, and its steps apart from resampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import blosc2
import numpy as np
import SimpleITK
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero as nnunet_crop
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from benchmarks.measuring import Agreement, Duel, Scale
from benchmarks.resampling import images_agree, labels_agree, organs, scan
from benchmarks.scans import Scan
from planners.class_locations import class_locations
from planners.crop import crop_to_nonzero
from planners.files import read_case_properties
from planners.preprocessed_case import preprocess_case, save_case
from planners.quiet import nnunet_quiet

_PATCH = (128, 128, 128)


def case_2(scale: Scale) -> AbstractContextManager[Duel]:
    """A CT with liver and kidneys."""
    return _case(organs(scan(scale)))


def case_62(scale: Scale) -> AbstractContextManager[Duel]:
    """A CT with 62 structures."""
    return _case(scan(scale))


@contextmanager
def _case(case: Scan) -> Iterator[Duel]:
    labels = int(case.labels.max())
    plan, dataset_json = _plan([0.8 * s for s in case.spacing]), _dataset_json(labels)
    manager = PlansManager(plan)
    with TemporaryDirectory() as folder:
        files = [Path(folder, "case_0000.nii.gz"), Path(folder, "case.nii.gz")]
        for file, voxels in zip(files, (case.image.astype(np.int16), case.labels.astype(np.uint8)), strict=True):
            _write(file, voxels, case.spacing)

        def reference() -> Path:
            _empty(Path(folder, "nnunet"))
            with nnunet_quiet():
                DefaultPreprocessor(verbose=False).run_case_save(
                    f"{folder}/nnunet/case",
                    [str(files[0])],
                    str(files[1]),
                    manager,
                    manager.get_configuration("3d_fullres"),
                    dataset_json,
                )
            return Path(folder, "nnunet")

        def ours() -> Path:
            _empty(Path(folder, "autoseg"))
            made = preprocess_case(files[:1], files[1], plan, "3d_fullres", dataset_json)
            save_case(*made, plan, "3d_fullres", Path(folder, "autoseg"), "case")
            return Path(folder, "autoseg")

        yield Duel(reference, ours, _cases_agree)


def crop(scale: Scale) -> Duel:
    """A CT in a frame of zeros."""
    case = scan(scale)
    raw = np.pad(case.image.astype(np.int16), 8)[None].astype(np.float32)  # whole HU: some voxels are exactly zero
    labels = np.pad(case.labels, 8)[None]

    def agree(reference: tuple, ours: tuple) -> Agreement:
        same = all(np.array_equal(r, o) for r, o in zip(reference, ours, strict=True))
        return Agreement("identical" if same else "different", same)

    return Duel(lambda: nnunet_crop(raw, labels.copy()), lambda: crop_to_nonzero(raw, labels.copy()), agree)


def locations(scale: Scale) -> Duel:
    """Voxels of each class to centre patches on."""
    case = scan(scale)
    labels, classes = case.labels[None].astype(np.int8), list(range(1, int(case.labels.max()) + 1))
    return Duel(
        lambda: DefaultPreprocessor._sample_foreground_locations(labels, classes),
        lambda: class_locations(labels, classes),
        locations_agree,
    )


def locations_agree(reference: dict, ours: dict) -> Agreement:
    """Equal keys and equal voxels in equal order."""
    same = reference.keys() == ours.keys() and all(np.array_equal(reference[key], ours[key]) for key in reference)
    return Agreement("identical" if same else "different", same)


@contextmanager
def saving(scale: Scale) -> Iterator[Duel]:
    """Image and labels of a resampled case to compressed files."""
    case = scan(scale)
    image, labels = case.image[None], case.labels[None]
    plan = _plan(case.spacing)
    with TemporaryDirectory() as folder:

        def reference() -> Path:
            wide = labels.astype(np.int16)
            blocks, chunks = comp_blosc2_params(image.shape, _PATCH, image.itemsize)
            blocks_seg, chunks_seg = comp_blosc2_params(wide.shape, _PATCH, wide.itemsize)
            _empty(Path(folder, "nnunet"))
            nnUNetDatasetBlosc2.save_case(
                image, wide, {}, f"{folder}/nnunet/case", chunks, blocks, chunks_seg, blocks_seg
            )
            return Path(folder, "nnunet")

        def ours() -> Path:
            _empty(Path(folder, "autoseg"))
            save_case(image, labels.astype(np.int8), {}, plan, "3d_fullres", Path(folder, "autoseg"), "case")
            return Path(folder, "autoseg")

        def agree(reference: Path, ours: Path) -> Agreement:
            same = all(np.array_equal(_read(reference, e), _read(ours, e)) for e in (".b2nd", "_seg.b2nd"))
            sizes = [sum(f.stat().st_size for f in side.iterdir()) for side in (reference, ours)]
            return Agreement(f"identical, files {sizes[1] / sizes[0]:.2f} as large" if same else "different", same)

        yield Duel(reference, ours, agree)


def _cases_agree(reference: Path, ours: Path) -> Agreement:
    image, labels = (
        compare(_read(reference, ending), _read(ours, ending))
        for compare, ending in ((images_agree, ".b2nd"), (labels_agree, "_seg.b2nd"))
    )
    theirs, our = (read_case_properties(side / "case.pkl") for side in (reference, ours))
    same = theirs["bbox_used_for_cropping"] == our["bbox_used_for_cropping"]
    return Agreement(f"{image.text}; {labels.text}", image.holds and labels.holds and same)


def _read(folder: Path, ending: str) -> np.ndarray:
    return blosc2.open(urlpath=str(folder / f"case{ending}"), mode="r")[:]


def _empty(folder: Path) -> None:
    """A new folder, or one without its files: blosc2 adds to those that are there."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()


def _write(file: Path, voxels: np.ndarray, spacing: Sequence[float]) -> None:
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing(tuple(reversed(spacing)))
    SimpleITK.WriteImage(image, str(file))


def _plan(spacing: Sequence[float]) -> dict:
    """The keys of a plan that preprocessing reads, with nnU-Net's defaults for CT."""
    common = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    settings = {
        "architecture": {},
        "data_identifier": "benchmark",
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": list(_PATCH),
        "spacing": list(spacing),
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        **{f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg")},
        "resampling_fn_data_kwargs": common,
        "resampling_fn_seg_kwargs": {**common, "is_seg": True, "order": 1},
    }
    window = {"mean": -50.0, "std": 300.0, "percentile_00_5": -950.0, "percentile_99_5": 900.0}
    return {
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": window},
        "configurations": {"3d_fullres": settings},
    }


def _dataset_json(labels: int) -> dict:
    names = {"background": 0, **{f"structure {n}": n for n in range(1, labels + 1)}}
    return {"channel_names": {"0": "CT"}, "labels": names, "file_ending": ".nii.gz"}
