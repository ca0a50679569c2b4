"""What every member of a family must keep; call these on your own classes, too (docs/extend.md)."""

import copy
import json

import torch

from patchad.losses import PatchLoss
from patchad.spec import spec
from patchad.types import PatchViews

ANCHORED = ("anchor", "near", "far", "neighbour", "direction", "label")
"""Fields of `PatchViews` that hold one value for each anchor."""


def some_views(dim: int = 64, patches: int = 40, clusters: int = 5) -> PatchViews:
    """Embeddings with gradients, as the losses get them after the warm-up."""
    generator = torch.Generator().manual_seed(0)
    anchor, near, far, neighbour = (
        torch.randn(patches, dim, generator=generator).tanh().requires_grad_() for _ in range(4)
    )
    centroids = torch.randn(clusters, dim, generator=generator).tanh()
    normal, painted = (torch.randn(count, dim, generator=generator).tanh().requires_grad_() for count in (60, 30))
    return PatchViews(
        side=32,
        anchor=anchor,
        near=near,
        far=far,
        neighbour=neighbour,
        direction=torch.randint(12, (patches,), generator=generator),
        label=torch.randint(clusters, (patches,), generator=generator),
        centroids=centroids,
        normal=normal,
        thing=torch.arange(60) % 3,
        painted=painted,
        share=torch.rand(30, generator=generator),
    )


def check_loss(loss: PatchLoss, dim: int = 64) -> None:
    """A loss is a finite number with a gradient, the same whatever the order of the patches, and can be stored."""
    views = some_views(dim)
    value = loss(views)
    assert value.ndim == 0 and value.isfinite()
    value.backward()
    embeddings = views.anchor, views.near, views.far, views.neighbour, views.normal, views.painted
    read = [one for one in embeddings if one is not None]
    assert any(one.grad is not None and one.grad.abs().sum() > 0 for one in read), "no embedding has a gradient"
    shuffled = views
    for names in (ANCHORED, ("normal", "thing"), ("painted", "share")):
        order = torch.randperm(len(getattr(views, names[0])), generator=torch.Generator().manual_seed(1))
        shuffled = shuffled._replace(**{name: getattr(views, name)[order] for name in names})
    torch.testing.assert_close(loss(shuffled), value, rtol=1e-4, atol=1e-5)
    own = copy.deepcopy(loss)
    torch.testing.assert_close(own(views), value)
    assert not {id(one) for one in own.parameters()} & {id(one) for one in loss.parameters()}
    assert set(loss.needs) <= set(PatchViews._fields)
    json.dumps(spec(loss))  # an error says which argument a checkpoint could not hold
