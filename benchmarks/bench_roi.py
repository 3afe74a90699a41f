"""RoI operators on a GPU beside torchvision's; the deformable ones beside the classic algorithm.

    python -m benchmarks.bench_roi [--only R1,DP] [--dtypes float32] [--tiny]

Where torchvision has no such operator its plain one takes part, which does less.
"""

import numpy as np

from benchmarks import classic_deform_roi, rivals_gpu
from benchmarks.contest import Inputs, Runner, channels_last, library, run, upload
from benchmarks.harness import OURS
from benchmarks.workloads import Pooling

TWO, FOUR = {"sampling_ratio": 2}, {"sampling_ratio": 4}
FINE, COARSE, SCORES = (2, 256, 200, 336), (2, 1024, 50, 84), (38, 63)
ALIGN = [
    Pooling("R1", "roi_align", *FINE, 512, 7, options=TWO),
    Pooling("R2", "roi_align", *FINE, 2000, 7, options=TWO),
    Pooling("R3", "roi_align", *COARSE, 512, 14, options=TWO),
    Pooling("R4", "roi_align", 2, 256, 100, 168, 512, 7, sides=(560, 784)),
    Pooling("R5", "roi_align", *FINE, 64, 7, sides=(1600, 1984)),
]
POOL = [Pooling("RP", "roi_pool", 2, 512, 37, 62, 2000, 7)]
SENSITIVE = [
    Pooling(f"PS{classes}", operator, 1, 49 * classes, *SCORES, rois, 7, options=options)
    for operator, options in (("ps_roi_pool", {}), ("ps_roi_align", TWO))
    for classes in (21, 81)
    for rois in (300, 2000)
]
DEFORMABLE = [
    *(
        Pooling(f"DP{n}", "deform_ps_roi_pool", 1, 49 * n, *SCORES, rois, 7, options=FOUR)
        for n in (21, 81)
        for rois in (300, 2000)
    ),
    Pooling("DR", "deform_ps_roi_pool", 1, 256, *SCORES, 300, 7, options={**FOUR, "group_size": 1}),
    Pooling("DM", "deform_roi_pool", 1, 256, *SCORES, 300, 7, options=TWO),
]


def invite(
    case: Pooling, arrays: dict[str, np.ndarray], grad_y: np.ndarray, dtype: str
) -> list[Runner]:
    sets = upload(arrays, grad_y, dtype, rois="float32", offset="float32")
    runners = [
        library(OURS, case, sets),
        library(f"{OURS} again", case, sets),
        library(f"{OURS} channels-last", case, map(channels_last_image, sets)),
    ]
    if case.operator == "deform_ps_roi_pool" and dtype == "float32":
        runners.append(classic_deform_roi.runner(case, sets))
    if dtype == "bfloat16" or case.options.get("group_size") == 1:
        return runners  # which torchvision does not have
    keywords = {k: v for k, v in case.keywords.items() if k != "group_size"}
    shared = upload(arrays, grad_y, dtype)
    return [*runners, *rivals_gpu.torchvision(case.operator, shared, keywords)]


def channels_last_image(inputs: Inputs) -> Inputs:
    """The inputs with the image channels-last; offsets of RoIs are no images."""
    arrays, grad_y = channels_last(inputs)
    return {**inputs[0], "x": arrays["x"]}, grad_y


if __name__ == "__main__":
    run(
        __doc__.splitlines()[0],
        "roi.jsonl",
        [*ALIGN, *POOL, *SENSITIVE, *DEFORMABLE],
        invite,
    )
