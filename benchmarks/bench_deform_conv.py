"""deform_conv2d on a GPU beside torchvision, with torch's plain convolution as a landmark.

    python -m benchmarks.bench_deform_conv [--only D3,B1] [--dtypes float32,tf32] [--tiny]

Ours gets its arrays as torchvision does, C-contiguous, and once more channels-last, as layers pass
them on. Its offsets are float32 in every mode, torchvision's have the dtype of the images, which is
all it takes. "tf32" is float32 with TF32 allowed, for everybody. Ours takes part twice: the
difference is noise.
"""

import numpy as np

from benchmarks import rivals_gpu
from benchmarks.contest import Runner, channels_last, library, run, upload
from benchmarks.harness import OURS
from benchmarks.workloads import Convolution

# layers of detection and segmentation networks, of a classifier, of super-resolution, and of
# grouped and depthwise networks
CASES = [
    Convolution("D3", 2, 128, 100, 167, 128),
    Convolution("D4", 2, 256, 50, 84, 256),
    Convolution("D5", 2, 512, 25, 42, 512),
    Convolution("D5d", 1, 512, 50, 84, 512, dilation=2, offset_groups=4),
    Convolution("B1", 64, 64, 56, 56, 64),
    Convolution("B2", 64, 128, 28, 28, 128),
    Convolution("B3", 64, 256, 14, 14, 256),
    Convolution("B4", 64, 512, 7, 7, 512),
    Convolution("S1", 8, 64, 128, 128, 64, offset_groups=8, modulated=True),
    Convolution("X4", 2, 512, 50, 84, 512, groups=32),
    Convolution("V4", 64, 128, 56, 56, 128, groups=128, offset_groups=4, modulated=True),
]
# a layer with its taps on the regular grid, out of the image, and far away
ELSEWHERE = [
    Convolution("D4-regular", 2, 256, 50, 84, 256, spread=0.0),
    Convolution("D4-outside", 2, 256, 50, 84, 256, outside=0.05),
    Convolution("D4-far", 2, 256, 50, 84, 256, spread=8.0),
]


def invite(
    case: Convolution, arrays: dict[str, np.ndarray], grad_y: np.ndarray, dtype: str
) -> list[Runner]:
    sets = upload(arrays, grad_y, dtype, offset="float64" if dtype == "float64" else "float32")
    # torch takes no bfloat16 from cupy and makes its own of float32
    shared = upload(arrays, grad_y, "float32" if dtype == "bfloat16" else dtype)
    peer = rivals_gpu.torchvision(case.operator, shared, case.keywords)
    around = {**case.keywords, "groups": case.groups}
    return [
        library(OURS, case, sets),
        library(f"{OURS} again", case, sets),
        library(f"{OURS} channels-last", case, map(channels_last, sets)),
        *(peer if dtype != "bfloat16" else []),  # which it does not have
        *rivals_gpu.conv2d(shared, around, dtype, same=False),
    ]


if __name__ == "__main__":
    run(__doc__.splitlines()[0], "deform_conv.jsonl", [*CASES, *ELSEWHERE], invite)
