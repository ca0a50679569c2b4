import math

import pytest
import torch
from torch.nn import functional as F

from patchad.errors import PatchadError
from patchad.losses import Clustering, PatchLoss, Position, RelativeSimilarity
from patchad.module import check_names
from tests.contracts import check_loss, some_views


class Spread(PatchLoss):
    """The loss of docs/extend.md."""

    def forward(self, views):
        return -views.anchor.std(dim=0).mean()


@pytest.mark.parametrize("loss", [Position, RelativeSimilarity, Clustering, Spread])
def test_every_loss_keeps_the_contract(loss):
    check_loss(loss())


def test_similarity_equals_a_loop_over_patches():
    views = some_views()
    terms = []
    for one, near, far in zip(views.anchor, views.near, views.far, strict=True):
        cosines = [one @ other / (one.norm() * other.norm()) for other in (far, near)]
        terms.append(sum(abs(a - b) for a, b in zip(one, near, strict=True)) / 64 + cosines[0] - cosines[1])
    torch.testing.assert_close(RelativeSimilarity()(views), sum(terms) / len(terms))


def test_similarity_of_like_near_and_opposite_far_patches_is_its_minimum():
    views = some_views()
    assert RelativeSimilarity()(views._replace(near=views.anchor, far=-views.anchor)).item() == pytest.approx(-2)


def test_the_cosines_of_similarity_do_not_depend_on_the_far_patches_length():
    views, loss = some_views(), RelativeSimilarity()
    torch.testing.assert_close(loss(views), loss(views._replace(far=3 * views.far)))


def test_position_equals_a_loop_that_applies_the_classifier_by_hand():
    views, loss = some_views(), Position()
    first, _, second, _, third = loss.classifier
    total = 0.0
    for one, other, direction in zip(views.anchor, views.neighbour, views.direction, strict=True):
        hidden = F.leaky_relu(first.weight @ (one - other) + first.bias, 0.1)
        logits = third.weight @ F.leaky_relu(second.weight @ hidden + second.bias, 0.1) + third.bias
        total += -(logits[direction] - torch.logsumexp(logits, 0))
    torch.testing.assert_close(loss(views), total / len(views.anchor))


def test_position_of_a_classifier_that_knows_nothing_is_log_12():
    loss = Position()
    torch.nn.init.zeros_(loss.classifier[-1].weight)
    torch.nn.init.zeros_(loss.classifier[-1].bias)
    assert loss(some_views()).item() == pytest.approx(math.log(12))


def test_position_sees_the_difference_of_embeddings_alone():
    views, loss = some_views(), Position()
    moved = views._replace(anchor=views.anchor + 0.3, neighbour=views.neighbour + 0.3)
    torch.testing.assert_close(loss(moved), loss(views))


def test_position_can_be_learned():
    torch.manual_seed(0)
    views, loss = some_views(), Position()
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(views).backward()
        optimizer.step()
    assert loss.watched(views)["position_accuracy"] > 0.95


def test_clustering_equals_a_loop_over_patches():
    views = some_views()
    squares = [
        sum((a - b) ** 2 for a, b in zip(one, views.centroids[label], strict=True)) / 64
        for one, label in zip(views.anchor, views.label, strict=True)
    ]
    torch.testing.assert_close(Clustering()(views), sum(squares) / len(squares))


def test_clustering_of_patches_on_their_centroids_is_zero():
    views = some_views()
    assert Clustering()(views._replace(anchor=views.centroids[views.label])).item() == 0


def test_clustering_draws_each_patch_straight_to_its_centroid():
    """The distance has a gradient, unlike in the code that the paper's authors published."""
    views = some_views()
    Clustering()(views).backward()
    expected = 2 * (views.anchor - views.centroids[views.label]) / views.anchor.numel()
    torch.testing.assert_close(views.anchor.grad, expected.detach())


def test_clustering_does_not_depend_on_the_numbering_of_the_clusters():
    views = some_views()
    order = torch.tensor([3, 0, 4, 1, 2])
    renumbered = views._replace(centroids=views.centroids[order], label=order.argsort()[views.label])
    torch.testing.assert_close(Clustering()(renumbered), Clustering()(views))


def test_a_negative_weight_is_refused():
    with pytest.raises(PatchadError, match=r"weight -1\.0 of Position"):
        Position(weight=-1.0)


def test_two_losses_of_one_name_are_refused():
    with pytest.raises(PatchadError, match="losses holds Clustering more than once"):
        check_names([Clustering(), Position(), Clustering()])
