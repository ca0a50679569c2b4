"""What happens in `fit` with losses: pyramids, pseudo-labels, what is logged, resuming."""

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger

from patchad import Learning, PatchDetector, PyramidDataModule
from patchad.callbacks import Dashboard, LastCheckpoint, LearningCurve
from patchad.data.synthetic import write_synthetic
from patchad.errors import PatchadError
from patchad.losses import Clustering, PatchLoss, Position, RelativeSimilarity, Separation
from patchad.memory import MemoryBank
from patchad.models import EfficientNetLite0, FeatureCache, LearnedEncoder
from patchad.scoring import Scorer
from patchad.types import PatchViews

GOLDEN = Path(__file__).parent / "golden"
LEARNING = {"losses", "clusters", "warmup", "learning_rate", "cache", "directions"}
"""Options of `Learning`; the others are the detector's."""


def detector(**settings) -> PatchDetector:
    seed_everything(0, verbose=False)
    options = {name: settings.pop(name) for name in LEARNING & settings.keys()}
    losses = [Position(), RelativeSimilarity(), Clustering()]  # made before the encoders, as by the command line
    defaults = {
        "patch_encoder": LearnedEncoder,
        "bank": partial(MemoryBank, max_vectors=500, reduce="kmeans", baseline=0.0),
        "scorer": partial(Scorer, combination="product", smoothing=4.0),
        "learning": partial(Learning, **{"losses": losses, "clusters": 10, **options}),
    }
    return PatchDetector(EfficientNetLite0(), **{**defaults, **settings})


def images(root: Path, **settings) -> PyramidDataModule:
    defaults = {"image_size": (96, 96), "metric_size": (96, 96), "batch_size": 4, "num_workers": 0}
    return PyramidDataModule(root, **{**defaults, "pyramids_per_image": 32, **settings})


def trainer(folder: Path, *callbacks: Callback, **settings) -> Trainer:
    defaults = {"max_epochs": 3, "check_val_every_n_epoch": 3, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "deterministic": True}
    logger = CSVLogger(folder, name=None, version="log")
    every = [LastCheckpoint(), *callbacks]
    return Trainer(
        accelerator="cpu", default_root_dir=folder, logger=logger, callbacks=every, **(defaults | quiet | settings)
    )


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "log/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_that_is_loaded_in_python_writes_no_cache_elsewhere(product, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = detector(losses=[RelativeSimilarity()], cache=FeatureCache(str(tmp_path / "elsewhere")))
    trainer(tmp_path / "first", max_epochs=1).fit(model, images(product))
    shutil.rmtree(tmp_path / "elsewhere")
    again = PatchDetector.load_from_checkpoint(tmp_path / "first/log/checkpoints/last.ckpt")
    trainer(tmp_path / "second", max_epochs=1).fit(again, images(product))
    assert not (tmp_path / "elsewhere").exists() and (tmp_path / "runs/features").is_dir()


def test_a_second_fit_clusters_its_own_images(product, tmp_path):
    write_synthetic(tmp_path / "other", train=6, test_normal=1, test_defective=1, size=96, seed=1)
    model = detector(warmup=0.0, cache=FeatureCache(str(tmp_path / "features")))
    trainer(tmp_path / "first", max_epochs=1).fit(model, images(product))
    trainer(tmp_path / "second", max_epochs=1).fit(model, images(tmp_path / "other"))
    assert sum(len(batch.number) for batch in model.learning.probe_batches) == 5  # one of six calibrates
    assert len(model.learning.probe_labels[16]) == 5 * 32


def test_a_loss_that_compares_images_says_that_one_in_a_batch_is_too_few(product, tmp_path):
    model = detector(losses=[Separation()])
    with pytest.warns(UserWarning, match=r"data\.batch_size 1 leaves Separation nothing to learn from"):
        trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(model, images(product, batch_size=1))


class Compactness(PatchLoss):
    """Asks for normal patches and what they show, and for nothing painted."""

    needs = ("normal", "thing")

    def forward(self, views: PatchViews) -> torch.Tensor:
        return views.normal.square().mean() + 0 * views.thing.sum()


def test_a_loss_of_normal_patches_alone_is_computed(product, tmp_path):
    trainer(tmp_path, max_epochs=1).fit(detector(losses=[Compactness()]), images(product))
    assert "train/compactness_side_64" in (tmp_path / "log/metrics.csv").read_text()


class Steps(PatchLoss):
    """How often it was asked."""

    asked = -1

    def forward(self, views: PatchViews) -> torch.Tensor:
        self.asked += 1
        return 0 * views.anchor.mean() + self.asked


def test_what_is_logged_is_the_mean_over_the_steps_of_its_epoch(product, tmp_path):
    trainer(tmp_path).fit(detector(losses=[Steps()]), images(product, batch_size=2))
    steps = len(list(product.glob("train/good/*"))) // 2  # one image calibrates; the last batch may have one image
    expected, found = [steps * epoch + (steps - 1) / 2 for epoch in range(3)], logged(tmp_path)
    assert found["train/steps_side_16"] == found["train/steps_side_32"] == expected
    assert found["train/loss"] == [3 * one for one in expected]


@pytest.fixture(scope="module")
def fitted(product, tmp_path_factory) -> Path:
    """A fit of three epochs, features cached."""
    folder = tmp_path_factory.mktemp("learned")
    trainer(folder).fit(detector(cache=FeatureCache(str(folder / "features"))), images(product))
    return folder


def logged(folder: Path) -> dict[str, list[float]]:
    rows = list(csv.DictReader((folder / "log/metrics.csv").read_text().splitlines()))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_training_brings_the_loss_down_and_logs_what_a_trainer_watches(fitted):
    found = logged(fitted)
    assert found["train/loss"][-1] < found["train/loss"][0]
    for name in ("position", "relativesimilarity", "position_accuracy", "deviation"):
        assert len(found[f"train/{name}_side_16"]) == 3
    for name in ("clustering", "smallest_cluster", "largest_cluster"):
        assert len(found[f"train/{name}_side_32"]) == 2  # the first of three epochs is warm-up
    assert len(found["train/label_churn_side_32"]) == 1 and 0 <= found["train/label_churn_side_32"][0] < 1
    assert "train/position_side_64" not in found  # 96 pixels are too few for neighbours of side 64
    assert "val/detection_auroc" in found


def test_the_encoders_input_is_standardised_after_a_fit(fitted):
    found = state(fitted)
    assert found["model.encoder.encoders.16.standardize.ready"]
    assert found["model.encoder.encoders.16.standardize.deviation"].std() > 0


def test_sides_whose_neighbours_do_not_fit_are_named_with_the_size_they_need(product, tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer(tmp_path, max_epochs=1).fit(detector(), images(product))
    said = [line for line in caplog.messages if "do not fit images" in line]
    assert len(said) == 1 and said[0].startswith("side 64") and said[0].endswith("they need image_size of at least 128")


def test_the_same_seed_gives_the_same_tensors_with_workers_and_a_cache_that_is_filled(fitted, product, caplog):
    cache = FeatureCache(str(fitted / "features"))
    again = fitted / "again"
    with caplog.at_level("INFO"):
        trainer(again).fit(detector(cache=cache), images(product, num_workers=2))
    assert f"feature cache: 0.00 GB in {cache.home}, 0 views to compute" in caplog.messages
    assert same(state(fitted), state(again))


def test_views_of_each_epoch_train_without_a_cache_and_the_same_seed_gives_the_same_tensors(product, tmp_path):
    for name in ("one", "two"):
        trainer(tmp_path / name, max_epochs=2).fit(detector(), images(product))
    assert same(state(tmp_path / "one"), state(tmp_path / "two"))


def test_twenty_golden_steps(product, tmp_path):
    """A refactor may not move them; with a tolerance, since processors and versions of torch round differently.

    After a change that is meant: PATCHAD_GOLDEN=write, and the reason into CHANGELOG.md.
    """
    losses, model = [], detector()

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            losses.append(outputs["loss"].item())

    run = trainer(tmp_path, Watch(), max_epochs=-1, max_steps=20)
    run.fit(model, images(product))
    metrics = run.test(model, images(product), verbose=False)[0]
    aurocs = [metrics["test/detection_auroc"], metrics["test/segmentation_auroc"]]
    assert losses == pytest.approx(golden("losses.txt", losses), rel=2e-3)
    detection, segmentation = golden("aurocs.txt", aurocs)
    assert aurocs[0] == pytest.approx(detection, abs=0.05)  # one of 28 pairs may change its order
    assert aurocs[1] == pytest.approx(segmentation, abs=0.01)


def golden(name: str, found: list[float]) -> list[float]:
    if os.environ.get("PATCHAD_GOLDEN") == "write":
        (GOLDEN / name).write_text("".join(f"{value:.5f}\n" for value in found))
    return [float(line) for line in (GOLDEN / name).read_text().split()]


def test_pseudo_labels_begin_after_the_warm_up_and_are_held_for_an_epoch(product, tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            labels = pl_module.learning.pseudo_labels["16"]
            seen.append((trainer.current_epoch, bool(labels.ready), labels.centroids.clone()))

    trainer(tmp_path, Watch(), max_epochs=4, limit_val_batches=0).fit(detector(warmup=0.5), images(product))
    assert [(epoch, ready) for epoch, ready, _ in seen[::3]] == [(0, False), (1, False), (2, True), (3, True)]
    for epoch in (2, 3):
        held = [centroids for found, _, centroids in seen if found == epoch]
        assert all(torch.equal(held[0], one) for one in held)
    assert not torch.equal(seen[-1][2], seen[-4][2])


def test_clustering_alone_moves_the_encoders(product, tmp_path):
    run, model = trainer(tmp_path, max_epochs=2, limit_val_batches=0), detector(losses=[Clustering(1.0)], warmup=0.0)
    before = {name: value.clone() for name, value in model.model.encoder.encoders.named_parameters()}
    run.fit(model, images(product))
    assert all(not torch.equal(before[name], value) for name, value in model.model.encoder.encoders.named_parameters())


def test_separation_learns_from_cached_views_and_the_same_seed_gives_the_same_tensors(product, tmp_path):
    cache = FeatureCache(str(tmp_path / "features"))
    for name, workers in (("one", 0), ("two", 2)):
        model = detector(losses=[Separation()], cache=cache, learning_rate=1e-3)
        trainer(tmp_path / name).fit(model, images(product, num_workers=workers))
    assert same(state(tmp_path / "one"), state(tmp_path / "two"))
    found = logged(tmp_path / "one")
    for side in (64, 32, 16):
        assert found[f"train/separation_side_{side}"][-1] < found[f"train/separation_side_{side}"][0]


@pytest.mark.parametrize("mode", ["dense", "sliding"])
def test_what_separation_compares_are_the_embeddings_that_are_scored(mode, product, tmp_path):
    """In dense mode cached and computed features give the same ones to half precision."""
    cache = FeatureCache(str(tmp_path / "features"), views=1) if mode == "dense" else None
    model = detector(mode=mode, losses=[Separation()], cache=cache, sides=(32, 16), scoring_strides={32: 16, 16: 16})
    data = images(product, image_size=(96, 128), pyramids_per_image=4, num_workers=0)
    trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(model, data)
    batch = next(iter(data.train_dataloader()))
    view = [data.pyramids.view(int(n), int(v[0])) for n, v in zip(batch.number, batch.views, strict=True)]
    painted = [data.pyramids.painted(int(n), int(v[0]))[0] for n, v in zip(batch.number, batch.views, strict=True)]
    with torch.no_grad():
        expected, with_defects = model.model.encoder(torch.stack(view)), model.model.encoder(torch.stack(painted))
        for views in model.learning.patch_views(model.learning.features.read(batch, (0,)), batch):
            counted = model.model.encoder.counted(batch.content, expected[views.side], views.side)
            on_content = expected[views.side].permute(0, 2, 3, 1)[counted]
            torch.testing.assert_close(views.normal, on_content, rtol=5e-3, atol=5e-3)
            assert views.thing.tolist() == batch.thing.repeat_interleave(counted[0].sum()).tolist()
            places = with_defects[views.side].permute(0, 2, 3, 1).reshape(-1, 64)
            assert torch.cdist(views.painted, places).min(1).values.max() < 0.05
            assert len(views.painted) == len(views.share) and 0 < views.share.min() <= views.share.max() <= 1


def test_collapse_is_said_in_words(product, tmp_path):
    model = detector(learning_rate=0.0, sides=(16,), patch_encoder=partial(LearnedEncoder, shortcut=False))
    with torch.no_grad():
        model.model.encoder.encoders["16"].layers[-1].weight.mul_(
            1e-3
        )  # every patch is embedded at nearly the same place
    with pytest.warns(UserWarning, match=r"embeddings of side 16 have collapsed: their deviation is \d"):
        trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(model, images(product))


class Diverges(RelativeSimilarity):
    """Is nan from the second epoch on."""

    steps = 0

    def forward(self, views: PatchViews) -> torch.Tensor:
        self.steps += 1
        return super().forward(views) * (1.0 if self.steps <= 3 else math.nan)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_training_that_diverges_ends_in_words_and_leaves_the_checkpoint_before(warmup, product, tmp_path):
    """Found by K-means, or without pseudo-labels by the bank."""
    run = trainer(tmp_path, max_epochs=3, check_val_every_n_epoch=1)
    with pytest.raises(PatchadError, match=r"embeddings of side 16 are nan .* train/\.\.\._side_16 is nan"):
        run.fit(detector(losses=[Diverges()], sides=(16,), warmup=warmup), images(product))
    checkpoint = torch.load(tmp_path / "log/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3 < run.global_step
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_neighbours_are_drawn_in_as_many_directions_as_learning_asks_for(product, tmp_path):
    model, data = detector(losses=None, directions=8, sides=(16,)), images(product)
    trainer(tmp_path, max_epochs=1).fit(model, data)
    drawn = torch.cat([batch.sides[16].direction.flatten() for batch in data.train_dataloader()])
    assert drawn.unique().tolist() == list(range(8))


def test_zero_epochs_leave_a_checkpoint_with_a_bank(product, tmp_path):
    trainer(tmp_path, max_epochs=0).fit(detector(), images(product))
    found = state(tmp_path)
    assert len(found["model.banks.16.vectors"]) == 500 and found["model.scorer.normals"].isfinite().all()


def test_the_last_epoch_is_saved_where_no_validation_follows_it(product, tmp_path):
    run = trainer(tmp_path, max_epochs=3, check_val_every_n_epoch=2)
    run.fit(detector(), images(product))
    checkpoint = torch.load(tmp_path / "log/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == run.global_step == 9
    trained = run.lightning_module.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in checkpoint["state_dict"].items())


def test_frozen_layers_stay_as_they_are_and_trainable_ones_learn(product, tmp_path):
    model = detector()
    model.model.encoder.backbone = EfficientNetLite0(trainable="stage3")
    before = {name: value.clone() for name, value in model.model.encoder.backbone.state_dict().items()}
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(model, images(product))
    changed = {
        name.split(".")[1]
        for name, value in model.model.encoder.backbone.state_dict().items()
        if not torch.equal(before[name], value)
    }
    assert changed and min(map(int, changed)) == EfficientNetLite0.taps["stage3"].layer + 1


def test_sliding_patches_learn_and_score_as_in_the_paper(product, tmp_path):
    strides = {32: 16, 16: 16}
    model = detector(mode="sliding", sides=(32, 16), scoring_strides=strides, subtract_mean_image=True)
    data = images(product, pyramids_per_image=4)
    run = trainer(tmp_path, max_epochs=2, check_val_every_n_epoch=2)
    run.fit(model, data)
    assert run.callback_metrics["train/position_side_16"].isfinite()
    metrics = run.test(model, data, verbose=False)[0]
    assert metrics["test/detection_auroc"] >= 0.5


class Epochs(Callback):
    """Which epochs had batches; each is said, and one may wait to be killed."""

    def __init__(self, waits: int | None) -> None:
        self.trained, self.waits = set(), waits

    def on_train_batch_end(self, trainer, *_):
        self.trained.add(trainer.current_epoch)
        print("epoch", trainer.current_epoch, flush=True)
        time.sleep(60 if trainer.current_epoch == self.waits else 0)


def four_epochs(folder: Path, root: Path, ckpt_path: Path | None = None, waits: int | None = None) -> set[int]:
    epochs = Epochs(waits)
    run = trainer(folder, epochs, max_epochs=4, check_val_every_n_epoch=2)
    run.fit(detector(), images(root, num_workers=2), ckpt_path=ckpt_path, weights_only=True)
    return epochs.trained


@pytest.mark.slow
def test_a_run_that_was_killed_in_mid_epoch_resumes_and_ends_with_the_tensors_of_one_that_was_not(product, tmp_path):
    program = "import sys; from tests.test_learning import *; four_epochs(*map(Path, sys.argv[1:]), waits=2)"
    command = [sys.executable, "-c", program, str(tmp_path / "killed"), str(product)]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, text=True, stdout=subprocess.PIPE) as killed:
        next(line for line in killed.stdout if line.startswith("epoch 2"))
        killed.send_signal(signal.SIGKILL)
    last = tmp_path / "killed/log/checkpoints/last.ckpt"
    assert four_epochs(tmp_path / "resumed", product, last) == {2, 3}
    assert four_epochs(tmp_path / "whole", product) == {0, 1, 2, 3}
    assert same(state(tmp_path / "whole"), state(tmp_path / "resumed"))


@pytest.mark.parametrize(("workers", "every"), [(0, 1), (2, 2)])
def test_a_resumed_fit_reads_the_epoch_that_is_next(workers, every, product, tmp_path):
    def fit(folder: str, epochs: int, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        run = trainer(tmp_path / folder, max_epochs=epochs, check_val_every_n_epoch=every)
        run.fit(detector(), images(product, num_workers=workers), ckpt_path=ckpt_path, weights_only=True)
        return state(tmp_path / folder)

    fit("begun", every)
    assert same(fit("resumed", every + 2, tmp_path / "begun/log/checkpoints/last.ckpt"), fit("whole", every + 2))


class Interrupt(Callback):
    """Ctrl-C after the first batch of an epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fit_goes_on_in_the_middle_of_an_epoch_where_it_was_interrupted(workers, product, tmp_path):
    def fit(folder: str, ckpt_path: Path | None = None, *callbacks: Callback) -> dict[str, torch.Tensor]:
        run = trainer(tmp_path / folder, max_epochs=3, check_val_every_n_epoch=3)
        run.callbacks[:0] = callbacks
        data = images(product, num_workers=workers, batch_size=4)
        run.fit(detector(), data, ckpt_path=ckpt_path, weights_only=True)
        return state(tmp_path / folder)

    with pytest.raises(SystemExit):
        fit("interrupted", None, Interrupt())
    last = tmp_path / "interrupted/log/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert same(fit("resumed", last), fit("whole"))


class Descent(PatchDetector):
    """Gives its optimizer a rate of its own."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.125)


@pytest.mark.parametrize("given, rates", [({}, (3e-4, 0.125)), ({"learning_rate": 0.25}, (0.25, 0.25))])
def test_a_fit_that_goes_on_keeps_the_optimizers_rate_unless_another_is_given(given, rates, product, tmp_path):
    for kind, rate in zip((PatchDetector, Descent), rates, strict=True):
        path = tmp_path / kind.__name__
        learning = partial(Learning, losses=[RelativeSimilarity()])
        settings = {"patch_encoder": LearnedEncoder, "bank": partial(MemoryBank, max_vectors=100)}
        trainer(path, max_epochs=1).fit(kind(EfficientNetLite0(), **settings, learning=learning), images(product))
        goes_on, last = trainer(path / "again", max_epochs=2), path / "log/checkpoints/last.ckpt"
        again = kind(EfficientNetLite0(), **settings, learning=partial(learning, **given))
        goes_on.fit(again, images(product), ckpt_path=last, weights_only=True)
        assert goes_on.optimizers[0].param_groups[0]["lr"] == rate


def test_where_nothing_is_learned_a_fit_takes_no_step(product, tmp_path):
    model = PatchDetector(EfficientNetLite0(), bank=partial(MemoryBank, max_vectors=100))
    assert not model.learns
    run = trainer(tmp_path, max_epochs=7)
    run.fit(model, images(product))
    assert run.global_step == run.current_epoch == 0 and len(state(tmp_path)["model.banks.16.vectors"]) == 100
    assert not any(parameter.requires_grad for parameter in model.parameters())
    run.validate(model, images(product), verbose=False)
    assert "val/detection_auroc" in run.callback_metrics


@pytest.mark.parametrize("size", [(60, 100), (64, 64), (130, 70)])
def test_images_of_any_size_that_holds_a_side_are_learned(size, product, tmp_path):
    data = images(product, image_size=size, keep_aspect=False, pyramids_per_image=4)
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.fit(detector(), data)
    assert run.callback_metrics["train/loss"].isfinite()


class Modes(Callback):
    """Holds that probing and remembering leave a backbone that learns as training left it."""

    def norm(self, pl_module) -> torch.nn.BatchNorm2d:
        return next(part for part in pl_module.modules() if isinstance(part, torch.nn.BatchNorm2d))

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = self.norm(pl_module).running_mean.clone()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            assert torch.equal(self.norm(pl_module).running_mean, self.before)
            assert self.norm(pl_module).training and pl_module.model.encoder.training

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained = self.norm(pl_module).running_mean.clone()

    def on_validation_end(self, trainer, pl_module):
        assert torch.equal(self.norm(pl_module).running_mean, self.trained)
        assert not torch.equal(self.before, self.trained)


@pytest.mark.parametrize("limit", [{}, {"limit_val_batches": 0}], ids=["before validations", "at the end"])
def test_what_is_probed_and_remembered_is_embedded_as_it_is_scored_and_trains_nothing(limit, product, tmp_path):
    learning = partial(Learning, losses=[RelativeSimilarity()], clusters=8, warmup=0.0)
    bank = partial(MemoryBank, max_vectors=None, baseline=0.0)
    model = PatchDetector(EfficientNetLite0(trainable="all"), LearnedEncoder, learning=learning, bank=bank)
    data = images(product, pyramids_per_image=4)
    modes = Modes()
    trainer(tmp_path, modes, max_epochs=2, check_val_every_n_epoch=1, **limit).fit(model, data)
    assert torch.equal(modes.norm(model).running_mean, modes.trained)
    batch = next(iter(data.normal_dataloader()))
    with torch.no_grad():
        embeddings = model.eval().model.embed(batch.image)[16].flatten(2).transpose(1, 2)
    memory = model.model.bank(16)
    for number in batch.number.tolist():
        held = memory.keys[:, 0] == number
        torch.testing.assert_close(memory.vectors[held], embeddings[number, memory.keys[held, 1]], rtol=1e-4, atol=1e-5)


def test_a_look_at_each_epoch_is_logged_and_changes_no_number(product, tmp_path):
    for name, callbacks in (("plain", []), ("watched", [LearningCurve(images=6), Dashboard()])):
        trainer(tmp_path / name, *callbacks).fit(detector(), images(product))
    assert same(state(tmp_path / "plain"), state(tmp_path / "watched"))
    rows = list(csv.DictReader((tmp_path / "watched/log/metrics.csv").read_text().splitlines()))
    for figure in ("detection", "segmentation"):
        curve = [float(row[name]) for row in rows if row[name := f"val/quick_{figure}_auroc"]]
        assert len(curve) == 3 and all(0 <= value <= 1 for value in curve)
