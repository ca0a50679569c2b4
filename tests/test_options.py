"""Options that make no sense: one line that names the option, exit code 2, and no run folder."""

import math
import os
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from test_cli import LITE, SMALL, here  # noqa: F401

from patchad import Learning, PatchadError, PatchDetector, PatchModel, PyramidDataModule
from patchad.callbacks import AnomalyMaps, Clusters, Report
from patchad.cli import main
from patchad.data import Folder, MagneticTile, Synthetic
from patchad.errors import check_range
from patchad.losses import Position, Separation
from patchad.memory import MemoryBank
from patchad.models import EfficientNetLite0, FeatureCache, LearnedEncoder
from patchad.scoring import Scorer

MODEL = partial(PatchModel, EfficientNetLite0(weights="none"))
LEARN = partial(PatchDetector, EfficientNetLite0(weights="none"), LearnedEncoder)


def learning(**options):
    return LEARN(learning=partial(Learning, losses=[Position()], **options))


NUMBERS = [
    *((lambda number=number: Scorer((16,), smoothing=number), "smoothing") for number in (math.nan, math.inf, -1.0)),
    *((lambda number=number: Scorer((16,), target_fpr=number), "target_fpr") for number in (math.nan, 0.0, 1.5)),
    (lambda: Scorer((16,), top_fraction=math.nan), "top_fraction"),
    *((lambda number=number: MemoryBank(16, baseline=number), "baseline") for number in (math.nan, math.inf, -0.5)),
    (lambda: MemoryBank(16, max_vectors=0), "max_vectors"),
    (lambda: MemoryBank(16, seed=-1), "seed"),
    (lambda: learning(clusters=-1), "clusters"),
    *((lambda number=number: learning(warmup=number), "warmup") for number in (math.nan, -1.0, 1.5)),
    *((lambda number=number: learning(learning_rate=number), "learning_rate") for number in (math.nan, -0.1, 1e10)),
    (lambda: learning(seed=-1), "seed"),
    *((lambda number=number: Position(weight=number), "weight of Position") for number in (math.nan, math.inf, -1.0)),
    (lambda: Separation(least_share=math.nan), "least_share"),
    (lambda: FeatureCache("x", max_gigabytes=math.nan), "max_gigabytes"),
    (lambda: FeatureCache("x", views=0), "views"),
    (lambda: MODEL(sides=()), "sides"),
    (lambda: MODEL(sides=(64, 64)), "sides"),
    (lambda: MODEL(sides=(0,)), "side"),
    (lambda: MODEL(sides=(-16,)), "side"),
    (lambda: MODEL(sides=(64,), scoring_strides={64: 0}), "scoring stride of side 64"),
    (lambda: MODEL(sides=(64,), scoring_strides={64: -16}), "scoring stride of side 64"),
    (lambda: MODEL(tile=0), "tile"),
    (lambda: Folder(test_fraction=math.nan), "test_fraction"),
    (lambda: Folder(test_fraction=2.0), "test_fraction"),
    (lambda: MagneticTile(seed=-1), "seed"),
    (lambda: Synthetic(train=-1), "train"),
    (lambda: Report(images_per_defect=-1), "images_per_defect"),
    (lambda: Clusters(clusters=0), "clusters"),
    (lambda: AnomalyMaps(images=0), "images"),
    *(
        (lambda name=name, value=value: PyramidDataModule("x", **{name: value}), name)
        for name, values in {
            "image_size": [(100_000, 100_000), (0, 64), (64, -1), 0],
            "metric_size": [(60_000, 60_000), 0],
            "num_workers": [-1, 10**6],
            "seed": [-1],
            "batch_size": [0],
            "pyramids_per_image": [0, 10**9],
            "brightness": [math.nan, math.inf, 0.0],
            "noise_deviation": [math.nan, math.inf, -1.0],
            "colour_deviation": [math.nan],
            "held_out_fraction": [math.nan, -0.1, 1.0],
            "shift": [-1, 3],
            "max_megapixels": [math.nan, 0.0, math.inf],
        }.items()
        for value in values
    ),
]


@pytest.mark.parametrize(("make", "name"), NUMBERS)
def test_a_number_that_makes_no_sense_is_refused_by_its_name(make, name):
    with pytest.raises(PatchadError, match=rf"{name}.* must (be at least|lie above|be one or more)"):
        make()


def test_a_range_holds_its_ends_unless_numbers_must_lie_above():
    check_range({"a": 0, "b": 1.0, "c": None}, 0, 1)
    check_range({"a": 1}, 0, 1, above=True)
    for low, high, above in ((0.1, 1, False), (0, 1, True), (-1, -0.5, False)):
        with pytest.raises(PatchadError, match="a 0 must"):
            check_range({"a": 0}, low, high, above)


def test_one_number_is_both_sides_of_a_size():
    data = PyramidDataModule("x", image_size=256, metric_size=(64, 32))
    assert data.image_size == (256, 256) and data.hparams["image_size"] == [256, 256]
    assert data.metric_size == (64, 32)


CORES = os.cpu_count() or 1
OPTIONS = {
    "--data.image_size=[256]": r"--data\.image_size: ",
    "--data.image_size=large": r"--data\.image_size: expected tuple; or expected int, not large$",
    "--data.image_size=512,512": r"--data\.image_size: .*, not 512,512; give \"\[512,512\]\"$",
    "--data.image_size=512x256": r"--data\.image_size: .*, not 512x256; give \"\[512,256\]\"$",
    "--data.batch_size=2,5": r"--data\.batch_size: expected int, not 2,5$",
    "--data.batch_size=2.5": r"--data\.batch_size: expected int, not 2\.5$",
    "--data.root=": r"no images: give --data\.root",
    "--model.mode=x": r"--model\.mode: expected Literal\['dense', 'sliding'\], not x$",
    "--model.bank.baseline=abc": r"--model\.bank\.baseline: expected float, not abc$",
    "--model.bank.baseline=.nan": r"baseline nan must be at least 0",
    "--model.bank.nonsense=1": r"--model\.bank: Option 'nonsense' is not accepted",
    "--model.bank.seed=99999999999": r"seed 99999999999 must be at least 0 and at most",
    "--ckpt_path=best": r"ModelCheckpoint. is not configured to save the best model",
    "--model.backbone=NoSuch": r"--model\.backbone: .*NoSuch",
    "--nonsense=1": r"unrecognized arguments: --nonsense=1",
    "--trainer.max_epoch=3": r"unrecognized arguments: --trainer\.max_epoch=3",
    "--seed_everything=-1": r"--seed_everything -1 must be at least 0",
    "--trainer.accelerator=quantum": r"--trainer: .*quantum",
    "--trainer.accelerator=cuda": r"CUDAAccelerator",
    "--trainer.devices=-7": r"--trainer: .*devices",
    f"--trainer.devices={CORES + 1}": rf"--trainer\.devices {CORES + 1} starts .* give at most {CORES}$",
    "--trainer.devices=[5] --trainer.accelerator=gpu": r"--trainer: .*gpu",
    "--trainer.precision=3": r"--trainer\.precision: expected .*'bf16-mixed'.*, not 3$",
    "--trainer.strategy=nonsense": r"--trainer: .*strategy='nonsense'",
    "--trainer.strategy=fsdp": r"--trainer: .*`fsdp` requires a GPU",
    "--trainer.strategy=ddp_fork": r"--trainer\.strategy ddp_fork loses .* give ddp$",
    "--trainer.overfit_batches=1": r"--trainer\.overfit_batches 1: .* give --trainer\.limit_train_batches$",
    "--trainer.barebones=true": r"--trainer\.barebones True: .* leave it out$",
    "--trainer.enable_checkpointing=false": r"--trainer: .*`enable_checkpointing=False`.*callbacks",
    "--trainer.check_val_every_n_epoch=0": r"--trainer\.check_val_every_n_epoch 0 must be at least 1",
    "--trainer.accumulate_grad_batches=0": r"--trainer\.accumulate_grad_batches 0 must be at least 1",
    "--trainer.limit_train_batches=-1": r"invalid value -1 for limit_train_batches",
    "--trainer.max_time=soon": r"Timer\(duration='soon'\)",
    "--trainer.logger=CometLogger": r"[Cc]omet",
    "--ckpt_path=": r"--ckpt_path is empty",
}
CONFIGS = {
    "a tab": (b"model:\n\ta: 1\n", r"--config own\.yaml is no YAML: .*line 2"),
    "nothing": (b"", r"--config own\.yaml holds None; give settings"),
    "a number": (b"42\n", r"--config own\.yaml holds 42; give settings"),
    "bytes": (b"\x80\x81\xff", r"--config own\.yaml is no YAML"),
    "an unknown key": (b"modell: {a: 1}\n", r"'fit' does not accept option 'modell\.a'"),
    "an unknown key without options": (b"modell: {}\n", r"--config own\.yaml has modell, which is no option"),
    "a variable that is not set": (b"data: {init_args: {root: '${oc.env:NOT_SET_HERE}'}}", r"NOT_SET_HERE"),
    "a loop": (
        b"data: {init_args: {root: '${data.init_args.root}'}}",
        r"Recursive interpolation .*init_args\.root",
    ),
    "a scheduler alone": (
        b"lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1}}",
        r"--lr_scheduler has nothing to steer: give --optimizer",
    ),
}


def refused(capsys, *command: str) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        main([*command])
    assert stop.value.code == 2 and not Path("runs").exists()
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0].startswith("patchad: error: ")
    return errors[0]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_refused_ends_in_one_line(option, here, product, capsys):
    names = {given.partition("=")[0] for given in option.split()}
    known = [given for given in SMALL if given.partition("=")[0] not in names]
    assert re.search(OPTIONS[option], refused(capsys, "fit", f"--data.root={product}", *LITE, *known, *option.split()))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_is_refused_ends_in_one_line(kind, here, product, capsys):
    content, words = CONFIGS[kind]
    (here / "own.yaml").write_bytes(content)
    root = [] if b"root" in content else [f"--data.root={product}"]
    assert re.search(words, refused(capsys, "fit", "--config=own.yaml", *root, *SMALL))


def test_a_command_that_is_not_there_ends_in_one_line(here, capsys):
    assert "invalid choice: 'fitt'" in refused(capsys, "fitt")
    assert "subcommand" in refused(capsys)


@pytest.mark.parametrize("verb", ["validate", "test", "predict", "export", "verify", "benchmark"])
def test_a_verb_without_a_checkpoint_says_what_to_give(verb, here, capsys):
    assert refused(capsys, verb).endswith("no detector: give --ckpt_path, the checkpoint that patchad fit wrote")


def test_a_number_for_a_size_reaches_the_config(here, product, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--data.root={product}", "--data.image_size=256", "--data.metric_size", "64", "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["image_size"] == 256
