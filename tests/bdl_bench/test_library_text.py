"""Text of the standard library: the same on every call, labelled by topic, and in rows of characters."""

import torch

from bdl_bench.tasks.library_text import TOPICS, as_characters, labelled_sentences, sentences


def test_sentences_are_of_the_stated_length_and_come_once():
    found = sentences(TOPICS["unittest"])
    assert len(found) > 100
    assert found == sorted(set(found))
    assert all(40 <= len(text) <= 200 and "\n" not in text for text in found)
    assert "Return the first string as centred." not in found
    assert any("assert" in text.lower() for text in found)


def test_labels_follow_their_sentences_through_the_shuffle():
    texts, labels = labelled_sentences(15, seed=3)
    assert labels.bincount().tolist() == [15, 15, 15]
    for text, label in zip(texts, labels.tolist(), strict=True):
        assert text in sentences(list(TOPICS.values())[label])
    assert labelled_sentences(15, seed=3)[0] == texts
    assert labelled_sentences(15, seed=4)[0] != texts


def test_characters_are_ascii_codes_in_rows_of_one_length():
    rows = as_characters(["abc", "dé", "fgh"], length=4)
    assert "".join(map(chr, rows.flatten().tolist())) == "abc\nd?\nf"
    assert rows.shape == (2, 4)
    assert rows.dtype == torch.int64
