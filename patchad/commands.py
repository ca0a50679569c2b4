"""What Lightning's trainer has no verb for: `patchad export`, `verify`, `benchmark`, `threshold` and `update`."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from torch import Tensor

from patchad.callbacks.predictions import Maps, Predictions
from patchad.checkpoint import checksum, read_checkpoint
from patchad.data.datamodule import PyramidDataModule
from patchad.data.datasets import ImageDataset
from patchad.detector import Detector
from patchad.errors import PatchadError, check_range
from patchad.export import MAP_TOLERANCE, TOLERANCE, Difference, check_output, compare, export
from patchad.files import check_writable
from patchad.masks import read_region
from patchad.model import ScoringModel
from patchad.precision import in_int8
from patchad.revision import Revision
from patchad.runtime import ExportedDetector, load
from patchad.stages import Row, stage_table
from patchad.timing import alternate, best_rate, measure_stages, peak_memory, reset_peak_memory
from patchad.types import Precision, Sample, given


class DetectorTrainer(Trainer):
    """Lightning's trainer with five more verbs, and a `predict` that says what is written."""

    def predict(  # type: ignore[override]
        self,
        model: Detector,
        datamodule: PyramidDataModule,
        ckpt_path: Path | None = None,
        maps: Maps | None = None,
    ) -> None:
        """Score images, with verdicts and pictures of what was found.

        Args:
            model: takes the weights.
            datamodule: its folder's images are scored.
            ckpt_path: what patchad fit wrote.
            maps: what is written of each image beside its row: none, overlay (as a rule), heatmap or float16; see
                patchad.callbacks.Predictions.
        """
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Predictions) and maps is not None:
                callback.maps = maps
        # else every map would stay in memory
        super().predict(model, datamodule=datamodule, ckpt_path=ckpt_path, return_predictions=False)

    def export(
        self,
        model: Detector,
        datamodule: PyramidDataModule,
        ckpt_path: Path | None = None,
        output: Path = Path("model.patchad"),
        precision: Precision = "float32",
    ) -> None:
        """Write a fitted detector as one file that scores images without torch.

        Args:
            model: takes the weights.
            datamodule: knows the size of images; for int8 its root holds the normal images of the fit.
            ckpt_path: what patchad fit wrote.
            output: the file.
            precision: of the backbone. int8 is faster on CPUs, and refused where it does harm.
        """
        check_output(output)
        scoring = restored(model, datamodule, ckpt_path)
        if precision == "int8":
            scoring, moves = in_int8(scoring, datamodule, model.fitted)
            moves.check()
            print(f"int8:     {moves}")
        export(scoring, output, ckpt_path, precision)
        megabytes = output.stat().st_size / 1e6
        print(f"exported: {output} ({megabytes:.1f} MB)\nnext:     patchad.load({str(output)!r})(image)")

    def verify(
        self,
        model: Detector,
        datamodule: PyramidDataModule,
        exported: Path | None = None,
        ckpt_path: Path | None = None,
        images: int = 8,
    ) -> None:
        """Show that an exported file says what its checkpoint says.

        Args:
            model: takes the weights.
            datamodule: its folder's images are scored.
            exported: what patchad export wrote.
            ckpt_path: what it was exported from.
            images: how many images of the folder, spread evenly.

        Raises:
            PatchadError: if a file of float32 says something else or holds another threshold, or images cannot be
                scored.
        """
        if exported is None:
            raise PatchadError("nothing to verify: give patchad verify FILE, the file that patchad export wrote")
        check_range({"--images": images}, 1)
        # OpenVINO rounds otherwise, which says nothing of the file
        scoring, runtime = restored(model, datamodule, ckpt_path), load(exported, runtime="onnxruntime")
        datamodule.setup("predict")
        print("| image | score | map | verdict |\n|---|---|---|---|")
        dataset = datamodule.predict_set
        samples = [dataset.samples[number] for number in evenly_spread(dataset, min(images, len(dataset)))]
        differences, errors = compare_all(scoring, runtime, samples)
        for difference in differences:
            verdict = "same" if difference.same_verdict else "DIFFERENT"
            print(f"| {difference.path} | {difference.score:.1e} | {difference.map:.1e} | {verdict} |")
        if (precision := runtime.metadata.get("precision", "float32")) == "float32":
            check_same(differences, exported, named(ckpt_path))
            check_threshold(runtime.threshold, float(scoring.scorer.threshold), exported, named(ckpt_path))
        else:
            print(moved(differences, precision))
        check_origin(exported, runtime.metadata["checkpoint"], named(ckpt_path))
        if errors:
            raise PatchadError(f"{len(errors)} of {len(samples)} images could not be scored: {'; '.join(errors)}")

    def benchmark(
        self,
        model: Detector,
        datamodule: PyramidDataModule,
        ckpt_path: Path | None = None,
        batch_sizes: tuple[int, ...] = (1, 8),
        repeats: int = 10,
    ) -> None:
        """Time a fitted detector, beside what this machine can do at best.

        Args:
            model: takes the weights.
            datamodule: its folder's images are scored.
            ckpt_path: what patchad fit wrote.
            batch_sizes: images per batch.
            repeats: timed runs.
        """
        check_range({"--repeats": repeats, "--batch_sizes": min(batch_sizes, default=0)}, 1)
        device, threads = self.strategy.root_device, torch.get_num_threads()
        scoring = restored(model, datamodule, ckpt_path).to(device)
        datamodule.setup("predict")
        with self.precision_plugin.forward_context():
            rate = best_rate(device)
            reset_peak_memory(device)
            where = f"at precision {self.precision} on {device}, {threads} threads"
            print(f"best rate measured: {rate / 1e9:.0f} GFLOP/s {where}")
            for size in batch_sizes:
                decode = partial(decoded, datamodule.predict_set, size)
                batches, decoding = decode(), alternate({"decode": decode}, repeats)["decode"]
                image, content, region = (torch.cat(parts) for parts in zip(*batches, strict=True))
                rows = measure_stages(scoring, image, content, repeats, rate, given(region))
                print(f"\nbatch {size}\n", stage_table([Row("decode (in the workers)", decoding), *rows]), sep="\n")
                images_per_second = 1e3 * size / np.median(rows[-1].times)
                print(f"\n{images_per_second:.1f} images/s from memory, peak memory {peak_memory(device):.0f} MB")

    def threshold(
        self,
        model: Detector,
        datamodule: PyramidDataModule,
        target_fpr: float,
        output: Path,
        ckpt_path: Path | None = None,
        review_fpr: float | None = None,
    ) -> None:
        """Set thresholds for another rate of false alarms, without a fit.

        Args:
            model: takes the weights.
            datamodule: knows the size of images.
            target_fpr: share of normal images that may be called anomalous.
            output: the checkpoint that is written.
            ckpt_path: what patchad fit wrote.
            review_fpr: share of normal images that may be called anomalous or be looked at.
        """
        revision = revise(model, datamodule, ckpt_path, output)
        revision.set_rates(target_fpr, review_fpr)
        revision.save(output)

    def update(
        self,
        model: Detector,
        datamodule: PyramidDataModule,
        output: Path,
        ckpt_path: Path | None = None,
        normal: Path | None = None,
        remove: Path | None = None,
        defects: Path | None = None,
    ) -> None:
        """Do something about false alarms and missed defects, without a fit.

        Args:
            model: takes the weights.
            datamodule: knows the size of images.
            output: the checkpoint that is written.
            ckpt_path: what patchad fit wrote.
            normal: images, or one, that are normal, such as false alarms: they fill the banks and set the thresholds.
            remove: images, or one, of those that are taken for normal, which shall be so no longer.
            defects: images, or one, of known defects, which the threshold shall find.
        """
        if not (normal or remove or defects):
            raise PatchadError("nothing to update: give --normal, --remove or --defects, each a folder or a file")
        revision = revise(model, datamodule, ckpt_path, output)
        if remove:
            revision.remove(remove)
        if normal:
            revision.add(normal)
        if defects:
            revision.find(defects)
        revision.save(output)


def restored(detector: Detector, datamodule: PyramidDataModule, ckpt_path: Path | None) -> ScoringModel:
    """The model with the checkpoint's weights, in eval mode; warns where options differ from what was fitted.

    Raises:
        PatchadError: if there is no checkpoint, or one of another format.
    """
    return restore(detector, datamodule, read_checkpoint(named(ckpt_path), "--ckpt_path"))


def named(ckpt_path: Path | None) -> Path:
    """The path of a checkpoint.

    Raises:
        PatchadError: if there is none.
    """
    if ckpt_path is None:
        raise PatchadError("no detector: give --ckpt_path, the checkpoint that patchad fit wrote")
    return ckpt_path


def restore(detector: Detector, datamodule: PyramidDataModule, checkpoint: dict[str, Any]) -> ScoringModel:
    """The model with the weights of a checkpoint that was read, in eval mode."""
    detector.on_load_checkpoint(checkpoint)
    datamodule.load_state_dict(checkpoint.get(type(datamodule).__qualname__, {}))
    detector.load_state_dict(checkpoint["state_dict"])
    detector.model.canvas = datamodule.canvas
    return detector.model.eval()


def revise(detector: Detector, datamodule: PyramidDataModule, ckpt_path: Path | None, output: Path) -> Revision:
    """A fitted detector, ready to be changed; an output that cannot be written is told before the work."""
    check_writable(output)
    checkpoint = read_checkpoint(named(ckpt_path), "--ckpt_path")
    model = restore(detector, datamodule, checkpoint)
    return Revision(model, detector.fitted, datamodule, checkpoint, named(ckpt_path))


def check_same(differences: Sequence[Difference], exported: Path, ckpt_path: Path) -> None:
    """Prints the largest differences; raises PatchadError where one is more than rounding."""
    score = max((difference.score for difference in differences), default=0.0)
    pixel = max((difference.map for difference in differences), default=0.0)
    largest = f"largest relative difference of a score {score:.1e}, of a pixel over the highest {pixel:.1e}"
    # nan is not within them
    if not all(difference.score <= TOLERANCE and difference.map <= MAP_TOLERANCE for difference in differences):
        raise PatchadError(f"{exported} differs from {ckpt_path}, {largest}; export it again")
    print(f"{largest}; allowed {TOLERANCE:.0e} and {MAP_TOLERANCE:.0e}")


def check_threshold(threshold: float, expected: float, exported: Path, ckpt_path: Path) -> None:
    """Raises PatchadError if a file has another threshold than its checkpoint."""
    if not np.isclose(threshold, expected, rtol=TOLERANCE):
        thresholds = f"{threshold:.4g}, not {expected:.4g} as {ckpt_path}"
        raise PatchadError(f"{exported} has the threshold {thresholds}; export it again")


def moved(differences: Sequence[Difference], precision: str) -> str:
    """What a file of less than float32 moves, in a sentence."""
    changed = sum(not difference.same_verdict for difference in differences)
    scores = [difference.score for difference in differences] or [0.0]
    return (
        f"{precision}: {changed} of {len(differences)} verdicts differ from float32; scores by {np.median(scores):.1%} "
        f"(median) and {max(scores):.1%} (most), its threshold is its own"
    )


def check_origin(exported: Path, noted: Mapping[str, str] | None, ckpt_path: Path) -> None:
    """Raises PatchadError if a file notes that it was exported from another checkpoint, such as before an update."""
    if noted and noted["sha256"] != checksum(ckpt_path):
        raise PatchadError(
            f"{exported} was exported from another checkpoint ({noted['name']}), not {ckpt_path}: export it again"
        )


def compare_all(
    model: ScoringModel, exported: ExportedDetector, samples: Sequence[Sample]
) -> tuple[list[Difference], list[str]]:
    """Scores image files by both; the differences, and why files could not be scored."""
    differences, errors = [], []
    for sample in samples:
        try:
            region = None if sample.region is None else read_region(sample.region)
            differences.append(compare(model, exported, sample.path, region))
        except PatchadError as error:
            errors.append(str(error))
    return differences, errors


def evenly_spread(dataset: ImageDataset, count: int) -> list[int]:
    """Numbers of images, `count` of them spread evenly over the dataset."""
    return np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()


def decoded(dataset: ImageDataset, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Images `[1, 3, height, width]`, their content and region, `count` of them spread evenly over the dataset."""
    images = [dataset.read(number) for number in evenly_spread(dataset, count)]
    return [(image.image[None], image.content[None], image.region[None]) for image in images]
