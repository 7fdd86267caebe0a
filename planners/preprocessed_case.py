"""One case from raw scan to nnU-Net's preprocessed files, step by step: read, transpose, crop, intensities, grid, locations.

The steps and their results are those of nnU-Net's `DefaultPreprocessor`; where nnU-Net takes long, ours is in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import write_pickle
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from planners.class_locations import class_locations
from planners.crop import crop_to_nonzero
from planners.plans import resolved
from planners.quiet import nnunet_quiet
from planners.resample import resample_to_shape, smallest_integers

ENDINGS = ("_seg.b2nd", ".pkl", ".b2nd")  # the image last: nnU-Net takes a case to be there when its image is
_DEFAULT_RESAMPLING = "resample_data_or_seg_to_shape"


def preprocess_case(
    images: Sequence[Path], label: Path | None, plan: dict, configuration: str, dataset_json: dict
) -> tuple[np.ndarray, np.ndarray, dict]:
    """One case on the plan's grid and intensities.

    Returns:
        image (channels, z, y, x) float32, labels (1, z, y, x) with -1 outside the nonzero region, nnU-Net's properties.
    """
    manager = PlansManager(plan)
    settings = manager.get_configuration(configuration)
    with nnunet_quiet():
        if settings.preprocessor_name != DefaultPreprocessor.__name__:
            image, labels, properties = settings.preprocessor_class(verbose=False).run_case(
                [str(path) for path in images], None if label is None else str(label), manager, settings, dataset_json
            )
            return image, labels, properties
        reader = manager.image_reader_writer_class()
        image, properties = reader.read_images([str(path) for path in images])
        labels = None if label is None else reader.read_seg(str(label))[0]
        return preprocess_voxels(image, labels, properties, manager, settings, dataset_json)


def preprocess_voxels(
    image: np.ndarray,
    labels: np.ndarray | None,
    properties: dict,
    manager: PlansManager,
    settings: ConfigurationManager,
    dataset_json: dict,
) -> tuple[np.ndarray, np.ndarray, dict]:
    """What `DefaultPreprocessor.run_case_npy` makes of a case in memory. Changes `image`, `labels` and `properties`.

    Args:
        image: (channels, z, y, x) as nnU-Net's reader gives it, before the plan's transpose.
        labels: (1, z, y, x) or None.
    """
    if labels is not None and labels.shape[1:] != image.shape[1:]:
        raise ValueError(f"the labels have {labels.shape[1:]} voxels and the image {image.shape[1:]}")
    axes = [0, *(axis + 1 for axis in manager.transpose_forward)]
    image = image.astype(np.float32, copy=False).transpose(axes)
    has_labels = labels is not None
    if labels is not None:
        labels = smallest_integers(labels.transpose(axes))
    spacing = [properties["spacing"][axis] for axis in manager.transpose_forward]
    properties["shape_before_cropping"] = image.shape[1:]
    image, cropped, properties["bbox_used_for_cropping"] = crop_to_nonzero(image, labels)
    properties["shape_after_cropping_and_before_resampling"] = image.shape[1:]
    # A 2D configuration has two spacings: slices keep their distance.
    wanted = [*spacing[: len(spacing) - len(settings.spacing)], *settings.spacing]
    shape = compute_new_shape(image.shape[1:], spacing, wanted)
    # Before resampling, which would blur the border that a mask for the intensities has.
    image = DefaultPreprocessor(verbose=False)._normalize(
        image, cropped, settings, manager.foreground_intensity_properties_per_channel
    )
    image = resampling(settings, "data")(image, shape, spacing, wanted)
    cropped = resampling(settings, "seg")(cropped, shape, spacing, wanted)
    if has_labels:
        meaning = manager.get_label_manager(dataset_json)
        groups = list(meaning.foreground_regions if meaning.has_regions else meaning.foreground_labels)
        if meaning.has_ignore_label:
            groups.append([-1, *meaning.all_labels])
        properties["class_locations"] = class_locations(cropped, groups)
    return image, cropped.astype(np.int16 if cropped.max() > 127 else np.int8, copy=False), properties


def resampling(settings: ConfigurationManager, what: str) -> Callable[..., np.ndarray]:
    """The plan's resampling of "data", "seg" or "probabilities"; ours where it names nnU-Net's default, which it equals."""
    if settings.configuration[f"resampling_fn_{what}"] != _DEFAULT_RESAMPLING:
        return getattr(settings, f"resampling_fn_{what}")
    options = settings.configuration[f"resampling_fn_{what}_kwargs"]
    return lambda *case: resample_to_shape(*case, **options)


def save_case(
    image: np.ndarray, labels: np.ndarray, properties: dict, plan: dict, configuration: str, folder: Path, name: str
) -> None:
    """Write the three files of a case as nnU-Net reads them, in chunks that suit the plan's patches.

    Labels take a byte where they fit into one; what reads them widens them anyway.
    """
    patch = tuple(resolved(plan, configuration)["patch_size"])
    # Half as long to read a patch again as ZSTD, two thirds as long to write, files a tenth larger.
    compression = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    for ending, voxels in (("_seg.b2nd", labels), (".b2nd", image.astype(np.float32, copy=False))):
        blocks, chunks = comp_blosc2_params(voxels.shape, patch, voxels.itemsize)
        blosc2.asarray(
            np.ascontiguousarray(voxels),
            urlpath=str(folder / f"{name}{ending}"),
            chunks=chunks,
            blocks=blocks,
            cparams=compression,
        )
    write_pickle(properties, str(folder / f"{name}.pkl"))
