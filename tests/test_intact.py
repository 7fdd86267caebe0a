"""A NIfTI file that is cut off, damaged or not finite is refused."""

import nibabel
import numpy as np
import pytest
import SimpleITK

from planners.intact import refuse_damaged


def written(file, dtype=np.int16, spoil=None):
    voxels = np.random.default_rng(0).integers(-900, 900, (61, 72, 83)).astype(dtype)
    if spoil is not None:
        voxels[-1, 2, 3] = spoil
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(file)
    return file


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_a_whole_file_passes_and_a_cut_off_one_does_not(tmp_path, ending, dtype):
    file = written(tmp_path / f"scan{ending}", dtype)
    refuse_damaged(file)
    content = file.read_bytes()
    for share in (0.0001, 0.5, 1):
        file.write_bytes(content[: int(len(content) * share) - 1])
        with pytest.raises(ValueError, match="cannot be read to its end"):
            refuse_damaged(file)


def test_a_damaged_byte_is_found_where_simpleitk_reads_on(tmp_path):
    file = written(tmp_path / "scan.nii.gz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    SimpleITK.ReadImage(str(file))
    with pytest.raises(ValueError, match="cannot be read to its end"):
        refuse_damaged(file)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_are_not_finite_are_refused(tmp_path, value, dtype):
    file = written(tmp_path / "scan.nii.gz", dtype, value)
    with pytest.raises(ValueError, match="not finite"):
        refuse_damaged(file)


def test_other_formats_are_left_alone(tmp_path):
    (tmp_path / "scan.nrrd").write_bytes(b"whatever")
    refuse_damaged(tmp_path / "scan.nrrd")
