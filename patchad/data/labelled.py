"""Labelled images -> items of a supervised detector: the whole image and its mask, moved alike."""

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional as F
from torch.utils.data import Dataset

from patchad.data.datasets import ImageDataset
from patchad.masks import resize_mask
from patchad.types import NOTHING, ImageBatch, given

TURN = 15 / 180 * np.pi
"""Most that an image is turned, either way."""
SHIFT, ZOOM, SHEAR = 0.1, 0.1, 0.1
"""Most that an image is moved, over half of it; that it is made larger or smaller; that a row moves over its height."""


class LabelledDataset(Dataset[ImageBatch]):
    """Training images, normal and defective, each mirrored, turned, moved, zoomed and sheared anew in each epoch.

    An item is an `ImageBatch` without its batch axis whose `mask` lies at the pixels of `image`. How it is moved is a
    function of (seed, epoch, image). What comes in from beyond an edge of the content mirrors the image there.

    Args:
        images: the images.
        seed: of all that is drawn.
    """

    def __init__(self, images: ImageDataset, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int]) -> ImageBatch:
        epoch, number = place
        item = self.images[number]
        motion = drawn_motion(np.random.default_rng((self.seed, epoch, number)))
        height, width = item.content.tolist()
        mask, judged = torch.zeros(2, *item.image.shape[1:], dtype=torch.bool)
        mask[:height, :width] = moved(resize_mask(item.mask, (height, width))[None].float(), motion)[0] > 0.5
        if given(item.region) is not None:
            judged[:height, :width] = moved(item.region[None, :height, :width].float(), motion)[0] > 0.5
        padding = (0, mask.shape[1] - width, 0, mask.shape[0] - height)
        image = F.pad(moved(item.image[:, :height, :width], motion)[None], padding, mode="replicate")[0]
        return item._replace(image=image, mask=mask, region=NOTHING if given(item.region) is None else judged)


def drawn_motion(generator: np.random.Generator) -> Float[torch.Tensor, "2 3"]:
    """An affine map of the plane, in which an image reaches from -1 to 1 along both axes."""
    turn, zoom = generator.uniform(-TURN, TURN), 1 + generator.uniform(-ZOOM, ZOOM)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    sheared = np.array([[1, generator.uniform(-SHEAR, SHEAR)], [0, 1]])
    mirrored = np.diag(generator.choice([-1, 1], 2))
    motion = np.column_stack([zoom * turned @ sheared @ mirrored, generator.uniform(-SHIFT, SHIFT, 2)])
    return torch.from_numpy(motion.astype(np.float32))


def moved(
    image: Float[torch.Tensor, "channels height width"], motion: Float[torch.Tensor, "2 3"]
) -> Float[torch.Tensor, "channels height width"]:
    """An image after an affine map."""
    places = F.affine_grid(motion[None], [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], places, padding_mode="reflection", align_corners=False)[0]
