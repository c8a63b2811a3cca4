#!/usr/bin/env bash
# SimpleITK 2.5.7: WriteImage of a NIfTI or Analyze image that does not fit on the disk returns as if all were well, and leaves a cut file;
# of .mha, .nrrd, .vtk and .tif it raises. A file size limit plays the full disk: write() fails with EFBIG instead of ENOSPC.
#
# seen: 108 kB of noise, at most 16 kB a file
#   w.nii.gz no error, 16384 bytes    w.nii no error, 16384 bytes    w.img.gz no error, 16384 bytes
#   w.mha, w.nrrd, w.vtk, w.tif RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.2.6 SimpleITK==2.5.7
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import os
import resource
import signal

import numpy as np
import SimpleITK as sitk

assert sitk.Version.VersionString() == "2.5.7", sitk.Version.VersionString()
image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(30, 30, 30)).astype(np.float32))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
silent = []
for name in ("w.nii.gz", "w.nii", "w.img.gz", "w.mha", "w.nrrd", "w.vtk", "w.tif"):
    try:
        sitk.WriteImage(image, name)
    except RuntimeError:
        print(name, "RuntimeError")
    else:
        silent.append(name)
        print(name, "no error,", os.path.getsize(name), "bytes")
assert silent == ["w.nii.gz", "w.nii", "w.img.gz"], silent
PYTHON
echo "as seen"
