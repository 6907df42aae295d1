"""Nearest neighbours on the devices: scikit-learn's answer, without a matrix of all pairs."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.metrics.pairwise import cosine_distances
from sklearn.neighbors import KNeighborsClassifier

from beit_jax import knn, sharding

CLASSES = 5


def placed(x, labels, rows, devices):
    """[F, N, D] and [N] as chunks of `rows`, filled up, on the devices; and their mesh."""
    mesh = sharding.make_mesh(1, jax.devices()[:devices])
    chunks = -(-len(labels) // rows)
    features = np.zeros((x.shape[0], chunks * rows, x.shape[2]), np.float32)
    features[:, : len(labels)] = x
    features = features.reshape(x.shape[0], chunks, rows, -1).swapaxes(0, 1)
    filled = np.full(chunks * rows, -1, np.int32)
    filled[: len(labels)] = labels
    return (
        jax.device_put(features, NamedSharding(mesh, P(None, None, *sharding.BATCH))),
        jax.device_put(filled.reshape(chunks, rows), NamedSharding(mesh, P(None, *sharding.BATCH))),
        mesh,
    )


def search(queries, x, labels, k, *, rows=32, devices=8):
    features, labels, mesh = placed(np.float32(x), labels, rows, devices)
    found = jax.jit(lambda *a: knn.nearest(*a, k=k, mesh=mesh))(
        np.float32(queries), features, labels
    )
    return jax.tree.map(np.asarray, found)


def vote(found, k):
    return np.asarray(knn.vote(jax.tree.map(jax.numpy.asarray, found), k))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("spread", [1.0, 1e-2], ids=["wide", "all but one direction"])
def test_neighbours_and_votes_are_scikit_learns(devices, spread):
    """203 images, which no number of devices divides, of two kinds of features."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 203)
    x, queries = (np.float32(1 + spread * rng.normal(size=(2, n, 24))) for n in (203, 50))
    found = search(queries, x, labels, 20, devices=devices)
    guesses = {k: vote(found, k) for k in (1, 7, 20)}
    for kind in range(2):
        exact = cosine_distances(queries[kind].astype(float), x[kind].astype(float))
        of_found = np.take_along_axis(exact, found.index[kind], axis=1)
        np.testing.assert_allclose(of_found, np.sort(exact, axis=1)[:, :20], rtol=1e-4)
        np.testing.assert_allclose(found.distance[kind], of_found, rtol=2e-3)
        np.testing.assert_array_equal(found.labels[kind], labels[found.index[kind]])
        for k, chosen in guesses.items():
            theirs = KNeighborsClassifier(
                k, metric="precomputed", weights=lambda distance: np.exp((1 - distance) / 0.07)
            ).fit(np.zeros((203, 203)), labels)
            np.testing.assert_array_equal(chosen[kind], theirs.predict(exact))


@pytest.mark.parametrize("devices", [1, 8])
def test_of_equally_near_images_the_earlier_is_taken(devices):
    x = np.tile(np.eye(4), (1, 20, 1))  # each of four directions at every fourth place
    found = search(x[:, :4], x, np.arange(80) % CLASSES, 5, devices=devices, rows=16)
    np.testing.assert_array_equal(found.index[0], np.arange(4)[:, None] + 4 * np.arange(5)[None])


def test_rows_without_a_label_are_nobodys_neighbours():
    x = np.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    found = search(x[:, :1], x, np.array([-1, 2, 1, 0]), 4, rows=8)
    assert found.index[0, 0, :3].tolist() == [1, 2, 3]
    assert np.isinf(found.distance[0, 0, 3])
    assert vote(found, 4).tolist() == [[2]]  # who is not there has no vote


def test_a_close_neighbour_outvotes_two_far_ones():
    x = np.array([[[1.0, 0.0], [0.5, 1.0], [0.5, 1.0]]])
    found = search([[[1.0, 0.1]]], x, np.array([3, 1, 1]), 3, rows=8)
    assert vote(found, 3).tolist() == [[3]]


def test_of_equal_votes_the_first_class_is_taken():
    x = np.array([[[1.0, 1.0], [1.0, -1.0]]])
    found = search([[[1.0, 0.0]]], x, np.array([4, 2]), 2, rows=8)
    assert vote(found, 2).tolist() == [[2]]


def test_no_array_holds_all_pairs():
    """What is worked with stays below the distances of all queries to a device's images."""
    queries, images = 256, 8 * 4096
    x = np.zeros((1, images, 8))
    features, labels, mesh = placed(x, np.zeros(images, np.int32), 64, 8)
    searching = jax.jit(lambda *a: knn.nearest(*a, k=10, mesh=mesh))
    compiled = searching.lower(np.zeros((1, queries, 8), np.float32), features, labels).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * queries * images / 8 / 4
