import pytest
import torch
from PIL import Image
from pytorch_lightning import Trainer

from benchmarks.repeated import Repeated
from patchad import PatchadError, PyramidDataModule
from patchad.canvas import Canvas
from patchad.data import Folder, MVTecAD
from patchad.data.datasets import ImageDataset, PyramidDataset, SyntheticDefects
from patchad.images import Augmentations
from patchad.types import PyramidBatch, PyramidPlan


def images(root, **settings) -> PyramidDataModule:
    defaults = {"image_size": (96, 96), "metric_size": (48, 48), "batch_size": 4, "num_workers": 0}
    data = PyramidDataModule(root, **{**defaults, **settings})
    data.prepare_data()
    data.setup("fit")
    return data


def paths(dataset) -> set:
    return {sample.path for sample in dataset.samples}


def test_learned_held_out_and_tested_images_share_none_and_lose_none(product):
    data = images(product, held_out_fraction=0.25)
    sets = [paths(one) for one in (data.train_set, data.held_out_set, data.test_set)]
    assert [len(one) for one in sets] == [9, 3, 11]
    assert len(set.union(*sets)) == 23
    assert paths(data.normal_set) == sets[0] | sets[1]
    assert {data.normal_set.samples[number].path for number in data.held_out.nonzero()} == sets[1]


def test_an_image_is_known_by_the_number_of_what_it_shows_wherever_it_stands(product):
    data = images(product, layout=Pairs(), held_out_fraction=0.25)
    number = {
        sample.thing: int(thing) for sample, thing in zip(data.normal_set.samples, data.normal_set.things, strict=True)
    }
    assert sorted(number.values()) == list(range(6))
    for part in (data.train_set, data.held_out_set):
        assert [part[place].thing for place in range(len(part))] == [number[sample.thing] for sample in part.samples]
    assert {int(one) for one in data.test_set.things} == {-1}


class OneThing(MVTecAD):
    """All images show the same thing."""

    def samples(self, root):
        return [sample._replace(group="0") for sample in super().samples(root)]


class Pairs(MVTecAD):
    """Two images each show the same thing."""

    def samples(self, root):
        return [one._replace(group=str(number // 2)) for number, one in enumerate(super().samples(root))]


@pytest.mark.parametrize(("fraction", "expected"), [(0.01, 2), (0.25, 4), (0.99, 10)])
def test_whole_groups_are_held_out_and_one_is_left_to_train_on(product, fraction, expected):
    data = images(product, layout=Pairs(), held_out_fraction=fraction)
    groups = [{sample.group for sample in one.samples} for one in (data.train_set, data.held_out_set)]
    assert len(data.held_out_set) == expected
    assert not set.intersection(*groups)


def test_images_of_one_thing_alone_are_refused(product):
    with pytest.raises(PatchadError, match="12 training images in 1 groups of the same thing"):
        images(product, layout=OneThing())


def test_the_split_is_a_function_of_the_seed(product):
    chosen = [paths(images(product, held_out_fraction=0.25, seed=seed).held_out_set) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_order_of_training_is_a_function_of_seed_and_epoch(product):
    def order(seed: int, epoch: int) -> list:
        loader = images(product, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch.number for batch in loader]).tolist()

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(11))
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_painted_defects_are_the_same_for_any_number_of_workers_and_are_marked(product):
    batches = [list(images(product, num_workers=workers).val_dataloader()[0]) for workers in (0, 2)]
    first, second = (torch.cat([batch.image for batch in one]) for one in batches)
    assert torch.equal(first, second)
    normal, painted = first[0::2], first[1::2]
    masks = torch.cat([batch.mask for batch in batches[0]])
    assert not masks[0::2].any() and masks[1::2].flatten(1).any(1).all()
    assert (normal != painted).flatten(1).any(1).all()
    assert torch.cat([batch.label for batch in batches[0]]).tolist() == [0, 1] * len(normal)


def test_validation_costs_the_same_for_any_number_of_images_held_out(product):
    samples = images(product).train_set.samples
    sizes = [len(SyntheticDefects(ImageDataset(n * samples, Canvas((96, 96)), (96, 96)), seed=0)) for n in (1, 3, 30)]
    assert sizes == [22, 40, 40]


def test_masks_come_at_the_metric_size_and_normal_images_have_empty_ones(product):
    for batch in images(product).test_dataloader():
        assert batch.mask.shape[1:] == (48, 48)
        assert batch.has_mask.all()
        assert torch.equal(batch.mask.flatten(1).any(1), batch.label == 1)


def test_defects_without_a_mask_are_noted_once_and_marked(product, tmp_path, capfd):
    (tmp_path / "normal").symlink_to(product / "train")
    (tmp_path / "abnormal").symlink_to(product / "test")
    data = images(tmp_path, layout=Folder())
    batch = next(iter(data.test_dataloader()))
    assert batch.has_mask.tolist() == (batch.label == 0).tolist()


def test_fewer_images_than_processes_are_refused(product):
    data = images(product)
    data.trainer = Trainer(accelerator="cpu", devices=13, strategy="ddp", logger=False, enable_progress_bar=False)
    with pytest.raises(PatchadError, match=r"12 images cannot be shared by 13 processes; give --trainer\.devices 12"):
        data.normal_dataloader()


def test_a_folder_without_test_images_points_to_predict(product, tmp_path):
    (tmp_path / "normal").symlink_to(product / "train")
    with pytest.raises(PatchadError, match="patchad predict"):
        images(tmp_path).test_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out_fraction": -0.1}, "held_out_fraction -0.1"),
        ({"batch_size": 0}, "at least 1"),
        ({"brightness": 0.0}, r"brightness 0\.0 must lie above 0"),
        ({"brightness": 102.0}, r"brightness 102\.0 must lie above 0 and be at most 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(settings, message, product):
    with pytest.raises(PatchadError, match=message):
        images(product, **settings)


def test_whatever_reads_images_brings_them_to_the_brightness(product):
    data = images(product, brightness=0.3, shift=0)
    assert data.view_settings != images(product).view_settings
    read = [*next(iter(data.normal_dataloader())).image, *next(iter(data.test_dataloader())).image]
    read += [*next(iter(data.train_dataloader())).image.flatten(0, 1), data.pyramids.view(0, 0)]
    for image in read:
        assert image.mean() == pytest.approx(0.3)


def leaves(batch: PyramidBatch) -> list[torch.Tensor]:
    return [*batch[:-1], *(field for pyramid in batch.sides.values() for field in pyramid)]


def epoch_batches(root, epoch: int, workers: int = 0) -> list[PyramidBatch]:
    loader = images(root, num_workers=workers, pyramids_per_image=8).train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_pyramids_are_a_function_of_seed_epoch_and_image_for_any_number_of_workers(product):
    expected = epoch_batches(product, 3)
    for workers in (1, 4):
        for one, other in zip(expected, epoch_batches(product, 3, workers), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))
    later = {int(number): batch for batch in epoch_batches(product, 4) for number in batch.number}
    assert not torch.equal(later[0].sides[16].anchor[0], expected[0].sides[16].anchor[0])


def test_a_batch_holds_two_views_of_each_image_and_pyramids_of_every_side(product):
    batch = next(iter(images(product, pyramids_per_image=8).train_dataloader()))
    assert batch.image.shape == (4, 2, 3, 96, 96)
    assert list(batch.sides) == [64, 32, 16] and batch.sides[32].far.shape == (4, 8, 2)
    assert not torch.equal(batch.image[:, 0], batch.image[:, 1])


def test_two_views_show_the_same_content_at_the_places_of_near_patches(product):
    """Where the second view is moved, near patches follow, to less than half a cell."""
    data = images(product, pyramids_per_image=16)
    loader = data.train_dataloader()
    near, far = [], []
    for batch in loader:
        pyramid = batch.sides[16]
        for number in range(len(batch.number)):
            for row in range(16):
                anchor, *others = (
                    batch.image[number, view, :, top : top + 16, left : left + 16]
                    for view, place in ((0, pyramid.anchor), (1, pyramid.near), (1, pyramid.far))
                    for top, left in [(pyramid.window[number] + place[number, row]).tolist()]
                )
                near.append((anchor - others[0]).abs().mean().item())
                far.append((anchor - others[1]).abs().mean().item())
    assert sum(near) < 0.5 * sum(far)


def painting(data: PyramidDataModule) -> PyramidDataset:
    plan = PyramidPlan({16: 4}, painted=True)
    return PyramidDataset(data.train_set, plan, 4, Augmentations(noise=0.02), seed=0)


def test_a_painted_view_differs_from_the_first_view_on_its_mask_alone_and_not_on_padding(product):
    data = images(product, image_size=(96, 128))  # the images are square
    for number in range(4):
        item = painting(data)[(0, number)]
        changed = (item.painted != item.image[0]).any(0)
        assert item.content.tolist() == [96, 96]
        assert changed.any() and not changed[~item.mask].any() and not item.mask[:, 96:].any()


def test_painted_defects_are_a_function_of_seed_epoch_and_image(product):
    first, again = (painting(images(product)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(leaves(first[(2, 1)]), leaves(again[(2, 1)]), strict=True))
    assert not torch.equal(first[(2, 1)].mask, first[(3, 1)].mask)
    assert not torch.equal(first[(2, 1)].mask, first[(2, 2)].mask)


def test_images_of_one_group_show_one_thing(product):
    data = images(product, layout=Pairs())
    groups = [sample.group for sample in data.train_set.samples]
    things = [int(data.pyramids[(0, number)].thing) for number in range(len(groups))]
    assert [things.index(thing) for thing in things] == [groups.index(group) for group in groups]
    alone = images(product).pyramids
    assert len({int(alone[(0, number)].thing) for number in range(5)}) == 5


def test_the_probe_is_the_same_on_every_call(product):
    data = images(product, pyramids_per_image=8)
    first, second = (next(iter(data.probe_dataloader())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(second), strict=True))


def test_a_shift_that_pyramids_have_no_room_for_is_refused(product):
    with pytest.raises(PatchadError, match="shift 3 must be at least 0 and at most 2"):
        images(product, shift=3)


def test_a_list_that_holds_each_file_several_times_is_split_as_the_list_once(product):
    counts = []
    for times in (1, 4):
        data = PyramidDataModule(product, layout=Repeated(times))
        data.setup("fit")
        counts.append((len(data.train_set), len(data.held_out_set)))
    assert counts[1] == (4 * counts[0][0], 4 * counts[0][1])


def test_images_too_narrow_for_the_defects_of_validation_are_refused_before_anything_is_learned(tmp_path):
    for number in range(4):
        Image.new("L", (200, 20)).save(tmp_path / f"{number}.png")
    narrow = {"layout": Folder(normal=".")}
    with pytest.raises(PatchadError, match=r"png is 10 x 96 pixels .* need 32: .* data\.validate_on none"):
        images(tmp_path, **narrow)
    assert len(images(tmp_path, validate_on="none", **narrow).train_set) == 3
