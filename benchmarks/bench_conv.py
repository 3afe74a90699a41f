"""conv2d on a GPU beside torch's, which has cuDNN, on the layers of bench_deform_conv.

python -m benchmarks.bench_conv [--only D3,B1] [--dtypes float32,tf32] [--tiny]
"""

from dataclasses import replace

import numpy as np

from benchmarks import bench_deform_conv, rivals_gpu
from benchmarks.contest import Runner, channels_last, library, run, upload
from benchmarks.harness import OURS
from benchmarks.workloads import Convolution

CASES = [
    replace(case, operator="conv2d", offset_groups=1, modulated=False)
    for case in bench_deform_conv.CASES
]


def invite(
    case: Convolution, arrays: dict[str, np.ndarray], grad_y: np.ndarray, dtype: str
) -> list[Runner]:
    sets = upload(arrays, grad_y, dtype)
    shared = upload(arrays, grad_y, "float32") if dtype == "bfloat16" else sets
    return [
        library(OURS, case, sets),
        library(f"{OURS} channels-last", case, map(channels_last, sets)),
        *rivals_gpu.conv2d(shared, case.keywords, dtype, same=True),
    ]


if __name__ == "__main__":
    run(__doc__.splitlines()[0], "conv.jsonl", CASES, invite)
