"""Stage tables on a GPU, at each precision, with full banks, as Markdown.

python -m benchmarks.gpu

Weights are random, but for EfficientNet-Lite0: they do not change the time. Images are synthetic.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.speed import OURS, content, quiet, synthetic_images
from patchad import PatchModel
from patchad.stages import stage_table
from patchad.timing import (
    STAGES,
    Row,
    alternate,
    best_rate,
    measure_stages,
    peak_memory,
    reset_peak_memory,
    score_from_memory,
)

PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
COMPILED: Mapping[str, Mapping[str, Any]] = {
    "CUDA graph": {"backend": "cudagraphs"},
    "compiled": {"mode": "reduce-overhead"},
}
"""Arguments of torch.compile."""


@quiet()
def main(
    methods: Sequence[str] = ("default", "fast"),
    precisions: Sequence[str] = tuple(PRECISIONS),
    batch_sizes: Sequence[int] = (1, 8, 64),
    compiled: Sequence[str] = tuple(COMPILED),
    repeats: int = 30,
    device: str = "cuda",
) -> None:
    """Prints a stage table of each method, precision and size of batch.

    Args:
        methods: of `benchmarks.speed`.
        precisions: `float32` (convolutions in TF32, as torch has it), `float16`, `bfloat16`.
        batch_sizes: images per batch.
        compiled: further forms for batches of one image, `CUDA graph` or `compiled`.
        repeats: timed runs.
        device: where it runs.
    """
    place = torch.device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place
    for method in methods:
        model = OURS[method]().to(place)
        assert model.canvas is not None
        images = synthetic_images(max(batch_sizes), model.canvas.image_size[0])
        for precision in precisions:
            dtype = PRECISIONS[precision]
            with torch.autocast(place.type, dtype, enabled=dtype is not None):
                rate = best_rate(place)
                reset_peak_memory(place)
                print(f"\n{method}, {precision}, {name}, best rate measured {rate / 1e12:.1f} TFLOP/s")
                for size in batch_sizes:
                    rows = measure_stages(model, images[:size], content(images[:size]), repeats, rate)
                    if size == 1:
                        rows += compiled_rows(model, images[:1], compiled, repeats)
                    print(f"\nbatch {size}\n", stage_table(rows), sep="\n")
                    rates = (
                        f"{1e3 * size / np.median(row.times):.0f} images/s {row.stage}"
                        for row in rows[len(STAGES) + 1 :]
                    )
                    print(f"\n{', '.join(rates)}, peak memory {peak_memory(place):.0f} MB", flush=True)


def compiled_rows(model: PatchModel, image: Tensor, forms: Sequence[str], repeats: int) -> list[Row]:
    """From memory to score in other forms of the model."""
    rows, device = [], model.scorer.scale.device
    for form in forms:
        torch.compiler.reset()
        faster: Any = torch.compile(model, fullgraph=True, dynamic=False, **COMPILED[form])
        task = partial(score_from_memory, faster, image, content(image))
        for _ in range(2):  # the graph is recorded
            task()
        rows.append(Row(f"from memory to score, {form}", alternate({form: task}, repeats, device)[form]))
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
