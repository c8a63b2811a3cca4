"""greedy 1.4: its page's deformable stage."""

import sys

from picsl_greedy import Greedy3D

fixed, moving, out, threads = sys.argv[1:]
Greedy3D().execute(
    f"-d 3 -m NCC 4x4x4 -n 100x50x10 -i {fixed} {moving} -o {out}/warp.nii.gz -threads {threads} -V 0"
)
