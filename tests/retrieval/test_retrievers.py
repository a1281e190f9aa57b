"""What every retriever owes, then what each is for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from motionrag.encoders import CaptionEncoder
from motionrag.errors import MotionRAGError
from motionrag.retrieval.database import RetrievalDatabase
from motionrag.retrieval.report import assess
from motionrag.retrieval.retrievers import (
    ImageRetriever,
    LateInteractionRetriever,
    OracleRetriever,
    RandomRetriever,
    TextImageRetriever,
    TextRetriever,
    diverse,
)

CLIPS = 30
KINDS = ("text", "text_diverse", "late_interaction", "image", "text_image", "random", "oracle")


class FakeEncoder:
    """Knows the features of one text or picture."""

    def __init__(self, features, **identity):
        self.features = torch.as_tensor(features)
        self.identity = {"name": "fake", "width": 6, "weights": "0" * 64} | identity

    def encode(self, texts):
        return self.features[None].expand(len(texts), -1)

    def words(self, texts):
        """A direction for each word."""
        return [
            torch.stack(
                [torch.randn(5, generator=torch.Generator().manual_seed(sum(map(ord, w)))) for w in t.split()]
            )
            for t in texts
        ]

    def __call__(self, image):
        assert image.shape == (1, 3, 8, 8)
        return self.features[None].float()


@pytest.fixture
def made(write_database):
    """A database of 30 clips, and ``make(kind)`` -> (retriever, query for the third clip, image)."""
    extra = lambda number: {"action": f"a{number % 3}"}  # noqa: E731
    path, features = write_database((10, 20), extra=extra)
    db, clip = RetrievalDatabase(path), features["c3"]
    text, look = FakeEncoder(clip["caption"]), FakeEncoder(clip["appearance"].astype("f4"))

    def make(kind, **options):
        retriever = {
            "text": lambda **o: TextRetriever(db, text, **o),
            "text_diverse": lambda **o: TextRetriever(db, text, diversity=0.3, **o),
            "late_interaction": lambda **o: LateInteractionRetriever(db, text, **o),
            "image": lambda **o: ImageRetriever(db, look, **o),
            "text_image": lambda **o: TextImageRetriever(db, text, look, **{"pool": 8} | o),
            "random": lambda **o: RandomRetriever(db, **o),
            "oracle": lambda **o: OracleRetriever(db, **o),
        }[kind](**options)
        query = {"oracle": clip["motion"], "late_interaction": "motion 3"}.get(kind, "words")
        return retriever, query, torch.zeros(3, 8, 8)

    return db, features, make


# ---------------------------------------------------------------- the contract


@pytest.mark.parametrize("kind", KINDS)
def test_k_clips_nearest_first_always_the_same(made, kind):
    db, _, make = made
    retriever, query, image = make(kind)
    for k in (1, 7, CLIPS):
        ids, scores = retriever.retrieve(query, k, image=image)
        assert len(ids) == len(set(ids)) == k and set(ids) <= set(db.ids)
        assert scores.dtype == np.float32 and scores.shape == (k,)
        assert (np.diff(scores) <= 0).all() and np.isfinite(scores).all()
        again = make(kind)[0].retrieve(query, k, image=image)
        assert again[0] == ids
        np.testing.assert_array_equal(again[1], scores)
    if kind != "random":
        assert ids[0] == "c3" and scores[0] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_excluded_clips_and_those_that_fail_a_condition_are_never_found(made, kind):
    db, _, make = made
    retriever, query, image = make(kind, where="action!=a1")
    exclude = {"c3", "c0", "unknown"}
    left = {i for i in db.ids if db.clip(i)["action"] != "a1"} - exclude
    for k in (1, 5, len(left)):
        found = retriever.retrieve(query, k, exclude, image=image)[0]
        assert len(set(found)) == k and set(found) <= left
    assert len(left) == 18
    with pytest.raises(
        MotionRAGError, match=r"k=19 is more than the database .* 30 clips \(12 of them excluded"
    ):
        retriever.retrieve(query, 19, exclude, image=image)
    with pytest.raises(MotionRAGError, match="where=colour=red: no column 'colour'; the clips have action"):
        make(kind, where="colour=red")[0].retrieve(query, 1, image=image)


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_there_is_is_an_error(made, kind):
    _, _, make = made
    retriever, query, image = make(kind)
    with pytest.raises(MotionRAGError, match=r"k=31 is more than the database .* has: 30 clips; lower k"):
        retriever.retrieve(query, 31, image=image)
    with pytest.raises(MotionRAGError, match=r"k=30 .* 30 clips \(1 of them excluded\)"):
        retriever.retrieve(query, 30, exclude={"c1"}, image=image)
    with pytest.raises(MotionRAGError, match="k=0: expected at least one"):
        retriever.retrieve(query, 0, image=image)


# ---------------------------------------------------------------- each


def test_text_retrieval_by_words_and_by_embedding(made):
    db, features, make = made
    retriever, _, _ = make("text")
    query = features["c3"]["caption"]
    order = sorted(db.ids, key=lambda i: -float(features[i]["caption"] @ query))
    for form in ("motion 3", query, torch.from_numpy(query)):
        ids, scores = retriever.retrieve(form, 4)
        assert ids == order[:4]
        np.testing.assert_allclose(scores, [features[i]["caption"] @ query for i in ids], atol=1e-6)
    with pytest.raises(MotionRAGError, match=r"embedding has width 4, the captions .* have width 6 \(fake\)"):
        retriever.retrieve(query[:4], 1)
    with pytest.raises(MotionRAGError, match="differ in width"):
        TextRetriever(db, FakeEncoder(query, width=9))


def test_diversity_lets_copies_give_way(write_database):
    embeddings = np.zeros((8, 6), "f4")
    embeddings[:5, 0] = 1  # five times the same caption, the nearest
    for row in (5, 6, 7):
        embeddings[row, [0, row - 4]] = 0.8, 0.6
    path, _ = write_database((8,), embeddings=embeddings)
    db = RetrievalDatabase(path)
    query = np.eye(6, dtype="f4")[0]
    for diversity, others in ((0, 0), (0.6, 3)):
        retriever = TextRetriever(db, FakeEncoder(query), diversity=diversity)
        ids, scores = retriever.retrieve(query, 4)
        assert len({"c5", "c6", "c7"} & set(ids)) == others
        assert scores[0] == pytest.approx(1)
    scores = (embeddings @ query).astype("f4")
    assert diverse(embeddings, scores, 3, 1.0) == [0, 5, 6]
    with pytest.raises(MotionRAGError, match="diversity=2: expected a number from 0"):
        TextRetriever(db, FakeEncoder(query), diversity=2)


def test_late_interaction_compares_words(write_database):
    captions = ["it slides to the left", "it slides to the right", "it glides rightwards", "it grows larger"]
    real = CaptionEncoder()
    encoder = SimpleNamespace(
        encode=real.encode,
        words=real.words,
        identity=FakeEncoder(np.zeros(1)).identity | {"width": real.width},
    )
    path, _ = write_database(
        (4,),
        embeddings=real.encode(captions).numpy(),
        caption_width=real.width,
        extra=lambda number: {"motion_caption": captions[number]},
    )
    db = RetrievalDatabase(path)
    retriever = LateInteractionRetriever(db, encoder)
    ids, scores = retriever.retrieve(captions[0], 4)
    assert ids[0] == "c0" and scores[0] == pytest.approx(1, abs=1e-5) and ids[-1] == "c3"
    words = real.words(captions)
    assert [len(w) for w in words] == [
        5,
        5,
        6,
        3,
    ]  # words as the tokenizer cuts them: "glide ##s right ##wards"
    mean = torch.cat(words).mean(0)
    query = normalize(real.words(["goes to the left"])[0] - mean)
    likeness = [float((query @ normalize(w - mean).T).amax(1).mean()) for w in words]
    ids, scores = retriever.retrieve("goes to the left", 4)
    assert ids == [f"c{row}" for row in np.argsort(likeness)[::-1]] and ids[0] == "c0"
    np.testing.assert_allclose(scores, sorted(likeness)[::-1], atol=1e-5)
    near = TextRetriever(db, encoder).retrieve("goes to the left", 2)[0]
    small = LateInteractionRetriever(db, encoder, pool=2)
    assert set(small.retrieve("goes to the left", 2)[0]) == set(near)
    assert len(small.retrieve("goes to the left", 3)[0]) == 3  # a pool below k is one of k
    for wrong, got in (
        (np.zeros(real.width, "f4"), "an embedding"),
        (" ", "one without words"),
        ("\u200b", "one without words"),
    ):
        with pytest.raises(MotionRAGError, match=f"compares words: expected a text as query, got {got}"):
            retriever.retrieve(wrong, 1)


def test_images_are_compared_by_their_class_tokens(made):
    db, features, make = made
    retriever, query, image = make("image")
    tokens = np.stack([features[i]["appearance"][0].astype("f4") for i in db.ids])
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    truth = tokens @ tokens[3]
    ids, scores = retriever.retrieve(query, 9, image=image[None])
    assert ids == [db.ids[i] for i in np.argsort(-truth)[:9]]
    np.testing.assert_allclose(scores, np.sort(truth)[::-1][:9], atol=1e-5)
    by_features = retriever.retrieve(query, 9, image=torch.from_numpy(features["c3"]["appearance"]))
    assert by_features[0] == ids
    # re-ranking orders what the text finds, and nothing else
    near = set(make("text")[0].retrieve(query, 8)[0])
    reranked, scores = make("text_image")[0].retrieve(query, 5, image=image)
    assert reranked == [i for i in retriever.retrieve(query, CLIPS, image=image)[0] if i in near][:5]
    np.testing.assert_allclose(scores, [truth[db.row(i)] for i in reranked], atol=1e-5)
    for kind in ("image", "text_image"):
        with pytest.raises(MotionRAGError, match="looks at the input picture and got none; give image=FILE"):
            make(kind)[0].retrieve(query, 1)
    with pytest.raises(MotionRAGError, match="appearance encoder fake .* differ in weights"):
        ImageRetriever(db, FakeEncoder(np.zeros((3, 2)), weights="1" * 64))


def test_random_retrieval_is_even_and_repeats(made):
    db, _, _ = made
    retriever = RandomRetriever(db, seed=3)
    assert retriever.retrieve("x", 4)[0] == RandomRetriever(db, seed=3).retrieve("x", 4)[0]
    assert retriever.retrieve("x", 4)[1].tolist() == [0] * 4
    assert retriever.retrieve("x", 20)[0] != RandomRetriever(db, seed=4).retrieve("x", 20)[0]
    firsts = [retriever.retrieve(f"query {i}", 1, exclude={"c0"})[0][0] for i in range(1450)]
    counts = [firsts.count(clip_id) for clip_id in db.ids]
    assert counts[0] == 0
    assert min(counts[1:]) > 25  # 50 expected


def test_the_oracle_finds_the_motion_itself(made):
    db, features, make = made
    oracle = make("oracle")[0]
    assert oracle.retrieve(features["c11"]["motion"], 5)[0][0] == "c11"
    assert "c11" not in oracle.retrieve(features["c11"]["motion"], 5, exclude={"c11"})[0]
    for query, got in (("words", "got a text"), (np.zeros((5, 3)), r"got \(5, 3\)")):
        with pytest.raises(MotionRAGError, match=got):
            oracle.retrieve(query, 1)


# ---------------------------------------------------------------- the report


class ByCaption:
    """Looks captions up in a table: what the encoder would say."""

    identity = FakeEncoder([0.0]).identity

    def __init__(self, embeddings):
        self.embeddings = embeddings

    def encode(self, texts):
        return torch.stack([torch.from_numpy(self.embeddings[text]) for text in texts])


def test_the_report_counts_right_references(write_database):
    """Three actions of two sources each; captions of an action are alike but for one clip in the wrong place."""
    embeddings = np.zeros((12, 6), "f4")
    for number in range(12):
        embeddings[number, number // 4] = 1
        embeddings[number, 3] = 0.01 * number
    embeddings[0] = embeddings[11]  # looks like action a2
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    extra = lambda number: {"action": f"a{number // 4}", "motion_caption": f"motion {max(number, 2)}"}  # noqa: E731
    path, features = write_database((12,), paired=True, embeddings=embeddings, extra=extra)
    db = RetrievalDatabase(path)
    retriever = TextRetriever(db, ByCaption({f"motion {max(n, 2)}": embeddings[n] for n in range(2, 12)}))
    numbers, found = assess(db, retriever, "action", 2, 1000)
    assert (numbers["queries"], numbers["labels"]) == (12, 3)
    assert all(not set(ids) & db.same_source(query) for query, (ids, _) in found.items())
    right = {q: [db.clip(i)["action"] == db.clip(q)["action"] for i in ids] for q, (ids, _) in found.items()}
    assert numbers["recall@1"] == np.mean([line[0] for line in right.values()])
    assert numbers["recall@2"] == np.mean([any(line) for line in right.values()]) < 1.01
    assert numbers["precision@2"] == np.mean(list(right.values()))
    assert numbers["chance"] == pytest.approx(2 / 10)  # of ten clips of other sources two share the action
    assert numbers["same_caption"] == 3 / 12  # c0, c1 and c2
    counts = np.zeros(12)
    for ids, _ in found.values():
        counts[[db.row(i) for i in ids]] += 1
    assert numbers["most_found_times"] == counts.max() and numbers["never_found"] == (counts == 0).mean()
    assert numbers["hubness"] == pytest.approx(((counts - counts.mean()) ** 3).mean() / counts.std() ** 3)
    assert len(assess(db, retriever, "action", 2, 5)[1]) == 5
    with pytest.raises(MotionRAGError, match="label=source: no two sources"):
        assess(db, retriever, "source", 2, 5)
    with pytest.raises(MotionRAGError, match="no column 'verb'"):
        assess(db, retriever, "verb", 2, 5)
