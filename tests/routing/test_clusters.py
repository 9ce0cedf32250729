"""Clusters: the forms of a file, k-means that keeps its labels, newcomers."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import RoutingError
from raymerge.routing.clusters import Clusters, admit, find_centroids, k_means, parse_clusters, read_clusters
from raymerge.routing.similarity import unit

PEOPLE = ("ann", "bob", "cy")


@pytest.mark.parametrize(
    "value",
    [
        {"ann": "cluster_01", "bob": "cluster_00", "cy": "cluster_01"},
        {"ann": 1, "bob": 0, "cy": 1},
        {"cluster_00": ["bob"], "cluster_01": ["cy", "ann"]},
        {"0": ["bob"], "1": ["ann", "cy"]},
        {"cluster_00": {"personas": ["bob"], "topic": "x"}, "cluster_01": {"personas": ["ann", "cy"]}},
    ],
)
def test_all_forms_of_a_file_say_the_same(tmp_path, value):
    (tmp_path / "c.json").write_text(json.dumps(value))
    clusters = read_clusters(str(tmp_path / "c.json"), PEOPLE)
    assert clusters.labels == {"ann": "cluster_01", "bob": "cluster_00", "cy": "cluster_01"}
    assert clusters.names == ("cluster_00", "cluster_01")
    assert clusters.members("cluster_01") == ("ann", "cy")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"anne": 0, "zed": 0}, "'anne' is no persona. Did you mean ann? Neither are 1 more"),
        ({"a": ["ann"], "b": ["ann"]}, "ann is in cluster_a and in cluster_b"),
        ({"ann": 0.5}, "Expected a label"),
        ({"a": {"members": ["ann"]}}, "Expected a label"),
        ({"a/b": ["ann"]}, "cannot be the name of a folder"),
        ({"a": [7]}, "lists 7"),
        ([], "holds no clusters"),
    ],
)
def test_bad_clusters_are_refused(value, message):
    with pytest.raises(RoutingError) as caught:
        parse_clusters(value, PEOPLE, "c.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("c.json: ")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RoutingError, match="no such file of clusters"):
        read_clusters(str(tmp_path / "c.json"))


def blobs(sizes, seed=0, dimensions=12):
    dice = np.random.default_rng(seed)
    centres = dice.normal(size=(len(sizes), dimensions)) * 3
    points = np.concatenate(
        [centre + dice.normal(size=(n, dimensions)) * 0.3 for centre, n in zip(centres, sizes, strict=True)]
    )
    names = [f"persona_{i:03d}" for i in dice.permutation(len(points))]
    return names, unit(points), np.repeat(np.arange(len(sizes)), sizes)


@given(st.integers(0, 5), st.randoms())
def test_k_means_finds_blobs_labels_them_by_size_and_minds_no_order(seed, dice):
    names, points, truth = blobs([16, 30, 8], seed)
    clusters = k_means(names, points, 3, seed=1)
    assert [len(clusters.members(label)) for label in clusters.names] == [30, 16, 8]
    assert len({(clusters.labels[n], t) for n, t in zip(names, truth, strict=True)}) == 3
    order = list(range(len(names)))
    dice.shuffle(order)
    again = k_means([names[i] for i in order], points[order], 3, seed=1)
    assert again.labels == clusters.labels
    assert all(np.array_equal(again.centroids[c], clusters.centroids[c]) for c in clusters.names)


def test_a_tie_in_size_goes_to_the_first_name():
    names, points, _ = blobs([10, 10], seed=3)
    assert k_means(names, points, 2).labels[min(names)] == "cluster_00"


@pytest.mark.parametrize("count", [0, 4])
def test_more_clusters_than_different_personas_are_refused(count):
    points = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    with pytest.raises(RoutingError, match=f"count is {count}.\nExpected 1 to 3"):
        k_means(list("abcd"), points, count)


def test_newcomers_join_the_nearest_and_nobody_moves():
    names, points, truth = blobs([20, 12, 6])
    old, new = slice(0, None, 2), slice(1, None, 2)
    fitted = k_means(names[old], points[old], 3)
    joined = admit(fitted, names, points)
    assert {n: joined.labels[n] for n in names[old]} == dict(fitted.labels)
    assert len({(joined.labels[n], t) for n, t in zip(names, truth, strict=True)}) == 3
    assert set(joined.labels) == set(names)
    restored = parse_clusters(json.loads(json.dumps(fitted.as_value())))
    assert admit(restored, names[new], points[new]).labels == joined.labels
    moved = Clusters({n: c if c != "cluster_00" else "cluster_01" for n, c in fitted.labels.items()}, fitted.centroids)
    assert admit(moved, names[old], points[old]).labels == moved.labels


def test_newcomers_need_centroids():
    with pytest.raises(RoutingError, match="bob is in none"):
        admit(Clusters({"ann": "cluster_00"}), ["ann", "bob"], np.eye(2, dtype=np.float32))


def test_centroids_of_given_clusters_are_means():
    clusters = find_centroids(
        Clusters({"a": "x", "b": "x", "c": "y"}), ["b", "a"], np.array([[1, 0], [0, 1]], np.float32)
    )
    assert set(clusters.centroids) == {"x"}
    assert clusters.centroids["x"].tolist() == [0.5, 0.5]
