import csv
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from scored import scored
from test_cli import LITE, SMALL, commands_in, here  # noqa: F401
from torch import nn

import patchad
from patchad import PatchadError, PatchModel
from patchad.canvas import Canvas
from patchad.checkpoint import checksum, save
from patchad.cli import main
from patchad.export import TOLERANCE, export
from patchad.images import on_canvas, read_image
from patchad.memory import MemoryBank
from patchad.models import (
    VGG16,
    VGG19,
    AlexNet,
    EfficientNetLite0,
    LearnedEncoder,
    MobileNetV2,
    ResNet18,
    ResNet50,
    TextureEncoder,
    Timm,
    WindowEncoder,
)
from patchad.models.backbones import Backbone, Tap
from patchad.pyramid import crop_resize
from patchad.runtime import ExportedDetector
from patchad.runtime import on_canvas as array_on_canvas
from patchad.scoring import Scorer


class Tiny(Backbone):
    """Two convolutions, for whatever does not depend on the network: exporting a real one takes ten times as long."""

    taps: ClassVar = {"early": Tap(1, 4, 12), "deep": Tap(3, 8, 24)}
    side_taps: ClassVar = {32: "deep", 16: "early"}

    def build(self):
        return nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU())

    def imagenet(self):
        raise NotImplementedError


PAPER_TAPS = {32: "relu3_3"}
"""Random weights of VGG's deeper layers hardly tell patches apart, and standardising them would magnify rounding."""


@pytest.fixture(autouse=True)
def unchecked():
    """Shapes of tensors that the exporter traces are symbols, which would be pinned by checking them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PRODUCT = partial(Scorer, combination="product", smoothing=4.0)


SAME = 1e-5
"""Most by which scores and maps may differ where nothing differs but what else is computed."""
ONE_SIDE = {"sides": (16,)}
"""For what is the same on each side: half of a graph is exported in half of the time."""
DEEP_SIDE = {"sides": (32,)}
"""For a network, of which a side with an earlier tap runs a part."""
PLAIN = {
    "bank": partial(MemoryBank, baseline=0.0),
    "scorer": partial(Scorer, combination="sum", image_score="max", smoothing=0.0),
}
"""For what comes before scores: what scores is exported with others."""
NETWORK = {**PLAIN, **DEEP_SIDE}


SMALL_LISTS = partial(MemoryBank, exact_most=60)


def model(backbone=EfficientNetLite0, size=(96, 96), **arguments) -> PatchModel:
    """A model that could learn, with real banks and a threshold, of some random images."""
    torch.manual_seed(0)
    learned = {"patch_encoder": LearnedEncoder, "scorer": PRODUCT}
    made = PatchModel(backbone(weights="none"), **{"sides": (32, 16), **learned, **arguments}).eval()
    made.canvas = Canvas(size)
    with torch.inference_mode():
        images = torch.rand(3, 3, *size)
        content = torch.tensor([size] * 3)
        made.encoder.observe(made.encoder.observable(images))
        for standardize in made.encoder.standardizers.values():
            standardize.finish(lambda moments: moments)
        for side, embeddings in made.embed(images).items():
            made.bank(side).add(embeddings, made.encoder.counted(content, embeddings, side), torch.arange(3))
            made.bank(side).finish()
        made.calibrate(made.distances(torch.rand(2, 3, *size), content[:2]), torch.tensor([True, True]))
    return made


def exported(made: PatchModel, folder: Path, **settings) -> ExportedDetector:
    made.canvas = made.canvas and made.canvas._replace(**settings)
    export(made, folder / "model.patchad")
    return patchad.load(folder / "model.patchad")


def assert_equal(made: PatchModel, file: ExportedDetector, array: np.ndarray, image: torch.Tensor) -> None:
    """The file scores an array as the detector scores the image in [0, 1] that it holds."""
    fitted, content = on_canvas(image, file.canvas)
    with torch.inference_mode():
        expected = made(fitted[None], torch.tensor([content]))
    expected_map = crop_resize(expected.map, torch.tensor([content]), (image.shape[1], image.shape[2]))[0].numpy()
    found = file(array)
    assert abs(found.score - float(expected.score)) <= TOLERANCE * float(expected.score)
    assert found.map.shape == expected_map.shape
    assert found.map.dtype == np.float32
    np.testing.assert_allclose(found.map, expected_map, atol=TOLERANCE * expected_map.max())
    assert found.anomalous == bool(expected.anomalous)


@pytest.mark.parametrize(
    ("backbone", "arguments"),
    [
        (EfficientNetLite0, DEEP_SIDE),
        (EfficientNetLite0, {"patch_encoder": WindowEncoder, **DEEP_SIDE}),
        (Tiny, {"scorer": partial(Scorer, combination="sum", image_score="max")}),
        (Tiny, {"tile": 48, **PLAIN, **ONE_SIDE}),
        (Tiny, {"mode": "sliding", "subtract_mean_image": True, **ONE_SIDE}),
        (Tiny, {"patch_encoder": TextureEncoder, "bank": partial(MemoryBank, baseline=0.0), **ONE_SIDE}),
        (VGG16, {"taps": PAPER_TAPS, **NETWORK}),
        (VGG16, {"patch_encoder": WindowEncoder, "taps": PAPER_TAPS, **NETWORK}),
        (VGG19, {"taps": {32: "relu3_4"}, **NETWORK}),
        *((backbone, NETWORK) for backbone in (AlexNet, MobileNetV2, ResNet18, ResNet50)),
        *((partial(Timm, name), NETWORK) for name in ("test_resnet", "test_vit")),
    ],
)
def test_the_file_scores_arrays_of_any_size_as_the_detector_does(backbone, arguments, tmp_path):
    made = model(backbone, **arguments)
    file = exported(made, tmp_path)
    generator = np.random.default_rng(0)
    for height, width in [(96, 96), (200, 120), (50, 70), (96, 31)]:
        array = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
        assert_equal(made, file, array, torch.from_numpy(array).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(
    "arguments",
    [{"bank": partial(MemoryBank, baseline=0.0, exact_most=60)}, {"bank": SMALL_LISTS, "scorer": Scorer}],
    ids=["no baseline", "excess"],
)
def test_the_file_searches_large_banks_as_the_detector_does(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("patchad.lists.PART", 5)
    made = model(Tiny, **ONE_SIDE, **arguments)
    lists, parts, _ = made.bank(16).lists.shape
    assert lists > 16 and parts > 2
    file = exported(made, tmp_path)
    arrays = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3)).astype(np.uint8)
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
    for count in (1, 2, 5):
        with torch.inference_mode():
            expected = made(images[:count], torch.tensor([[96, 96]] * count))
        found = file.score(list(arrays[:count]))
        np.testing.assert_allclose([one.score for one in found], expected.score, rtol=TOLERANCE)
        for one, values in zip(found, expected.map, strict=True):
            np.testing.assert_allclose(one.map, values, atol=TOLERANCE * float(values.max()))


def test_the_file_distorts_where_the_data_did_and_brings_images_to_the_light_that_they_had(tmp_path):
    made = model(Tiny, size=(96, 80), **PLAIN, **ONE_SIDE)
    file = exported(made, tmp_path, keep_aspect=False, brightness=0.4)
    dark = np.random.default_rng(0).random((60, 130, 3), dtype=np.float32) / 4
    assert_equal(made, file, dark, torch.from_numpy(dark).permute(2, 0, 1))
    assert file(2 * dark).score == pytest.approx(file(dark).score, rel=TOLERANCE)
    file(dark).map[:] = 0  # it is the caller's
    assert_equal(made, file, dark, torch.from_numpy(dark).permute(2, 0, 1))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """An exported file."""
    jaxtyping.config.update("jaxtyping_disable", True)
    output = tmp_path_factory.mktemp("export") / "model.patchad"
    export(model(Tiny, **ONE_SIDE), output)
    return output


@pytest.fixture(scope="module")
def file(path) -> ExportedDetector:
    return patchad.load(path)


def test_grey_16_bit_float_and_alpha_are_read_as_from_files(file, tmp_path):
    grey = np.random.default_rng(0).integers(0, 65536, (60, 80)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    rgb = read_image(tmp_path / "grey.png").permute(1, 2, 0).numpy()
    alpha = np.concatenate([rgb, np.zeros_like(rgb[..., :1])], axis=2)
    expected = file(rgb)
    for same in (grey, grey.astype(">u2"), grey[..., None], rgb.astype(np.float64), alpha):
        assert file(same).score == expected.score
        assert np.array_equal(file(same).map, expected.map)


def test_processes_of_a_pool_score_with_its_threads_and_threshold(path):
    file = patchad.load(path, threads=1, spinning=False)
    images = list(np.random.default_rng(0).random((3, 60, 90), dtype=np.float32))
    expected = file.score(images)
    file.threshold = expected[1].score
    assert [one.anomalous for one in expected] != [file(image).anomalous for image in images]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for found, image in zip(pool.map(file, images), images, strict=True):
            assert found[:3] == file(image)[:3] and np.array_equal(found.map, file(image).map)
    copied = pickle.loads(pickle.dumps(file))
    options = copied._engine.session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert copied._engine.session.get_providers() == file._engine.session.get_providers()


def test_a_batch_scores_each_image_as_alone(file):
    generator = np.random.default_rng(0)
    images = [generator.random((height, 90, 3), dtype=np.float32) for height in (96, 40, 130)]
    for alone, together in zip(map(file, images), file.score(images), strict=True):
        assert together.score == pytest.approx(alone.score, rel=1e-5)
        np.testing.assert_allclose(together.map, alone.map, rtol=1e-4, atol=1e-5)
    assert file.score([]) == []


def test_another_rate_sets_the_threshold_and_a_score_has_the_p_value_that_the_detector_gives(file):
    image, kept, normals = np.random.default_rng(0).random((96, 96), dtype=np.float32), file.threshold, file.normals
    assert kept == normals.max() and len(normals) == 2
    assert file.set_target_fpr(0.6) == pytest.approx(1 / 3) and file.threshold == normals.max()
    assert file.set_target_fpr(0.7) == pytest.approx(2 / 3) and file.threshold == normals.min()
    file.threshold = kept
    found = file(image)
    scorer = Scorer((16,))
    scorer.set_limits(torch.from_numpy(normals), torch.from_numpy(file.peaks))
    assert found.p_value == pytest.approx(float(scorer.p_value(torch.tensor([found.score]))))
    with pytest.raises(PatchadError, match="target_fpr 0 must lie above 0"):
        file.set_target_fpr(0)


def test_the_threshold_can_be_set(file):
    image = np.random.default_rng(0).random((96, 96), dtype=np.float32)
    kept, score = file.threshold, file(image).score
    verdicts = []
    for file.threshold in (score, np.nextafter(score, 0)):
        verdicts.append(file(image).anomalous)
    file.threshold = kept
    assert verdicts == [False, True]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((0, 4), np.uint8), r"shape \(0, 4\)"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.full((4, 4), 200.0), "from 200 to 200"),
        (np.full((4, 4), np.nan), "from nan to nan"),
    ],
)
def test_an_array_that_is_no_image_is_refused(file, image, words):
    with pytest.raises(PatchadError, match=words):
        file(image)


def test_fitting_an_array_is_fitting_an_image():
    for size in [(31, 97), (300, 200), (64, 64)]:
        image = np.random.default_rng(1).random((3, *size), dtype=np.float32)
        for keep_aspect, brightness in [(True, None), (False, None), (True, 0.2)]:
            canvas = Canvas((64, 48), keep_aspect, brightness)
            expected, content = on_canvas(torch.from_numpy(image), canvas)
            found, found_content = array_on_canvas(image, canvas)
            assert found_content == content
            np.testing.assert_allclose(found, expected.numpy(), atol=5e-6)


def test_a_file_that_is_missing_broken_or_a_strangers_is_refused(tmp_path):
    with pytest.raises(PatchadError, match=r"nothing\.patchad does not exist; patchad export"):
        patchad.load(tmp_path / "nothing.patchad")
    (tmp_path / "broken").write_bytes(b"no graph")
    with pytest.raises(PatchadError, match="broken is not a file that patchad export wrote"):
        patchad.load(tmp_path / "broken")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "stranger", [value], [other])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save_model(model, tmp_path / "stranger")
    with pytest.raises(PatchadError, match="stranger is an ONNX file, but not one that patchad export wrote"):
        patchad.load(tmp_path / "stranger")


@pytest.mark.parametrize("part", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1])
def test_a_flipped_bit_is_refused(part, path, tmp_path):
    content = bytearray(path.read_bytes())
    content[round(part * (len(content) - 1))] ^= 4
    (tmp_path / "flipped").write_bytes(content)
    with pytest.raises(PatchadError, match="flipped is damaged: its checksum does not fit"):
        patchad.load(tmp_path / "flipped")


def without_checksum(metadata: dict) -> None:
    del metadata["checksum"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_checksum, "has no checksum"),
        (lambda metadata: metadata.update(format=4), "is damaged|has format 4; this patchad reads format 6"),
        (lambda metadata: metadata.update(threshold=math.nan), "is damaged"),
    ],
)
def test_metadata_that_another_program_wrote_are_refused(change, words, path, tmp_path):
    proto = onnx.load(path)
    metadata = json.loads(proto.metadata_props[0].value)
    change(metadata)
    onnx.helper.set_model_props(proto, {"patchad": json.dumps(metadata)})
    onnx.save_model(proto, tmp_path / "changed")
    with pytest.raises(PatchadError, match=f"changed ({words})"):
        patchad.load(tmp_path / "changed")


@pytest.mark.parametrize("metadata", ["[1, 2]", "null", "7", "{}"])
def test_metadata_that_are_none_of_ours_are_refused(metadata, path, tmp_path):
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {"patchad": metadata})
    onnx.save_model(proto, tmp_path / "changed")
    with pytest.raises(PatchadError, match="changed has format None; this patchad reads format 6"):
        patchad.load(tmp_path / "changed")


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda path: patchad.load(path.parent), "is a folder; give the file"),
        (lambda path: patchad.load(bytes(path)), "a bytes is no path"),
        (lambda path: patchad.load(path, threads="two"), "threads 'two' must be a number"),
        (lambda path: patchad.load(path, threads=0), "threads 0 must be a number of at least 1"),
        (lambda path: patchad.load(path).score(np.zeros((96, 96, 3), np.uint8)), "score takes a list of images"),
        (lambda path: patchad.load(path).score(None), "score takes a list of images"),
        (lambda path: patchad.load(path, providers=["Nonsense"]), "providers Nonsense are not there; there are .*CPU"),
        (lambda path: patchad.load(path, providers="CPUExecutionProvider"), "must be a list"),
        (lambda path: patchad.load(path, providers=None), "providers None must be a list"),
        (lambda path: patchad.load(path).set_target_fpr("low"), "target_fpr 'low' must be a number"),
        (lambda path: setattr(patchad.load(path), "threshold", None), "threshold None must be a number"),
        (lambda path: setattr(patchad.load(path), "threshold", math.nan), "threshold nan must be a number"),
    ],
)
def test_what_the_caller_can_mend_is_told(ask, words, path):
    with pytest.raises(PatchadError, match=words):
        ask(path)


def test_any_collection_of_images_is_scored(file):
    images = [np.full((96, 96), value, np.float32) for value in (0.2, 0.8)]
    expected = [found.score for found in file.score(images)]
    assert [found.score for found in file.score(image for image in images)] == expected
    assert [found.score for found in file.score(tuple(images))] == expected


def test_a_score_that_is_no_number_is_no_verdict(tmp_path):
    made = model(Tiny, **ONE_SIDE)
    made.scorer.scale[:] = math.nan
    image = np.zeros((96, 96, 3), np.uint8)
    with pytest.raises(PatchadError, match="the score of an image is nan"):
        exported(made, tmp_path)(image)
    with pytest.raises(PatchadError, match="the score of an image is nan"):
        made.predict(image)


def test_an_empty_detector_is_not_exported_and_leaves_no_file(tmp_path):
    empty = PatchModel(EfficientNetLite0(weights="none"), sides=(32,)).eval()
    with pytest.raises(PatchadError, match="knows no image_size"):
        exported(empty, tmp_path)
    empty.canvas = Canvas((96, 96))
    with pytest.raises(PatchadError, match="memory bank is empty"):
        exported(empty, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bank_that_no_file_can_hold_is_refused_at_once(tmp_path):
    large = PatchModel(EfficientNetLite0(weights="none"), sides=(16,)).eval()
    large.canvas = Canvas((96, 96))
    large.bank(16).vectors = torch.zeros(1, 1).expand(20_000_000, 40)  # which takes no memory
    with pytest.raises(PatchadError, match=r"would take 3.2 GB, and ONNX allows 2.1: .* --model.bank.max_vectors"):
        exported(large, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file_to_export_to(tmp_path):
    with pytest.raises(PatchadError, match=r"is a folder; give a file, such as .*model\.patchad"):
        export(model(Tiny), tmp_path)


def test_any_onnx_runtime_scores_the_file_without_patchad(file, path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).random((1, 3, 96, 96), dtype=np.float32)
    score, _ = session.run(["score", "map"], {"image": image, "content": np.array([[96, 96]])})
    assert score[0] == pytest.approx(file(image[0].transpose(1, 2, 0)).score, rel=1e-5)


def test_scoring_from_a_file_imports_neither_torch_nor_lightning(path):
    program = (
        "import sys, numpy, patchad; patchad.load('model.patchad')(numpy.zeros((50, 60), numpy.uint8));"
        "print([name for name in ('torch', 'pytorch_lightning', 'faiss') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", program], cwd=path.parent, capture_output=True, text=True)
    assert finished.stdout.strip() == "[]", finished.stderr


@pytest.fixture(scope="module")
def fitted(product, tmp_path_factory) -> Path:
    """A folder with two checkpoints of fits from the command line that differ in their seed, and the first's export."""
    folder = tmp_path_factory.mktemp("fitted")
    fit = ["fit", f"--data.root={product}", *LITE, *SMALL, "--model.sides=[32,16]"]
    with commands_in(folder) as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        main(fit)
        main([*fit, "--model.bank.seed=1"])
        main(["export", f"--ckpt_path={CHECKPOINTS[0]}"])
    return folder


CHECKPOINTS = [f"runs/version_{number}/checkpoints/last.ckpt" for number in range(2)]


def test_the_file_says_where_it_came_from(fitted):
    metadata = patchad.load(fitted / "model.patchad").metadata
    assert metadata["checkpoint"]["name"] == "last.ckpt"
    assert metadata["checkpoint"]["sha256"] == checksum(fitted / CHECKPOINTS[0])
    assert metadata["model"]["init_args"]["backbone"]["class_path"].endswith("EfficientNetLite0")
    assert metadata["vectors"] == {"32": 300, "16": 500}


def test_the_file_names_no_folder_of_the_machine_that_wrote_it(fitted):
    content = (fitted / "model.patchad").read_bytes()
    for folder in (Path(torch.__file__).parent, Path(patchad.__file__).parent, fitted, Path.home()):
        assert os.fsencode(folder) not in content


def test_verify_shows_that_the_file_is_that_of_the_checkpoint(fitted, here, capsys):
    main(["verify", str(fitted / "model.patchad"), f"--ckpt_path={fitted / CHECKPOINTS[0]}", "--images=3"])
    told = capsys.readouterr().out
    assert told.count("| same |") == 3
    assert "allowed 1e-04 and 1e-02" in told


def test_verify_without_a_file_says_what_to_give(fitted, here, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["verify", f"--ckpt_path={fitted / CHECKPOINTS[0]}"])
    assert stop.value.code == 2
    assert "error: nothing to verify: give patchad verify FILE" in capsys.readouterr().err


def test_verify_tells_a_file_of_another_checkpoint(fitted, here, capsys):
    with pytest.raises(SystemExit):
        main(["verify", str(fitted / "model.patchad"), f"--ckpt_path={fitted / CHECKPOINTS[1]}", "--images=2"])
    assert "model.patchad differs from" in capsys.readouterr().err


def test_verify_tells_a_file_of_another_threshold(fitted, here, capsys):
    checkpoint = torch.load(fitted / CHECKPOINTS[0], weights_only=True)
    checkpoint["state_dict"]["model.scorer.normals"] *= 2
    save(checkpoint, here / "other.ckpt")
    with pytest.raises(SystemExit):
        main(["verify", str(fitted / "model.patchad"), "--ckpt_path=other.ckpt", "--images=1"])
    assert "model.patchad has the threshold" in capsys.readouterr().err


def test_an_export_by_another_score_and_in_another_light_warns_before_the_work_that_the_threshold_does_not_fit(
    fitted,
    here,
    monkeypatch,
):
    def stop(*_, **__):
        raise PatchadError("it was told")

    monkeypatch.setattr(torch.onnx, "export", stop)
    changed = ["--model.scorer.image_score=max", "--data.brightness=0.5"]
    with pytest.warns(UserWarning) as caught, pytest.raises(SystemExit):
        main(["export", f"--ckpt_path={fitted / CHECKPOINTS[0]}", *changed])
    messages = [str(warning.message) for warning in caught if "verdicts do not" in str(warning.message)]
    assert len(messages) == 2 and "images of brightness None, not 0.5" in messages[1]
    assert "image_score=max" in messages[0]


def test_images_in_another_light_than_the_checkpoints_are_told(fitted, here):
    light = [f"--ckpt_path={fitted / CHECKPOINTS[0]}", "--data.brightness=0.5"]
    with pytest.warns(UserWarning, match=r"images of brightness None, not 0\.5: verdicts do not hold"):
        main(["test", *light, "--trainer.enable_progress_bar=false"])


@pytest.mark.parametrize(("precision", "reduced"), [("32-true", False), ("bf16-mixed", True)])
def test_benchmark_times_the_users_own_model_at_its_precision(precision, reduced, fitted, here, capsys, monkeypatch):
    seen = []

    def rate(device: torch.device) -> float:
        seen.append(torch.is_autocast_enabled("cpu"))
        return 1e11

    monkeypatch.setattr("patchad.commands.best_rate", rate)
    asked = ["--repeats=1", "--batch_sizes=[1,2]", f"--trainer.precision={precision}"]
    main(["benchmark", f"--ckpt_path={fitted / CHECKPOINTS[0]}", *asked])
    told = capsys.readouterr().out
    assert told.count("| search |") == told.count("| from memory to score |") == told.count("images/s") == 2
    assert f"100 GFLOP/s at precision {precision} on cpu" in told
    assert seen == [reduced]


def test_predict_and_the_file_agree(fitted, product, here):
    main(["predict", f"--ckpt_path={fitted / CHECKPOINTS[0]}", f"--data.root={product}/test", "--maps=float16"])
    file = patchad.load(fitted / "model.patchad")
    predictions = next(Path("runs").rglob("predictions"))
    rows = list(csv.DictReader((predictions / "scores.csv").read_text().splitlines()))
    assert len(rows) == 11
    for row in rows:
        found = file(row["path"])
        assert found.p_value == pytest.approx(float(row["p_value"]), rel=1e-6)
        assert found.score == pytest.approx(float(row["score"]), rel=TOLERANCE)
        assert found.verdict == row["verdict"]
        written = np.load(predictions / "maps" / f"{Path(row['path']).relative_to(product / 'test')}.npy")
        np.testing.assert_allclose(found.map, written, rtol=1e-3, atol=TOLERANCE * float(written.max()))


def test_a_checkpoint_and_its_file_score_in_batches_of_1_and_of_8_alike(fitted, product):
    """Bit for bit on the CPUs that were seen, but for maps of the file: 3e-8 of the highest pixel."""
    made, file = PatchModel.load(fitted / CHECKPOINTS[0]), patchad.load(fitted / "model.patchad")
    paths = sorted(product.glob("test/*/*.png"))[:8]
    images, content = torch.stack([read_image(path) for path in paths]), torch.tensor([[96, 96]] * 8)
    with torch.inference_mode():
        together = made(images, content)
        alone = [made(image[None], content[:1]) for image in images]
    torch.testing.assert_close(together.score, torch.cat([one.score for one in alone]), rtol=SAME, atol=0)
    assert torch.equal(together.anomalous, torch.cat([one.anomalous for one in alone]))
    for one, values in zip(alone, together.map, strict=True):
        assert (one.map[0] - values).abs().max() <= SAME * values.max()
    for one, many in zip(map(file, paths), file.score(paths), strict=True):
        assert many.score == pytest.approx(one.score, rel=SAME) and many.anomalous == one.anomalous
        np.testing.assert_allclose(many.map, one.map, rtol=0, atol=SAME * one.map.max())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the limits are names of x86")
@pytest.mark.parametrize("limits", [("avx2", "AVX2"), ("default", "SSE41")], ids=lambda limits: limits[0])
def test_a_cpu_that_knows_fewer_instructions_gives_the_same_scores(limits, fitted, product, tmp_path):
    """Of torch and oneDNN: ONNX Runtime takes no limit. On the default at 384 x 384, `avx2` differed by nothing from
    AVX-512, `default` by 1e-5 of a score and 3e-5 of the highest pixel, and no verdict did."""
    files = [str(fitted / CHECKPOINTS[0]), str(fitted / "model.patchad")]
    images = [str(path) for path in sorted(product.glob("test/*/*.png"))[:8]]
    environment = dict(zip(("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"), limits, strict=True))
    command = [sys.executable, "-m", "tests.scored", *files, str(tmp_path / "found.npz"), *images]
    subprocess.run(command, cwd=Path(__file__).parent.parent, env=os.environ | environment, check=True)
    found, unlimited = np.load(tmp_path / "found.npz"), scored(*files, images)
    assert found["instructions"] in (limits[0].upper(), "DEFAULT")
    for name in ("checkpoint", "file"):
        np.testing.assert_allclose(found[f"{name} score"], unlimited[f"{name} score"], rtol=TOLERANCE)
        assert np.array_equal(found[f"{name} verdict"], unlimited[f"{name} verdict"])
        differences = np.abs(found[f"{name} map"] - unlimited[f"{name} map"]).max(axis=(1, 2))
        assert (differences <= TOLERANCE * unlimited[f"{name} map"].max(axis=(1, 2))).all()


def test_a_file_is_scored_as_predict_reads_it(fitted, product, tmp_path):
    """As pixels in an array it may be numbers of a palette, other colours than RGB, or lie on its side."""
    file, image = patchad.load(fitted / "model.patchad"), Image.open(sorted(product.glob("test/*/*.png"))[0])
    upright = file(np.asarray(image.convert("RGB"))).score
    image.convert("RGB").quantize(256).save(tmp_path / "palette.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    turned, orientation = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    orientation[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=orientation)
    found = file.score([str(tmp_path / "palette.png"), tmp_path / "cmyk.tif", tmp_path / "turned.png"])
    read = [read_image(tmp_path / name) for name in ("palette.png", "cmyk.tif", "turned.png")]
    assert [one.score for one in found] == [file(one.permute(1, 2, 0).numpy()).score for one in read]
    assert found[1].score == pytest.approx(upright, rel=0.05)


def test_an_output_that_cannot_be_written_is_told_before_the_work(fitted, here, capsys, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("it was worked for nothing"))
    (here / "file").write_text("x")
    with pytest.raises(SystemExit) as stop:
        main(["export", f"--ckpt_path={fitted / CHECKPOINTS[0]}", "--output=file/model.patchad"])
    assert stop.value.code == 2
    assert re.search(r"patchad: error: .*'file", capsys.readouterr().err)


def test_export_asks_for_a_checkpoint(product, here, capsys):
    with pytest.raises(SystemExit):
        main(["export", f"--data.root={product}", "--config=fast"])
    assert "give --ckpt_path" in capsys.readouterr().err


def test_the_learned_encoder_of_a_lent_class_is_exported(tmp_path):
    class Wider(LearnedEncoder):
        def forward(self, features, step):
            return super().forward(features, step) * 2

    made = model(Tiny, patch_encoder=Wider, **ONE_SIDE)
    array = np.random.default_rng(0).random((96, 96, 3), dtype=np.float32)
    assert_equal(made, exported(made, tmp_path), array, torch.from_numpy(array).permute(2, 0, 1))


def test_verify_names_what_cannot_be_read_after_all_other_images(fitted, here, product, capsys):
    shutil.copytree(product / "test/good", here / "parts")
    (here / "parts/0.png").write_bytes(b"no image")
    command = ["verify", str(fitted / "model.patchad"), f"--ckpt_path={fitted / CHECKPOINTS[0]}", "--data.root=parts"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out.count("| same |") == 4
    assert "1 of 5 images could not be scored: cannot read image parts/0.png" in captured.err
