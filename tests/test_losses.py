import math

import pytest
import torch
from torch.nn import functional as F

from patchad.errors import PatchadError
from patchad.learning import check_directions, check_losses
from patchad.losses import Clustering, PatchLoss, Position, RelativeSimilarity, Separation, nearest_distance
from tests.contracts import check_loss, some_views


class Spread(PatchLoss):
    """The loss of docs/extend.md."""

    def forward(self, views):
        return -views.anchor.std(dim=0).mean()


@pytest.mark.parametrize("loss", [Position, RelativeSimilarity, Clustering, Separation, Spread])
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
        sum((a - b) ** 2 for a, b in zip(one, views.centroids[label], strict=True))
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
    expected = 2 * (views.anchor - views.centroids[views.label]) / len(views.anchor)
    torch.testing.assert_close(views.anchor.grad, expected.detach())


def test_clustering_does_not_depend_on_the_numbering_of_the_clusters():
    views = some_views()
    order = torch.tensor([3, 0, 4, 1, 2])
    renumbered = views._replace(centroids=views.centroids[order], label=order.argsort()[views.label])
    torch.testing.assert_close(Clustering()(renumbered), Clustering()(views))


def test_separation_equals_a_loop_over_pairs():
    views, loss = some_views(), Separation(least_share=0.3)
    own = [
        min((one - other).norm() for other, its in zip(views.normal, views.thing, strict=True) if its != thing)
        for one, thing in zip(views.normal, views.thing, strict=True)
    ]
    touched = [one for one, share in zip(views.painted, views.share, strict=True) if share >= 0.3]
    painted = [min((one - other).norm() for other in views.normal) for one in touched]
    unit = 0.5 * sum(own) / len(own)
    terms = [torch.log1p(torch.exp((a - b) / unit)) for a in own for b in painted]
    assert 0 < len(touched) < len(views.painted)
    torch.testing.assert_close(loss(views), sum(terms) / len(terms))


def test_separation_bounds_the_share_of_pairs_in_the_wrong_order():
    """log 2 for a tie, so log2(1 + exp(x)) is at least 1 where a normal patch lies farther than a painted one."""
    views = some_views()
    own = nearest_distance(views.normal, views.normal, views.thing[:, None] == views.thing)
    painted = nearest_distance(views.painted, views.normal)
    wrong = (own[:, None] > painted).float().mean()
    assert 0 < wrong <= Separation(least_share=0.0)(views) / math.log(2)


def test_separation_knows_no_unit():
    views, loss = some_views(), Separation()
    larger = views._replace(normal=7 * views.normal, painted=7 * views.painted)
    torch.testing.assert_close(loss(larger), loss(views))


@pytest.mark.parametrize("change", [{"thing": torch.zeros(60)}, {"share": torch.zeros(30)}])
def test_separation_of_nothing_to_compare_is_zero_with_a_gradient(change):
    views = some_views()._replace(**change)
    value = Separation(least_share=0.1)(views)
    value.backward()
    assert value == 0 and (views.normal.grad == 0).all()


def test_separation_of_normal_patches_that_are_all_the_same_has_a_finite_gradient():
    views = some_views()
    normal = torch.ones_like(views.normal).requires_grad_()
    Separation()(views._replace(normal=normal)).backward()
    assert normal.grad.isfinite().all()


def test_separation_thins_out_evenly_to_the_most_that_it_compares():
    views = some_views()._replace(thing=torch.arange(60))
    third, half = slice(None, None, 3), slice(None, None, 2)
    fewer = views._replace(normal=views.normal[third], thing=views.thing[third])
    fewer = fewer._replace(painted=views.painted[half], share=views.share[half])
    torch.testing.assert_close(Separation(least_share=0.0, most=20)(views), Separation(least_share=0.0)(fewer))


def test_separation_that_compares_nothing_is_refused():
    with pytest.raises(PatchadError, match=r"least_share 2.0 must be at least 0 and at most 1"):
        Separation(least_share=2.0)


def test_a_negative_weight_is_refused():
    with pytest.raises(PatchadError, match=r"weight of Position -1\.0 must be at least 0"):
        Position(weight=-1.0)


def test_two_losses_of_one_name_are_refused():
    with pytest.raises(PatchadError, match="losses holds Clustering more than once"):
        check_losses([Clustering(), Position(), Clustering()])


@pytest.mark.parametrize("needs", [("centroid",), ("centroids")])
def test_a_loss_that_needs_what_there_never_is_is_refused(needs):
    class Wrong(Spread):
        pass

    Wrong.needs = needs
    with pytest.raises(PatchadError, match=r"needs of Wrong is .*centroid.*; it must be a tuple of .*centroids"):
        check_losses([Wrong()])


def test_position_names_both_dims_where_they_differ():
    with pytest.raises(PatchadError, match="Position has dim 32, embeddings have 64"):
        Position(dim=32)(some_views())


def test_position_of_eight_directions_tells_these_apart():
    views = some_views()
    views = views._replace(direction=views.direction % 8)
    assert Position(directions=8).logits(views).shape == (40, 8)
    check_directions([Clustering(), Position(directions=8)], 8)
    with pytest.raises(PatchadError, match=r"tells 12 directions .* lie in 8; give its directions and model\."):
        check_directions([Clustering(), Position()], 8)


def test_losses_weigh_what_the_paper_says():
    assert [loss().weight for loss in (Position, RelativeSimilarity, Clustering, Separation)] == [1.0, 1e-3, 1e-3, 1.0]


def test_a_patch_of_which_the_least_share_is_painted_counts():
    views = some_views()._replace(share=torch.full((30,), 0.25))
    assert Separation(least_share=0.25)(views) == Separation(least_share=0.0)(views) > 0
    assert Separation(least_share=0.26)(views) == 0
