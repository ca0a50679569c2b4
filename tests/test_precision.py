import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_cli import LITE, SMALL, commands_in, here  # noqa: F401
from test_export import DEEP_SIDE, ONE_SIDE, Tiny, model, unchecked  # noqa: F401
from torch import nn

import patchad
from benchmarks import precisions
from patchad import PatchadError, PatchModel, PyramidDataModule, precision
from patchad.checkpoint import read_checkpoint
from patchad.cli import main
from patchad.export import TOLERANCE, export
from patchad.models import VGG16, EfficientNetLite0
from patchad.precision import Harm, Rounded, RoundedConvolution, Span, Spans, in_int8, reduce_backbone, run_by_runtime
from patchad.scoring import Scorer
from patchad.types import FittedImages

SIDES = "--model.sides=[32,16]"


def exit_code(*command: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*command])
    return stop.value.code


@pytest.fixture(scope="module")
def fitted(product, tmp_path_factory) -> Path:
    """A folder with a checkpoint of a fit from the command line, and its files in int8 and in float32."""
    folder = tmp_path_factory.mktemp("fitted")
    with commands_in(folder) as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        patch.setattr(precision, "LOST_AUROC", 10)  # of 12 images, one pair in other order is more than what is allowed
        patch.setattr(precision, "CHANGED", 0.2)
        main(["fit", f"--data.root={product}", *LITE, *SMALL, SIDES])
        shutil.copy("runs/version_0/checkpoints/last.ckpt", "last.ckpt")
        main(["export", "--ckpt_path=last.ckpt", "--output=exact.patchad"])
        main(["export", "--ckpt_path=last.ckpt", "--output=whole.patchad", "--precision=int8"])
        main(["export", "--ckpt_path=last.ckpt", "--output=again.patchad", "--precision=float32"])
    return folder


def test_a_file_in_int8_says_so_and_scores_without_torch(fitted):
    assert patchad.load(fitted / "whole.patchad").metadata["precision"] == "int8"
    program = (
        "import sys, numpy, patchad; patchad.load('whole.patchad')(numpy.zeros((50, 60), numpy.uint8));"
        "print([name for name in ('torch', 'pytorch_lightning', 'faiss') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", program], cwd=fitted, capture_output=True, text=True)
    assert finished.stdout.strip() == "[]", finished.stderr


def test_a_file_in_float32_is_the_same_bit_for_bit_and_says_so(fitted):
    assert (fitted / "exact.patchad").read_bytes() == (fitted / "again.patchad").read_bytes()
    assert patchad.load(fitted / "exact.patchad").metadata["precision"] == "float32"
    operators = {node.op_type for node in onnx.load(fitted / "exact.patchad").graph.node}
    assert not {"QuantizeLinear", "DequantizeLinear"} & operators


def test_the_banks_and_the_limits_of_a_file_in_int8_are_of_what_its_network_sees(fitted):
    """Where they were not, scores of normal images would be several times as high."""
    exact, whole = (patchad.load(fitted / f"{name}.patchad") for name in ("exact", "whole"))
    assert not np.array_equal(whole.normals, exact.normals)
    assert np.median(whole.normals) == pytest.approx(np.median(exact.normals), rel=0.3)


@pytest.mark.parametrize(("backbone", "sides"), [(EfficientNetLite0, {}), (Tiny, DEEP_SIDE), (VGG16, DEEP_SIDE)])
def test_the_runtime_multiplies_whole_numbers_and_scores_as_what_the_banks_were_filled_by(backbone, sides, tmp_path):
    made = model(backbone, **{"scorer": Scorer, **sides})
    images = torch.rand(4, 3, 96, 96)
    with torch.no_grad():
        reduce_backbone(made, images.split(1))
    reduced = [layer for layer in made.modules() if isinstance(layer, RoundedConvolution)]
    export(made, tmp_path / "whole.patchad", precision="int8")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(tmp_path / "whole.patchad"), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    read_by_a_side = len(set(made.encoder.tap_names.values())) if backbone is not EfficientNetLite0 else 0
    assert len(reduced) - read_by_a_side <= operators.count("QLinearConv") <= len(reduced)
    file = patchad.load(tmp_path / "whole.patchad")
    with run_by_runtime(made):
        for image in images:
            array = image.permute(1, 2, 0).numpy()
            assert file(array).score == pytest.approx(made.predict(array).score, rel=TOLERANCE)


def test_spans_are_of_what_convolutions_read_and_give_and_tell_which_a_rectifier_follows():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1), nn.Identity(), nn.SiLU())
    first, last = layers[0], layers[2]
    with torch.no_grad(), Spans() as spans:
        for image in (images := torch.rand(2, 1, 3, 8, 8)):
            layers(image)
    with torch.no_grad():
        given = last(nn.functional.relu6(first(images.flatten(0, 1))))
    assert spans.read[id(first.weight)] == (0, pytest.approx(float(images.max())))
    low, high = spans.given[id(last.weight)]
    assert low == pytest.approx(min(0, float(given.min())), abs=1e-6)
    assert high == pytest.approx(max(0, float(given.max())), abs=1e-6)
    assert spans.rectified == {id(first.weight)}


def test_what_is_rounded_is_off_by_half_a_step_at_most_and_0_by_nothing():
    values = torch.linspace(-1.5, 4, 1001)
    rounded = Rounded(Span(-1.5, 4))(values)
    assert (rounded - values).abs().max() <= 5.5 / 255 / 2 + 1e-2
    assert len(rounded.unique()) == 256
    assert Rounded(Span(-1.5, 4))(torch.zeros(1)) == 0 == Rounded(Span(0, 0))(torch.zeros(1))


def test_verify_shows_what_int8_moves(fitted, here, capsys):
    main(["verify", str(fitted / "whole.patchad"), f"--ckpt_path={fitted / 'last.ckpt'}", "--images=10"])
    told = capsys.readouterr().out
    differences = [line for line in told.splitlines() if line.endswith(("| same |", "| DIFFERENT |"))]
    changed = sum("DIFFERENT" in line for line in differences)
    assert len(differences) == 10
    assert re.search(rf"int8: {changed} of 10 verdicts differ from float32; scores by \d+\.\d% \(median\)", told)


def test_verify_tells_a_file_in_int8_of_another_checkpoint(fitted, here, capsys):
    checkpoint = torch.load(fitted / "last.ckpt", weights_only=True)
    checkpoint["patchad_updates"] = ["something"]
    patchad.checkpoint.save(checkpoint, here / "other.ckpt")
    assert exit_code("verify", str(fitted / "whole.patchad"), "--ckpt_path=other.ckpt", "--images=1") == 2
    assert "was exported from another checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("root", ["nowhere", "few", "more"])
def test_int8_without_the_normal_images_of_the_fit_is_refused_in_one_line(root, fitted, product, here, capsys):
    if root != "nowhere":
        shutil.copytree(product, here / root)
    images = here / root / "train/good"
    if root == "few":
        for path in sorted(images.iterdir())[:2]:
            path.unlink()
    if root == "more":
        shutil.copy(next(product.glob("test/good/*.png")), images / "other.png")
    command = ("export", f"--ckpt_path={fitted / 'last.ckpt'}", "--precision=int8", f"--data.root={root}")
    assert exit_code(*command) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("patchad: error: --precision int8 needs the 12 normal images that the detector knows, and ")
    words = {
        "nowhere": "nowhere is no folder: give theirs by --data.root",
        "few": "few lacks 2 of them: give theirs by --data.root",
        "more": "more has 13 to train on: take the others out of it",
    }
    assert last.endswith(words[root])
    assert not (here / "model.patchad").exists()


def test_int8_is_refused_of_a_network_to_which_it_does_harm(product, here, capsys, monkeypatch):
    """Eight bits that hold the loud channel hold nothing of the others."""
    state = dict(EfficientNetLite0(weights="none").imagenet())
    for name in state:
        if re.search(r"_bn2\.(weight|bias)", name):
            state[name] = torch.cat([3000 * state[name][:1], state[name][1:]])
    torch.save(state, "loud.pth")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    main(["fit", f"--data.root={product}", *LITE, *SMALL, SIDES, "--model.backbone.weights=loud.pth"])
    assert exit_code("export", "--ckpt_path=runs/version_0/checkpoints/last.ckpt", "--precision=int8") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"patchad: error: --precision int8 does harm: AUROC \d+\.\d\d %, in float32 \d+\.\d\d %; \d+ of 24 verdicts "
        r"differ, on normal images and painted defects; allowed are 0\.2 points and 0\.5%: leave it out",
        last,
    )
    assert not (here / "model.patchad").exists()


@pytest.mark.parametrize(
    ("harm", "refused"),
    [
        (Harm(99.81, 100.0, 0, 400), False),
        (Harm(99.79, 100.0, 0, 400), True),
        (Harm(100.0, 99.0, 2, 400), False),
        (Harm(100.0, 99.0, 3, 400), True),
    ],
)
def test_what_is_lost_of_the_auroc_and_how_many_verdicts_change_decides(harm, refused):
    if not refused:
        return harm.check()
    with pytest.raises(PatchadError, match="--precision int8 does harm"):
        harm.check()


def test_the_model_itself_stays_in_float32(fitted, product):
    made, data = PatchModel.load(fitted / "last.ckpt"), PyramidDataModule(product, image_size=96, num_workers=0)
    before = {name: values.clone() for name, values in made.state_dict().items()}
    digests = FittedImages(**read_checkpoint(fitted / "last.ckpt")["patchad_fitted"])
    in_int8(made, data, digests)
    assert before.keys() == made.state_dict().keys()
    assert all(torch.equal(values, made.state_dict()[name]) for name, values in before.items())


def test_the_table_of_precisions_has_what_is_refused_and_goes_on_where_it_ended(fitted, here, capsys, monkeypatch):
    monkeypatch.setattr(logging.root.manager, "disable", logging.root.manager.disable)
    precisions.main({"product": fitted / "last.ckpt"}, Path("files"), repeats=1, results=Path("precisions.csv"))
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| product")]
    assert [row[1] for row in table] == ["float32", "int8"]
    assert [row[4] for row in table] == ["0 of 11", table[1][4]] and table[1][4].endswith(" of 11")
    assert table[0][-1] == "written |" and table[1][-1] in ("written |", "refused |")
    assert list(Path("files").iterdir()) == []
    monkeypatch.setattr(precisions, "measured", lambda *_: pytest.fail("it was measured already"))
    precisions.main({"product": fitted / "last.ckpt"}, results=Path("precisions.csv"))
    assert [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]] == table


def test_a_model_without_banks_is_refused(product):
    from patchad.peers import PaDiM

    padim = PaDiM(EfficientNetLite0(weights="none")).model
    with pytest.raises(PatchadError, match=r"int8: \w+ has no banks to fill anew; leave it out"):
        in_int8(padim, PyramidDataModule(product), FittedImages())


def test_a_network_whose_only_convolution_reads_the_image_itself_is_refused():
    with pytest.raises(PatchadError, match="--precision int8: Tiny has no convolution that it fits"):
        reduce_backbone(model(Tiny, **ONE_SIDE), [torch.rand(1, 3, 96, 96)])


def test_an_output_that_cannot_be_written_is_told_before_the_work(fitted, here, capsys, monkeypatch):
    monkeypatch.setattr("patchad.commands.in_int8", lambda *_: pytest.fail("it was worked for nothing"))
    os.mkdir("folder")
    command = ("export", f"--ckpt_path={fitted / 'last.ckpt'}", "--precision=int8", "--output=folder")
    assert exit_code(*command) == 2
    assert "folder is a folder; give a file" in capsys.readouterr().err
