"""Limits and normal images are changed after a fit, and nothing else is."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import patchad
from patchad import PatchadError, PatchModel
from patchad.checkpoint import checksum, read_checkpoint
from patchad.cli import main
from patchad.images import on_canvas, read_image
from patchad.revision import add_normals, rate_that_finds, read_images
from patchad.scoring import Scorer
from tests.test_cli import LITE, SMALL, commands_in
from tests.test_module import bank, detector, halves, images, trainer  # noqa: F401

LAST = "runs/fit/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def fitted(product, tmp_path_factory) -> Path:
    """A fit of the first nine training images; the other three lie in `more`."""
    folder = tmp_path_factory.mktemp("fitted")
    shutil.copytree(product, folder / "part")
    (folder / "more").mkdir()
    for image in sorted((folder / "part/train/good").iterdir())[9:]:
        image.rename(folder / "more" / image.name)
    with commands_in(folder):
        main(["fit", "--data.root=part", "--model.mirrored=false", *LITE, *SMALL, "--trainer.logger.version=fit"])
    return folder


@pytest.fixture
def here(fitted):
    with commands_in(fitted):
        yield fitted


def update(*options: str, output: str = "new.ckpt", ckpt_path: str = LAST) -> dict:
    main(["update", f"--ckpt_path={ckpt_path}", f"--output={output}", *options, "--trainer.enable_progress_bar=false"])
    return read_checkpoint(Path(output))


def changed(before: dict, after: dict) -> set[str]:
    """The names of tensors that differ."""
    first, second = before["state_dict"], after["state_dict"]
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_all_patches_of_what_is_added_lie_in_the_banks_and_nothing_else_changes(here, product):
    before, after = read_checkpoint(Path(LAST)), update("--normal=more")
    kinds = {f"model.banks.{side}.{name}" for side in (64, 32, 16) for name in ("vectors", "keys", "things", "levels")}
    assert changed(before, after) <= kinds | {"model.scorer.normals", "model.scorer.peaks"}
    earlier, model = PatchModel.load(LAST), PatchModel.load("new.ckpt")
    assert len(earlier.bank(16)) == 500 and len(model.bank(16)) == 500 + 3 * 121  # it was full
    data = patchad.PyramidDataModule(product, image_size=96, metric_size=96, num_workers=0)
    data.setup("fit")
    batches = [batch for batch in data.normal_dataloader() if batch.number.max() > 8]
    for side in (64, 32, 16):
        held, there = model.bank(side), earlier.bank(side)
        assert torch.equal(held.vectors[: len(there)], there.vectors) and torch.equal(
            held.levels[: len(there)], there.levels
        )
        embedded = torch.cat([model.embed(batch.image)[side][batch.number > 8] for batch in batches])
        added = held.vectors[len(there) :]
        torch.testing.assert_close(added, embedded.flatten(2).transpose(1, 2).flatten(0, 1))
        for vector, level in zip(added, held.levels[len(there) :], strict=True):
            nearest = (there.vectors - vector).square().sum(1) - there.baseline * there.levels.square()
            assert level == there.levels[nearest.argmin()]
    assert torch.equal(model.scorer.normals[:9], before["state_dict"]["model.scorer.normals"])
    expected = [model(batch.image, batch.content, batch.thing).score[batch.number > 8] for batch in batches]
    torch.testing.assert_close(model.scorer.normals[9:], torch.cat(expected))
    assert after["patchad_fitted"]["added"] == [False] * 9 + [True] * 3
    assert "added 3 normal images, which no encoder saw" in after["patchad_updates"][0]


def test_no_score_is_higher_where_normal_images_were_added(here):
    """Levels stay, so that a larger bank holds nothing farther; the kept scores still bound those of normal images."""
    update("--normal=more")
    before, after = PatchModel.load(LAST), PatchModel.load("new.ckpt")
    lower = 0
    for path in sorted(Path("part").glob("t*/*/*.png")):
        first, second = before.predict(path), after.predict(path)
        assert second.score <= first.score * (1 + 1e-6)
        lower += second.score < first.score
    assert lower > 3


def test_where_mirrors_fill_the_banks_those_of_an_added_image_do_too(halves, tmp_path):
    model, data = detector(bank=bank(max_vectors=None), mirrored=True), images(halves)
    trainer(tmp_path).fit(model, data)
    held, count = model.model.bank(16), len(model.model.bank(16))
    path = min((halves / "test").glob("*/*.png"))
    fitted = add_normals(model.model.eval(), read_images(path, data), model.fitted)
    (thing,) = set(fitted.things) - set(model.fitted.things)
    assert len(held) == count + 2 * (count // (2 * len(model.fitted.things)))
    numbers = held.keys[held.things == thing][:, 0].unique()
    assert len(numbers) == 2 and numbers.min() == 2 * len(model.fitted.things)
    image = on_canvas(read_image(path), data.canvas)[0][None]
    upside_down = model.model.embed(image.flip(2))[16].flatten(2).transpose(1, 2)[0]
    copies = held.keys[:, 0] == numbers.max()
    torch.testing.assert_close(held.vectors[copies], upside_down[held.keys[copies, 1]])


def test_what_was_added_can_be_taken_out_again(here):
    update("--normal=more", output="larger.ckpt")
    before, after = read_checkpoint(Path(LAST)), update("--remove=more", ckpt_path="larger.ckpt")
    held = PatchModel.load("new.ckpt")
    assert not changed(before, after)
    assert len(held.bank(16)) == 500
    assert after["patchad_fitted"] == before["patchad_fitted"]
    assert len(after["patchad_updates"]) == 2


def test_a_false_alarm_that_is_added_is_one_no_longer(here, capsys):
    alarm = "part/test/dent"  # as if these were normal
    after = update(f"--normal={alarm}")
    printed = capsys.readouterr().out
    count = len(list(Path(alarm).iterdir()))
    assert f"{count} normal images of {alarm}, each compared with the others: {count} anomalous before" in printed
    scores = after["state_dict"]["model.scorer.normals"]
    assert len(scores) == 9 + count
    model = PatchModel.load("new.ckpt")
    assert not any(model.predict(path).anomalous for path in Path(alarm).iterdir())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "nothing to update: give --normal, --remove or --defects"),
        (["--normal=part/train/good"], r"part/train/good/000\.png is already among the normal images"),
        (["--normal=twice"], r"twice/b\.png is already among"),
        (["--remove=more"], r"more/009\.png is not among the normal images"),
        (["--remove=part/train/good"], "fewer than two normal images would be left"),
        (["--normal=nowhere"], "nowhere does not exist"),
        (["--normal=broken.png"], r"1 of 1 images cannot be read, nothing was changed: .*broken\.png"),
        (["--defects=part/train/good"], "no higher than any normal image: no threshold finds it"),
    ],
)
def test_what_cannot_be_changed_is_refused_and_nothing_is_written(options, complaint, here, capsys):
    Path("twice").mkdir(exist_ok=True)
    for name in "ab":
        shutil.copy("more/009.png", f"twice/{name}.png")
    Path("broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        update(*options, output="refused.ckpt")
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("patchad: error:")]
    assert re.search(complaint, line)
    assert not Path("refused.ckpt").exists()


@pytest.mark.parametrize("seed", range(5))
def test_the_rate_that_finds_defects_is_the_least_that_does(seed):
    generator, scorer = np.random.default_rng(seed), Scorer((16,))
    normals = torch.from_numpy(generator.random(40).astype(np.float32))
    defects = torch.from_numpy((0.5 + generator.random(6)).astype(np.float32))
    scorer.set_limits(normals, normals)
    scorer.target_fpr = rate_that_finds(scorer, defects)
    scorer.set_limits(normals, normals)
    assert (defects > scorer.threshold).all()
    scorer.target_fpr -= 1 / 41
    if scorer.target_fpr > 1e-6:
        scorer.set_limits(normals, normals)
        assert not (defects > scorer.threshold).all()


def test_known_defects_set_the_threshold_that_finds_them_and_the_price_is_named(here, capsys):
    model = PatchModel.load(LAST)
    missed = [path for path in sorted(Path("part/test").glob("*/*.png")) if not model.predict(path).anomalous]
    scores = {path: model.predict(path) for path in missed}
    path = max(scores, key=lambda path: scores[path].score)  # what is missed by the least
    assert scores[path].p_value < 1
    update(f"--defects={path}")
    found = PatchModel.load("new.ckpt")
    assert found.predict(path).anomalous
    alarms = int((model.scorer.normals > found.scorer.threshold).sum())
    assert f"{alarms} of 9 normal images are false alarms, not 0" in capsys.readouterr().out
    assert found.scorer.target_fpr == pytest.approx(scores[path].p_value)


def test_another_rate_goes_with_the_checkpoint_and_names_what_is_out_of_date(here, capsys):
    main(["export", f"--ckpt_path={LAST}", "--output=old.patchad", "--trainer.enable_progress_bar=false"])
    rates = ["--target_fpr=0.2", "--review_fpr=0.4"]
    main(["threshold", f"--ckpt_path={LAST}", "--output=new.ckpt", *rates, "--trainer.enable_progress_bar=false"])
    printed = capsys.readouterr().out
    assert f"out of date: {Path('old.patchad').resolve()}" in printed
    before, after = PatchModel.load(LAST).scorer, PatchModel.load("new.ckpt").scorer
    file = patchad.load("old.patchad")
    assert file.set_target_fpr(0.2, 0.4) == pytest.approx(0.2)
    assert after.limits == pytest.approx(file.limits)
    assert f"| threshold | {before.limits.threshold:.4g} | {after.limits.threshold:.4g} |" in printed
    assert not changed(read_checkpoint(Path(LAST)), read_checkpoint(Path("new.ckpt")))
    main(["export", "--ckpt_path=new.ckpt", "--output=newer.patchad", "--trainer.enable_progress_bar=false"])
    newer = patchad.load("newer.patchad")
    assert newer.limits == pytest.approx(after.limits)
    assert newer.metadata["checkpoint"]["sha256"] == checksum(Path("new.ckpt"))
    assert "target_fpr 0.2, not 0.05" in newer.metadata["updates"][0]
    main(["threshold", f"--ckpt_path={LAST}", "--output=same.ckpt", "--target_fpr=0.05"])
    for other, said in (
        ("new.ckpt", "has the threshold"),
        ("same.ckpt", "was exported from another checkpoint (last.ck"),
    ):
        with pytest.raises(SystemExit):
            main(["verify", "old.patchad", f"--ckpt_path={other}", "--data.root=more"])
        assert f"old.patchad {said}" in capsys.readouterr().err


def test_rates_that_are_none_are_refused(here, capsys):
    for rates in (["--target_fpr=2"], ["--target_fpr=0.2", "--review_fpr=0.1"]):
        with pytest.raises(SystemExit):
            main(["threshold", f"--ckpt_path={LAST}", "--output=refused.ckpt", *rates])
        assert "_fpr" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("refused.ckpt").exists()
    with pytest.raises(PatchadError, match=r"review_fpr 0\.1 must lie above target_fpr 0\.2"):
        Scorer((16,), target_fpr=0.2, review_fpr=0.1)
