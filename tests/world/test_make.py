"""A world on disk: read by the rooms below, the same from the same seed, never mixed with another."""

import json
from pathlib import Path

import numpy as np
import pytest

from raymerge import storage
from raymerge.errors import PersonaError
from raymerge.personas import read_personas
from raymerge.routing.embeddings import read_embeddings
from raymerge.world import make_world
from raymerge.world.population import QUICK, populate

FILES = ("personas.jsonl", "clusters.json", "traits.parquet", "world.json")


def test_the_files_are_what_the_rooms_below_read(tmp_path: Path) -> None:
    figures = make_world(str(tmp_path), quick=True, embedding_model=None)
    population = populate(QUICK)
    personas = read_personas(str(tmp_path / "personas.jsonl"))
    assert personas.names == population.names
    assert len(personas.examples(personas.names[0], "train")) == QUICK.train
    clusters = json.loads((tmp_path / "clusters.json").read_text())
    assert sorted(clusters) == list(population.names)
    assert sorted(set(clusters.values())) == ["cluster_00", "cluster_01", "cluster_02"]
    traits = read_embeddings(str(tmp_path / "traits.parquet"))
    np.testing.assert_allclose(traits.vectors, population.traits, atol=1e-6)
    assert figures["personas"] == 24
    assert figures["clusters"] == 3
    assert "five_by_embedding" not in figures


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_world(str(tmp_path / name), quick=True, seed=3, embedding_model=None)
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_world_that_is_there_is_left_alone_and_a_damaged_one_made_again(tmp_path: Path) -> None:
    first = make_world(str(tmp_path), quick=True, embedding_model=None)
    before = {file: (tmp_path / file).stat().st_mtime_ns for file in FILES}
    assert make_world(str(tmp_path), quick=True, embedding_model=None) == first
    assert {file: (tmp_path / file).stat().st_mtime_ns for file in FILES} == before
    content = (tmp_path / "personas.jsonl").read_bytes()
    (tmp_path / "personas.jsonl").write_bytes(content[:100])
    make_world(str(tmp_path), quick=True, embedding_model=None)
    assert (tmp_path / "personas.jsonl").read_bytes() == content


def test_another_world_in_the_folder_is_refused_with_the_difference(tmp_path: Path) -> None:
    make_world(str(tmp_path), quick=True, embedding_model=None)
    with pytest.raises(PersonaError, match=r"relatedness: 0\.95 there, 0\.5 asked for"):
        make_world(str(tmp_path), quick=True, relatedness=0.5, embedding_model=None)


def test_texts_carry_the_traits(tmp_path: Path) -> None:
    sizes = (6, 12, 8)
    related = make_world(str(tmp_path / "related"), quick=True, cluster_sizes=sizes)
    unrelated = make_world(str(tmp_path / "unrelated"), quick=True, cluster_sizes=sizes, relatedness=0)
    assert related["trait_correlation"] > 0.4
    assert abs(unrelated["trait_correlation"]) < 0.25
    assert storage.read_json(str(tmp_path / "related" / "world.json"))["figures"] == related
