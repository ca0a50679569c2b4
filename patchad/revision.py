"""What is changed after a fit: the limits, and which images are normal. No encoder learns or forgets anything."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader

from patchad.checkpoint import checksum, save
from patchad.conformal import p_values
from patchad.data.datamodule import PyramidDataModule
from patchad.data.datasets import ImageDataset
from patchad.data.doubts import Doubts
from patchad.data.layouts import images_below
from patchad.errors import PatchadError
from patchad.files import write_whole
from patchad.model import PatchModel, ScoringModel, embed_mirrors, summary
from patchad.scoring import Scorer
from patchad.types import UNKNOWN, FittedImages, ImageBatch, Sample, given


class Images(NamedTuple):
    """Image files that can be read.

    Attributes:
        batches: in order; each time they are asked for they are read again, so that memory stays flat.
        paths: of the files.
        digests: of their pixels, by which images are known again.
    """

    batches: Iterable[ImageBatch]
    paths: list[str]
    digests: list[int]


def read_images(path: Path, datamodule: PyramidDataModule) -> Images:
    """A file, or every image below a folder.

    Args:
        path: of either.
        datamodule: says what images are brought to.

    Raises:
        PatchadError: if there is none, or some cannot be read; it names all of these.
    """
    files = [path] if path.is_file() else images_below(path)
    samples = [Sample(file, UNKNOWN, None, "test") for file in files]
    canvas, most = datamodule.canvas, datamodule.max_megapixels
    dataset = ImageDataset(samples, canvas, datamodule.metric_size, max_megapixels=most, tolerant=True)
    batches, doubts = (
        DataLoader(dataset, batch_size=datamodule.batch_size, num_workers=datamodule.num_workers),
        Doubts(),
    )
    for batch in batches:
        doubts.add(batch)
    if doubts.errors:
        listed = "; ".join(doubts.errors.values())
        raise PatchadError(f"{len(doubts.errors)} of {len(files)} images cannot be read, nothing was changed: {listed}")
    return Images(batches, list(doubts.digests), list(doubts.digests.values()))


@torch.no_grad()
def score(
    model: ScoringModel, images: Images, things: Int[Tensor, " images"] | None = None
) -> Float[Tensor, "images 2"]:
    """Score and highest pixel of each image.

    Args:
        model: in eval mode.
        images: to be scored.
        things: number of what each shows, which it is not compared with.
    """
    scored = [
        summary(
            model(batch.image, batch.content, None if things is None else things[batch.number], given(batch.region))
        )
        for batch in images.batches
    ]
    return torch.cat(scored)


@torch.no_grad()
def add_normals(model: PatchModel, images: Images, fitted: FittedImages) -> FittedImages:
    """Adds normal images to banks and calibration; each sets limits without itself.

    All their patches are taken in, also where a bank is full. The scores of the images that were there stay: in the
    larger banks they would be no higher, up to what a search in lists misses, so that the promise of the limits holds.

    Args:
        model: fitted, in eval mode.
        images: new ones.
        fitted: those that it knows.

    Returns:
        All that it knows now.

    Raises:
        PatchadError: if it knows one of them already, or one is there twice.
    """
    known = set(fitted.digests)
    for path, digest in zip(images.paths, images.digests, strict=True):
        if digest in known:
            raise PatchadError(f"{path} is already among the normal images: take it out, nothing was changed")
        known.add(digest)
    count, mirrors = len(images.paths), [(), *map(tuple, fitted.mirrors)]
    things = 1 + max(fitted.things) + torch.arange(count)
    numbered = things_by_number(model)
    embedded = embed_mirrors(model, images.batches, mirrors, first=len(numbered), count=count)
    model.remember(embedded, torch.cat([numbered, things.repeat(len(mirrors))]), more=True)
    scores, peaks = score(model, images, things).T
    scorer = model.scorer
    scorer.set_limits(torch.cat([scorer.normals, scores]), torch.cat([scorer.peaks, peaks]))
    return fitted._replace(
        digests=[*fitted.digests, *images.digests],
        things=[*fitted.things, *things.tolist()],
        added=[*fitted.added, *[True] * count],
    )


def things_by_number(model: PatchModel) -> Int[Tensor, " images"]:
    """By the number of each image that the banks hold patches of, the number of what it shows."""
    banks = model.memory_banks.values()
    things = torch.zeros(1 + max(int(bank.keys[:, 0].max()) for bank in banks), dtype=torch.int64)
    for bank in banks:
        things[bank.keys[:, 0]] = bank.things
    return things


@torch.no_grad()
def remove_normals(model: PatchModel, images: Images, fitted: FittedImages) -> FittedImages:
    """Takes normal images out of banks and calibration.

    Where a bank had no room for all patches, those that it left out for these images do not come back.

    Args:
        model: fitted, in eval mode.
        images: to be taken out.
        fitted: those that it knows.

    Returns:
        Those that it still knows.

    Raises:
        PatchadError: if it does not know one of them, fewer than two things would be left, or others that show the same
            thing would stay.
    """
    for path, digest in zip(images.paths, images.digests, strict=True):
        if digest not in fitted.digests:
            raise PatchadError(f"{path} is not among the normal images, at least not as it is: nothing was changed")
    gone = [digest in images.digests for digest in fitted.digests]
    things = {thing for thing, leaves in zip(fitted.things, gone, strict=True) if leaves}
    staying = [number for number, leaves in enumerate(gone) if not leaves]
    if things & {fitted.things[number] for number in staying}:
        raise PatchadError("some of these images show what others show that would stay: remove the whole group")
    if len({fitted.things[number] for number in staying}) < 2:
        raise PatchadError("fewer than two normal images would be left, and nothing to compare one with")
    numbered = things_by_number(model)
    for bank in model.memory_banks.values():
        bank.forget(torch.tensor(sorted(things)))
        bank.finish(numbered)
    model.scorer.set_limits(model.scorer.normals[staying], model.scorer.peaks[staying])
    kept = {name: [getattr(fitted, name)[number] for number in staying] for name in ("digests", "things", "added")}
    return fitted._replace(**kept)


def rate_that_finds(scorer: Scorer, scores: Float[Tensor, " images"]) -> float:
    """The least false-positive rate whose threshold lies below all these scores: their highest p-value.

    Raises:
        PatchadError: if a score is above that of no normal image: no threshold can find it.

    Example:
        >>> scorer = Scorer((16,))
        >>> promised = scorer.set_limits(torch.arange(99.0), torch.arange(99.0))
        >>> rate_that_finds(scorer, torch.tensor([98.5, 89.5]))
        0.1
    """
    rate = float(p_values(scores.numpy(), scorer.normals.numpy()).max())
    if rate == 1:
        least = f"{float(scores.min()):.4g}"
        raise PatchadError(f"a defect scores {least}, no higher than any normal image: no threshold finds it")
    return rate


def set_rates(options: Any, target_fpr: float, review_fpr: float | None) -> None:
    """Sets the rates in the options of a detector, as a checkpoint holds them.

    Raises:
        PatchadError: if there is no scorer among them.
    """
    if not isinstance(options.get("scorer"), Mapping):
        raise PatchadError("the detector has no option scorer, whose rates could be set")
    options["scorer"]["init_args"] |= {"target_fpr": target_fpr, "review_fpr": review_fpr}


def out_of_date(digest: str, folders: Iterable[Path]) -> list[Path]:
    """The exported files in some folders that were made from the checkpoint of a checksum."""
    files = {file.resolve() for folder in folders for file in folder.glob("*.patchad")}
    return sorted(file for file in files if digest.encode() in file.read_bytes())


class Revision:
    """Changes a fitted model, says of each step what was and what is, and writes a checkpoint at the end.

    Args:
        model: in eval mode.
        fitted: the normal images that it knows.
        datamodule: says what images are brought to.
        checkpoint: of the model.
        ckpt_path: where that was.
    """

    def __init__(
        self,
        model: ScoringModel,
        fitted: FittedImages,
        datamodule: PyramidDataModule,
        checkpoint: dict[str, Any],
        ckpt_path: Path,
    ) -> None:
        self.model, self.fitted, self.datamodule = model, fitted, datamodule
        self.checkpoint, self.ckpt_path, self.before = checkpoint, ckpt_path, model.scorer.limits
        self.changes: list[str] = []

    def add(self, path: Path) -> None:
        """Adds a normal image, or those of a folder."""
        images, model = read_images(path, self.datamodule), self._patch_model()
        before = score(model, images)[:, 0]
        count, self.fitted = len(images.paths), add_normals(model, images, self.fitted)
        title = f"{count} normal images of {path}, each compared with the others"
        self._compare(title, images, before, model.scorer.normals[-count:])
        self.changes.append(f"added {count} normal images, which no encoder saw")

    def remove(self, path: Path) -> None:
        """Takes out a normal image, or those of a folder."""
        images, model = read_images(path, self.datamodule), self._patch_model()
        before = score(model, images)[:, 0]
        self.fitted = remove_normals(model, images, self.fitted)
        self._compare(f"{len(images.paths)} images of {path}, taken out", images, before, score(model, images)[:, 0])
        self.changes.append(f"removed {len(images.paths)} normal images")

    def find(self, path: Path) -> None:
        """Sets the threshold so that it finds a defect, or all of a folder, and says what it costs."""
        images, scorer = read_images(path, self.datamodule), self.model.scorer
        scores, normals = score(self.model, images)[:, 0], scorer.normals
        rate, old = rate_that_finds(scorer, scores), scorer.limits
        missed = int((scores <= old.threshold).sum())
        print(f"{len(scores)} known defects of {path}: {len(scores) - missed} found, {missed} missed")
        if not missed:
            return
        review = scorer.review_fpr if scorer.review_fpr and scorer.review_fpr > rate else None
        self.set_rates(rate, review)
        alarms, more = (int((normals > limits.threshold).sum()) for limits in (old, scorer.limits))
        print(
            f"to find all, {more} of {len(normals)} normal images are false alarms, not {alarms}: "
            f"of new ones up to {rate:.1%}"
        )

    def set_rates(self, target_fpr: float, review_fpr: float | None = None) -> None:
        """Sets the limits for other rates of false alarms, and of what is to be looked at."""
        self.changes.append(f"target_fpr {target_fpr:.4g}, not {self.model.scorer.target_fpr:.4g}")
        self.model.set_target_fpr(target_fpr, review_fpr)
        for options in (self.checkpoint["hyper_parameters"], self.checkpoint["patchad_model"]["init_args"]):
            set_rates(options, target_fpr, review_fpr)

    def save(self, output: Path) -> None:
        """Writes the checkpoint, and says how limits changed and which exported files are out of date."""
        outdated = out_of_date(checksum(self.ckpt_path), (self.ckpt_path.parent, output.parent, Path()))
        state = {f"model.{name}": values for name, values in self.model.state_dict().items()}
        self.checkpoint["state_dict"] |= state
        self.checkpoint["patchad_fitted"] = self.fitted._asdict()
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        self.checkpoint["patchad_updates"] = [*self.model.updates, f"{time} {'; '.join(self.changes)}"]
        write_whole(output, lambda part: save(self.checkpoint, part))
        print("| limit | before | after |\n|---|---|---|")
        for (name, old), new in zip(self.before._asdict().items(), self.model.scorer.limits, strict=True):
            print(f"| {name.replace('_', ' ')} | {old:.4g} | {new:.4g} |")
        for file in outdated:
            print(f"out of date: {file}, exported from {self.ckpt_path}; export it again")
        print(f"checkpoint: {output}\nnext:       patchad export --ckpt_path {output} --output model.patchad")

    def _patch_model(self) -> PatchModel:
        if isinstance(self.model, PatchModel):
            return self.model
        raise PatchadError(
            f"{self.ckpt_path} has no banks of its own that could change: fit it anew, an ensemble of updated members"
        )

    def _compare(self, title: str, images: Images, before: Tensor, after: Tensor) -> None:
        """Prints verdicts before and after, and the scores of images that are or were no normal ones."""
        limits = self.before, self.model.scorer.limits
        pairs = [
            (path, [(score, limit.verdict(score)) for score, limit in zip(scores, limits, strict=True)])
            for path, *scores in zip(images.paths, before.tolist(), after.tolist(), strict=True)
        ]
        counts = [sum(said[step][1] == "anomalous" for _, said in pairs) for step in (0, 1)]
        print(f"{title}: {counts[0]} anomalous before, {counts[1]} now")
        for path, ((old, first), (new, second)) in pairs:
            if {first, second} != {"normal"}:
                print(f"  {path}: {old:.4g} {first} -> {new:.4g} {second}")
