import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs

from patchad.clustering import PseudoLabels, churn, kmeans
from patchad.errors import PatchadError


@pytest.fixture(scope="module")
def blobs() -> torch.Tensor:
    points, _ = make_blobs(n_samples=600, n_features=8, centers=6, cluster_std=0.3, random_state=0)
    return torch.from_numpy(points).float()


def test_centroids_from_one_start_equal_scikit_learns(blobs):
    start = blobs[::100]
    found = kmeans(blobs, 6, start, iterations=25)
    expected = KMeans(6, init=start.numpy(), n_init=1, max_iter=25, tol=0).fit(blobs.numpy()).cluster_centers_
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_centroids(blobs):
    assert torch.equal(kmeans(blobs, 6, seed=3), kmeans(blobs, 6, seed=3))


def test_empty_clusters_are_refilled(blobs):
    start = torch.cat([blobs[:2], torch.full((8, 8), 1e3)])  # eight centroids that no patch is near
    labels = PseudoLabels(10, 8)
    labels.centroids.copy_(start)
    labels.ready.fill_(True)
    assert torch.bincount(labels(blobs), minlength=10).min() == 0
    labels.refit(blobs)
    assert torch.bincount(labels(blobs), minlength=10).min() > 0


def test_a_refit_starts_from_the_last_centroids(blobs):
    labels = PseudoLabels(6, 8)
    labels.refit(blobs)
    before = labels(blobs)
    labels.refit(blobs + 0.01)
    assert churn(before, labels(blobs + 0.01)) < 0.05  # the clusters keep their numbers
    labels.refit(blobs)
    before = labels(blobs)
    with torch.no_grad():
        labels.centroids.copy_(labels.centroids.flip(0))
    labels.refit(blobs)
    assert torch.equal(labels(blobs), 5 - before)  # from where they are, not from the seed
    other = PseudoLabels(6, 8, seed=1)
    other.refit(blobs)
    assert churn(before, other(blobs)) > 0.3


def test_a_pseudo_label_is_the_number_of_the_nearest_centroid_and_has_no_gradient(blobs):
    labels = PseudoLabels(6, 8)
    labels.refit(blobs)
    found = labels(blobs.clone().requires_grad_())
    slow = [min(range(6), key=lambda number: (one - labels.centroids[number]).norm().item()) for one in blobs]
    assert found.tolist() == slow and not found.requires_grad


def test_fewer_patches_than_clusters_are_refused():
    with pytest.raises(PatchadError, match="50 clusters need as many patches, there are 20"):
        kmeans(torch.rand(20, 4), 50)


@pytest.mark.gpu
def test_the_gpu_finds_the_centroids_of_the_cpu(blobs):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    start = blobs[::100]
    torch.testing.assert_close(
        kmeans(blobs.cuda(), 6, start.cuda()).cpu(), kmeans(blobs, 6, start), rtol=1e-3, atol=1e-3
    )
