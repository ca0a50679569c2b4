"""What the paper's configuration has alone: patches on their own, pyramids of mixed images, all images learned from."""

from functools import partial

import jaxtyping
import pytest
import torch
from pytorch_lightning import Trainer, seed_everything
from test_export import Tiny

from patchad import Learning, PatchDetector, PyramidDataModule
from patchad.cli import main
from patchad.errors import PatchadError
from patchad.models import LearnedEncoder
from patchad.models.features import ResidentImages
from patchad.nearest import search, search_index

SIDES = (32, 16)


def detector(**learning) -> PatchDetector:
    seed_everything(0, verbose=False)
    return PatchDetector(
        Tiny(weights="none", trainable="all"),
        partial(LearnedEncoder, shortcut=False),
        mode="sliding",
        sides=SIDES,
        scoring_strides={32: 16, 16: 8},
        subtract_mean_image=True,
        learning=partial(Learning, **{"clusters": 5, "warmup": 0.0, **learning}),
    )


def images(root, **settings) -> PyramidDataModule:
    mixed = {"batch_size": 8, "pyramids_per_image": 1, "draws_per_epoch": 3, "held_out_fraction": 0.0, "shift": 0}
    still = {"image_size": (96, 96), "metric_size": (96, 96), "num_workers": 0, "validate_on": "none"}
    return PyramidDataModule(root, **{**still, **mixed, **settings})


def begun(root, steps: int = 1, learning_rate: float = 1e-4, **settings) -> tuple[PatchDetector, PyramidDataModule]:
    """A detector after its first steps."""
    model, data = detector(learning_rate=learning_rate), images(root, **settings)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_steps=steps, accelerator="cpu", limit_val_batches=0, deterministic=True, **quiet).fit(model, data)
    return model, data


def test_all_patches_of_a_side_are_cut_from_the_images_and_encoded_each_on_its_own(product):
    model, data = begun(product)
    features, batch = model.learning.features, next(iter(data.train_dataloader()))
    assert isinstance(features, ResidentImages) and not batch.image.numel()
    read = features.read(batch, (0,))
    with torch.no_grad():
        for side, *patches, held in features.embedded_pyramids(read, batch):
            pyramid = batch.sides[side]
            for name, embedded in zip(("anchor", "near", "far", "neighbour"), patches, strict=True):
                for row, number in enumerate(batch.number.tolist()):
                    top, left = (pyramid.window[row] + getattr(pyramid, name)[row, 0]).tolist()
                    image = model.model.encoder.prepare(data.train_set[number].image[None])
                    patch = image[:, :, top : top + side, left : left + side]
                    expected = model.model.encoder.encode(side, patch)
                    torch.testing.assert_close(embedded[row], expected, rtol=1e-4, atol=1e-5)
            assert held is None


def test_each_patch_has_colour_and_noise_of_its_own_that_its_turn_decides(product):
    model, data = begun(product, colour_deviation=0.1, noise_deviation=0.02, draws_per_epoch=20, batch_size=240)
    features, batch = model.learning.features, next(iter(data.train_dataloader()))
    plain, first, again, second = [], *(features.read(batch, turn) for turn in ((0, 1), (0, 1), (0, 2)))
    features.augmentations = features.augmentations._replace(colour=0.0, noise=0.0)
    plain = features.read(batch, (0, 1))
    for side in SIDES:
        assert torch.equal(first[side], again[side]) and not torch.equal(first[side], second[side])
        added = (first[side] - plain[side]) / model.model.encoder.backbone.input_deviation
        colour = added.mean((-2, -1))
        assert colour.std().item() == pytest.approx(0.1, rel=0.1)
        assert (added - colour[..., None, None]).std().item() == pytest.approx(0.02, rel=0.05)
        assert colour.flatten(0, 2).unique(dim=0).shape[0] == first[side].shape[:3].numel()


def test_a_batch_mixes_images_and_an_epoch_draws_each_as_often_as_it_is_told(product):
    data = images(product)
    data.prepare_data()
    data.setup("fit")
    data.plan = data.plan._replace(grids=dict.fromkeys(SIDES, 1), resident=True)
    batches = list(data.train_dataloader())
    numbers = torch.cat([batch.number for batch in batches])
    assert torch.bincount(numbers).tolist() == [3] * 12
    assert len(batches[0].number.unique()) > 4
    anchors = torch.cat([batch.sides[16].window + batch.sides[16].anchor[:, 0] for batch in batches])
    of_first = anchors[numbers == 0]
    assert len(of_first.unique(dim=0)) == 3  # drawn anew each time
    assert sum(len(batch.number) for batch in data.probe_dataloader()) == 36


def test_a_pseudo_label_is_that_of_the_epochs_beginning_whatever_was_learned_since(product):
    model, data = begun(product, steps=3, learning_rate=0.05)
    learning, batch = model.learning, next(iter(data.train_dataloader()))
    read = learning.features.read(batch, (7,))
    views = {views.side: views for views in learning.patch_views(read, batch)}
    for side in SIDES:
        clusters = learning._clusters(side)
        with torch.no_grad():
            at_the_beginning = learning.held.encode(side, read[side][0].flatten(0, 1))
        nearest = search(search_index(clusters.centroids), at_the_beginning, 1)[:, 0]
        assert torch.equal(views[side].label, nearest)
        assert not torch.allclose(views[side].anchor, at_the_beginning, atol=0.01)


def test_labels_are_held_where_the_backbone_learns_in_one_pass_over_the_image(product):
    """In dense mode: what the held encoder reads comes of its own backbone."""
    seed_everything(0, verbose=False)
    backbone = Tiny(weights="none", trainable="all")
    learning = partial(Learning, clusters=5, warmup=0.0)
    model = PatchDetector(backbone, partial(LearnedEncoder, shortcut=False), sides=(16,), learning=learning)
    data = images(product, batch_size=4, pyramids_per_image=2, draws_per_epoch=1)
    data.prepare_data()
    data.setup("fit")
    data.plan = model.learning.plan
    batch = next(iter(data.train_dataloader()))
    read = model.learning.features.read(batch, (0,))
    (before,) = model.learning.features.embedded_pyramids(read, batch, model.learning.held)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.1)
    read = model.learning.features.read(batch, (0,))
    (after,) = model.learning.features.embedded_pyramids(read, batch, model.learning.held)
    assert torch.equal(before.held, after.held) and not torch.allclose(before.anchor, after.anchor)


def test_a_step_is_one_graph_with_the_same_loss_and_gradients(product, monkeypatch):
    model, data = begun(product)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes cannot be compiled
    batch = next(iter(data.train_dataloader()))
    read = model.learning.features.read(batch, (7,))
    gradients = []
    for step in (model._losses, torch.compile(model._losses, backend="aot_eager", fullgraph=True, dynamic=False)):
        model.zero_grad()
        loss, watched = step(read, batch)
        loss.backward()
        gradients.append(
            [loss.detach(), *watched.values(), *(p.grad for p in model.parameters() if p.grad is not None)]
        )
    torch.testing.assert_close(gradients[0], gradients[1])


def test_no_image_is_held_out_where_none_shall_be(product):
    model, data = begun(product)
    assert len(data.train_set) == 12 and not data.held_out.any()
    assert len(model.scorer.normals) == 12 and float(model.scorer.threshold) > 0
    with pytest.raises(PatchadError, match="held_out_fraction 0 leaves no images that validation could paint"):
        images(product, validate_on="synthetic_defects").setup("fit")


def test_the_papers_configuration_fits_tests_and_sums_maps_as_they_are(product, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("patchad.learning.COLLAPSED", 0.0)  # random weights hardly tell patches apart
    options = ["--data.image_size=96", "--data.num_workers=0", "--data.draws_per_epoch=1", "--data.batch_size=6"]
    options += ["--model.sides=[32]", "--model.taps={32: relu2}", "--model.scoring_strides={32: 16}"]
    backbone = ["--model.backbone=AlexNet", "--model.backbone.weights=none", "--model.learning.clusters=4"]
    main(["fit", "--config=paper", f"--data.root={product}", *backbone, *options, "--trainer.max_epochs=2"])
    main(["test", "--ckpt_path=runs/version_0/checkpoints/last.ckpt"])
    checkpoint = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    model = PatchDetector.load_from_checkpoint("runs/version_0/checkpoints/last.ckpt").model.eval()
    assert not len(model.bank(32).lists) and model.scorer.scale[0] != 1
    prediction = model(torch.rand(1, 3, 96, 96))
    torch.testing.assert_close(prediction.map, prediction.side_maps[32])
