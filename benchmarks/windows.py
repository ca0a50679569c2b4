"""Which tap, how many numbers, how large a bank, and how sides are combined, without a fit for each, as Markdown.

python -m benchmarks.windows --data ../shared/data

Windows of EfficientNet-Lite0 on the choosing half of benchmarks/products.yaml. The features of a product are computed
once. The last normal images are held out of the banks and give levels and spreads; a bank is searched by inverted
lists.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from benchmarks.large_banks import POINTS_PER_LIST, PROBES, list_count
from benchmarks.products import HALVES
from patchad import PyramidDataModule
from patchad.metrics import PerRegionOverlap
from patchad.models import EfficientNetLite0, WindowEncoder
from patchad.nearest import faiss, search
from patchad.pyramid import fold
from patchad.scoring import gaussian, top_mean

SIZE, METRIC, HELD_OUT, SMOOTHING = 384, 256, 40, 4.0
VECTORS = 400_000
Maps = Mapping[str, Tensor]


class Windows(NamedTuple):
    """One way to embed patches: their side, the tap, the numbers of a projection (None: all channels), the bank."""

    side: int
    tap: str
    dim: int | None = None
    vectors: int = VECTORS

    def __str__(self) -> str:
        return f"{self.side} of {self.tap}"


ALONE = [
    *(
        Windows(side, tap)
        for side, tap in ((64, "stage5"), (32, "stage5"), (32, "stage4"), (16, "stage3"), (16, "stage2"))
    ),
    *(Windows(side, tap, dim=64) for side, tap in ((64, "stage5"), (32, "stage5"), (16, "stage3"))),
    *(Windows(32, "stage5", vectors=vectors) for vectors in (10_000, 100_000)),
    *(Windows(16, "stage3", vectors=vectors) for vectors in (10_000, 100_000)),
]
TOGETHER = (
    ("64 of stage5", "32 of stage5", "16 of stage3"),
    ("64 of stage5", "32 of stage4", "16 of stage3"),
    ("64 of stage5", "32 of stage5", "16 of stage2"),
    ("64 of stage5", "32 of stage5", "16 of stage3", "16 of stage2"),
)
RULES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum of squares": lambda excess: F.softplus(excess).square().sum(0),
    "sum": lambda excess: F.softplus(excess).sum(0),
    "highest": lambda excess: F.softplus(excess).amax(0),
    "without threshold": lambda excess: excess.sum(0),
}


@torch.inference_mode()
def main(data: Path = Path("../shared/data"), products: tuple[str, ...] = tuple(HALVES["choosing"])) -> None:
    """Prints both tables.

    Args:
        data: the folder that the paths of the products are below.
        products: of the choosing half.
    """
    print("| product | windows | numbers | vectors | detection / segmentation | PRO |\n|---|---|---|---|---|---|")
    for product in products:
        images = PyramidDataModule(data / HALVES["choosing"][product], image_size=(SIZE, SIZE), num_workers=0)
        normal, test, label, mask = features(images)
        maps: dict[str, Tensor] = {}
        for windows in ALONE:
            heat_maps = anomaly_maps(windows, normal, test)
            columns = f"{windows.dim or 'all'} | {windows.vectors}"
            print(f"| {product} | {windows} | {columns} | {figures(heat_maps, label, mask)} |", flush=True)
            if windows.dim is None and windows.vectors == VECTORS:
                maps[str(windows)] = heat_maps
        for sides, (name, rule) in itertools.product(TOGETHER, RULES.items()):
            heat_maps = rule(torch.stack([excess(maps[side]) for side in sides]))
            print(f"| {product} | {', '.join(sides)}: {name} | all | {VECTORS} | {figures(heat_maps, label, mask)} |")


def features(images: PyramidDataModule) -> tuple[Maps, Maps, Tensor, Tensor]:
    """The taps of normal and of test images, at half precision, and labels and masks of these."""
    images.setup("fit")
    images.setup("test")
    backbone = EfficientNetLite0().eval()
    taps = sorted({windows.tap for windows in ALONE})
    normal = taps_of(backbone, taps, (batch.image for batch in images.normal_dataloader()))
    test = list(images.test_dataloader())
    label, mask = (torch.cat([getattr(batch, name) for batch in test]) for name in ("label", "mask"))
    return normal, taps_of(backbone, taps, (batch.image for batch in test)), label, resized(mask.float()) > 0.5


def taps_of(backbone: EfficientNetLite0, taps: list[str], batches: Iterable[Tensor]) -> Maps:
    """Each tap of all images."""
    parts = [{tap: values.half() for tap, values in backbone(batch, taps).items()} for batch in batches]
    return {tap: torch.cat([part[tap] for part in parts]) for tap in taps}


def anomaly_maps(windows: Windows, normal: Maps, test: Maps) -> Tensor:
    """Maps at `METRIC` of the test images and, behind them, of the normal ones that are held out."""
    tap = EfficientNetLite0.taps[windows.tap]
    step = max(1, min(8, windows.side // 2) // tap.stride)
    encoder = WindowEncoder(windows.side, tap, standardized=True, dim=windows.dim).eval()
    assert encoder.standardize is not None
    for part in normal[windows.tap].split(16):
        encoder.standardize.observe(part.float())
    encoder.standardize.finish(lambda moments: moments)
    embed = partial(embedded, encoder, step)
    normals, queries = (
        embed(normal[windows.tap][:-HELD_OUT]),
        embed(torch.cat([test[windows.tap], normal[windows.tap][-HELD_OUT:]])),
    )
    order = torch.randperm(
        len(rows := normals.permute(0, 2, 3, 1).flatten(0, 2)), generator=torch.Generator().manual_seed(0)
    )
    distance = nearest(rows[order[: windows.vectors]], queries.permute(0, 2, 3, 1).flatten(0, 2))
    distance = distance.unflatten(0, (len(queries), *queries.shape[2:]))
    return resized(fold(distance, torch.ones_like(distance).bool(), windows.side, step * tap.stride))


def embedded(encoder: WindowEncoder, step: int, values: Tensor) -> Tensor:
    """Windows of all images."""
    return torch.cat([encoder(part.float(), step) for part in values.split(16)])


def nearest(vectors: Tensor, queries: Tensor) -> Tensor:
    """The distance of each query to the nearest vector that inverted lists of half precision find."""
    index = faiss.index_factory(vectors.shape[1], f"IVF{list_count(len(vectors))},SQfp16")
    lists = faiss.extract_index_ivf(index)
    lists.nprobe, lists.cp.max_points_per_centroid = PROBES, POINTS_PER_LIST
    index.train(vectors.contiguous())
    index.add(vectors.contiguous())
    return (queries - vectors[search(index, queries, 1)[:, 0]]).norm(dim=1)


def resized(maps: Tensor) -> Tensor:
    """At `METRIC`."""
    return F.interpolate(maps[:, None], (METRIC, METRIC), mode="area")[:, 0]


def scores(maps: Tensor) -> Tensor:
    """The mean of the highest 1 % of each map."""
    return top_mean(maps, torch.ones_like(maps, dtype=torch.int64), 0.01)


def excess(maps: Tensor) -> Tensor:
    """By how far the maps exceed the scores of normal images, in units of how these differ."""
    normal = scores(maps)[-HELD_OUT:]
    return (maps - normal.mean()) / normal.std(correction=0)


def figures(maps: Tensor, label: Tensor, mask: Tensor) -> str:
    """Detection / segmentation AUROC and PRO of the test images, in %."""
    smooth = gaussian(maps, torch.full((len(maps), 2), METRIC), SMOOTHING)[:-HELD_OUT]
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    detection = scores(maps)[:-HELD_OUT].argsort().argsort() / len(label)  # ranks, since AUROC takes probabilities
    aurocs = binary_auroc(detection, label), binary_auroc(smooth.flatten(), mask.flatten().long())
    return f"{100 * aurocs[0]:.1f} / {100 * aurocs[1]:.1f} | {100 * PerRegionOverlap()(smooth, mask):.1f}"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
