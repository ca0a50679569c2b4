import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_cli import SMALL, here  # noqa: F401
from torch.nn import functional as F

from patchad import PatchadError, PatchDetector
from patchad.cli import main
from patchad.models import Timm, WindowEncoder
from patchad.models.backbones import receptive_radius
from patchad.models.cache import fingerprint
from patchad.models.encoders import DenseEncoder

DINO = "vit_small_patch14_dinov2"


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", DINO])
@pytest.mark.parametrize("size", [(64, 64), (50, 70), (97, 33)])
def test_a_tap_has_its_channels_and_size_over_stride_cells_rounded_up(name, size):
    backbone = Timm(name, weights="none")
    maps = backbone(torch.rand(1, 3, *size), backbone.taps)
    for tap_name, tap in backbone.taps.items():
        assert maps[tap_name].shape == (1, tap.channels, -(-size[0] // tap.stride), -(-size[1] // tap.stride))


@pytest.mark.parametrize("file", ["network.pth", "network.safetensors"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_taps_equal_timms_own_features_with_the_weights_of_the_whole_network(name, file, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(name)
    network(torch.rand(4, 3, 160, 160))  # batch statistics are taken, so that norms do something
    if file.endswith("pth"):
        torch.save(network.state_dict(), tmp_path / file)
    else:
        save_file(network.state_dict(), tmp_path / file)
    backbone = Timm(name, weights=str(tmp_path / file))
    depths = [tap.layer for tap in backbone.taps.values()]
    own = timm.create_model(name, features_only=True, out_indices=depths).eval()
    state = network.state_dict()
    loaded = own.load_state_dict({f"model.{key}": value for key, value in state.items()} | state, strict=False)
    assert not loaded.missing_keys  # what timm wraps it names anew, by one of the two
    told, image = network.pretrained_cfg, torch.rand(1, 3, 160, 160)
    mean, deviation = (torch.tensor(told[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = own((image - mean) / deviation)
        maps = backbone(image, backbone.taps)
        shallow = backbone(image, [next(iter(backbone.taps))])
    for values, found in zip(expected, maps.values(), strict=True):
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-5 * float(values.abs().max()))
    assert all(torch.equal(values, maps[key]) for key, values in shallow.items())  # alone as among deeper ones


def test_cnns_have_stages_and_transformers_blocks_at_each_quarter_of_their_depth():
    resnet, transformer = Timm("test_resnet", weights="none"), Timm("vit_tiny_patch16_224", weights="none")
    assert [*resnet.taps] == [f"stage{number}" for number in range(1, 6)]
    assert resnet.side_taps == {64: "stage4", 32: "stage4", 16: "stage3"}
    assert [*transformer.taps] == ["block3", "block6", "block9", "block12"]
    assert transformer.side_taps == {64: "block12", 32: "block12", 16: "block3"}
    assert {tap.stride for tap in transformer.taps.values()} == {16}


def test_sides_that_patches_of_14_pixels_do_not_divide_are_told_the_ones_that_they_do():
    backbone = Timm(DINO, weights="none")
    with pytest.raises(PatchadError, match=rf"no tap is known for side 64; Timm {DINO} has one for sides 56, 28, 14"):
        DenseEncoder(backbone, WindowEncoder, (64, 32, 16))
    with pytest.raises(PatchadError, match="side 64 is no multiple of its tap's stride of 14 pixels; give 70 in sides"):
        DenseEncoder(backbone, WindowEncoder, (64,), taps={64: "block3"})
    encoder = DenseEncoder(backbone, WindowEncoder, (56, 28, 14))
    assert {side: tuple(one.shape[2:]) for side, one in encoder(torch.rand(1, 3, 100, 84)).items()} == {
        side: (-(-100 // 14) - side // 14 + 1, 84 // 14 - side // 14 + 1) for side in (56, 28, 14)
    }


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnt18", "resnet18"),
        ("vit_small_patch14_dinov3", "vit_small_patch16_dinov3"),
        ("resnet18.a9_in1k", "a1_in1k"),
    ],
)
def test_an_unknown_name_ends_in_one_line_with_the_nearest_names(name, nearest):
    with pytest.raises(PatchadError, match=rf"has no network {name}; nearest: .*{nearest}") as raised:
        Timm(name, weights="none")
    assert "\n" not in str(raised.value)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PatchadError, match=r'pip install "patchad\[timm\]"'):
        Timm("resnet18", weights="none")


def test_without_network_the_other_ways_to_weights_are_named_in_one_line(product, here, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it reads its environment only once
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here))
    timm = ["--model.backbone=patchad.models.Timm", "--model.backbone.name=test_vit"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--data.root={product}", *SMALL, *timm])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("patchad: error: cannot download test_vit (")
    assert "https://huggingface.co/timm/test_vit" in said
    assert "--model.backbone.weights" in said and "installed with patchad" in said


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "other.pth")
    with pytest.raises(PatchadError, match=r"other\.pth do not fit Timm test_vit: ") as raised:
        Timm("test_vit", weights=str(tmp_path / "other.pth"))
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_tiles_are_refused_where_a_cell_sees_the_whole_image(name):
    encoder = DenseEncoder(Timm(name, weights="none"), WindowEncoder, (32,), tile=64).eval()
    if name == "test_efficientnet":  # it squeezes and excites
        assert any("se" in part.split(".") for part, _ in encoder.backbone.named_modules())
    encoder(torch.rand(1, 3, 64, 64))  # no tiles are needed
    with pytest.raises(PatchadError, match=rf"tile 64 .* Timm {name} sees the whole image.* --model\.tile null"):
        encoder(torch.rand(1, 3, 96, 96))


def test_tiles_of_a_network_that_sees_no_further_than_it_must_change_nothing():
    torch.manual_seed(0)
    encoder = DenseEncoder(Timm("test_resnet", weights="none"), WindowEncoder, (32, 16)).eval()
    assert receptive_radius(encoder.backbone, ["stage4"]) < 512
    image = torch.rand(1, 3, 256, 352)
    whole, encoder.tile = encoder(image), 64
    for side, values in encoder(image).items():
        torch.testing.assert_close(values, whole[side], rtol=1e-4, atol=1e-5 * float(whole[side].abs().max()))


def test_a_network_that_takes_one_size_alone_says_so():
    backbone = Timm("test_coatnet", weights="none")
    assert backbone(torch.rand(1, 3, 160, 160), ["stage4"])["stage4"].shape == (1, 96, 10, 10)
    with pytest.raises(
        PatchadError, match=r"takes images of \(160, 160\) pixels \(height x width\) alone, not \(96, 96\)"
    ):
        backbone(torch.rand(1, 3, 96, 96), ["stage4"])


def test_a_network_whose_maps_are_not_as_timm_says_is_refused():
    with pytest.raises(
        PatchadError, match=r"has \(29, 29\) cells where timm promises one every 2 pixels of \(64, 64\)"
    ):
        Timm("legacy_xception", weights="none")(torch.rand(1, 3, 64, 64), ["stage1"])


@pytest.mark.parametrize(
    ("name", "tap", "deepest"), [("test_vit", "block3", "block5"), ("test_resnet", "stage2", "stage4")]
)
def test_what_lies_behind_a_tap_and_is_run_learns(name, tap, deepest):
    """DistributedDataParallel waits for each trainable parameter, so every one of them must get a gradient."""
    backbone = Timm(name, weights="none", trainable=tap)
    encoder = DenseEncoder(backbone, WindowEncoder, (32,), taps={32: deepest}).train()
    sum(values.square().sum() for values in encoder(torch.rand(2, 3, 64, 64)).values()).backward()
    learning = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert learning == {key for key, parameter in backbone.named_parameters() if parameter.grad is not None}
    between = (
        {f"layers.blocks.{number}" for number in (3, 4)} if name == "test_vit" else {"layers.layer2", "layers.layer3"}
    )
    assert {".".join(key.split(".")[: 3 if name == "test_vit" else 2]) for key in learning} == between
    norms = [one for one in backbone.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    assert {one.training for one in norms} == ({True, False} if norms else set())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_cache_is_out_of_date_when_what_its_tap_depends_on_changes(name):
    backbone = Timm(name, weights="none")
    tap = list(backbone.taps)[-2]
    encoder = DenseEncoder(backbone, WindowEncoder, (32,), taps={32: tap})
    parameters, first = dict(backbone.layers.named_parameters()), fingerprint(encoder)
    read = {id(parameter) for parameter in backbone.until([tap]).parameters()}
    assert {"pos_embed", "cls_token"} <= {
        key for key, one in parameters.items() if id(one) in read
    } or name != "test_vit"
    with torch.no_grad():
        next(one for one in reversed(parameters.values()) if id(one) not in read).add_(1)
        assert fingerprint(encoder) == first
        for parameter in (next(iter(parameters.values())), [one for one in parameters.values() if id(one) in read][-1]):
            before = fingerprint(encoder)
            parameter.add_(1)
            assert fingerprint(encoder) != before


def test_a_fit_says_that_images_are_padded_and_its_checkpoint_alone_scores_the_same(product, here, caplog):
    small = [*SMALL, "--data.image_size=[90,96]", "--model.bank.max_vectors=100"]
    backbone = [
        "--model.backbone=patchad.models.Timm",
        "--model.backbone.name=test_vit",
        "--model.backbone.weights=none",
    ]
    with caplog.at_level("INFO"):
        main(["fit", f"--data.root={product}", *small, *backbone])
    said = [line for line in caplog.messages if "are padded" in line]
    assert len(said) == 1 and said[0].startswith("images of 90 x 96 pixels (height x width) are padded to 96 x 96")
    path = "runs/version_0/checkpoints/last.ckpt"
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"]["backbone"] == {
        "class_path": "patchad.models.timm_backbone.Timm",
        "init_args": {"name": "test_vit", "weights": "none", "trainable": "none"},
    }
    loaded = PatchDetector.load_from_checkpoint(path, weights_only=True).eval()
    assert all(torch.equal(value, stored["state_dict"][key]) for key, value in loaded.state_dict().items())
    image = torch.rand(1, 3, 90, 96)
    edges = F.pad(image, (0, 0, 0, 6), mode="replicate")
    with torch.inference_mode():
        rounded, whole = (loaded.model.encoder(one) for one in (image, edges))
    assert all(torch.equal(rounded[side], whole[side]) for side in (64, 32, 16))
