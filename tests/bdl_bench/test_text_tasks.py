"""The text tasks that need no download: their rows, their sizes, and that a network learns from them."""

import pytest
import torch

from bdl_bench.data.pretrained import package
from bdl_bench.data.token_rows import TokenRows, drawn_rows
from bdl_bench.networks.sentence import SentenceClassifier
from bdl_bench.problem.flatten import flat_rows
from bdl_bench.problem.queries import queries, rows
from bdl_bench.records.problem_digest import problem_digest
from bdl_bench.tasks import TASKS, causal_lm
from estimators.baselines import MAP
from estimators.errors import DataError, UnsupportedError
from estimators.models.outputs import output_tensor
from estimators.runtime import optional
from estimators.training import Recipe, train_map

NEEDS = "needs the extra: pip install bdl-bench[text]"


@pytest.fixture(scope="module")
def problem():
    """The task causal-lm, seed 0, made once."""
    pytest.importorskip("transformers", reason=NEEDS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield TASKS["causal-lm"].problem(0)
    torch.set_num_threads(threads)


def n_rows(loader):
    return sum(len(query) for query in queries(loader))


def test_the_text_task_has_the_sizes_that_it_states(problem):
    assert problem.n_parameters == 4848
    assert problem.likelihood.kind == "classification"
    assert tuple(map(n_rows, (problem.train, problem.validation, problem.test))) == (384, 60, 150)
    assert n_rows(problem.ood["source-code"]) == 60
    assert TASKS["causal-lm"].needs == 'the extra "text"'


def test_a_seed_determines_a_text_task(problem):
    digest = problem_digest(problem)
    assert problem_digest(TASKS["causal-lm"].problem(0)) == digest
    assert problem_digest(TASKS["causal-lm"].problem(1)) != digest


def test_no_text_is_in_two_parts(problem):
    loaders = (problem.train, problem.validation, problem.test, *problem.ood.values())
    parts = [{row.numpy().tobytes() for q in queries(loader) for row in q.x["input_ids"]} for loader in loaders]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 654


def test_a_network_learns_from_the_text(problem):
    recipe = Recipe(epochs=12, batch_size=16, lr=5e-3)
    delta = problem.prior_precision
    network = problem.make_model()
    train_map(network, problem.likelihood, problem.train, prior_precision=delta, recipe=recipe)
    found = MAP(network, problem.likelihood, prior_precision=delta).fit(problem.train)
    hits = []
    for batch in rows(problem.test):
        flat, targets = flat_rows(found.predict(batch.x), batch.y, problem.likelihood)
        hits.append((flat.probs.argmax(-1) == targets).double())
    assert torch.cat(hits).mean() > 0.2  # .18 for the space


def test_scored_are_the_last_characters_of_a_window_and_they_are_the_same_after_typos(problem):
    for shifted in problem.shifts.values():
        for plain, typos in zip(rows(problem.test), rows(shifted), strict=True):
            assert torch.equal(plain.y[:, 1:], typos.y[:, 1:])
            assert torch.equal(plain.x["input_ids"][:, -4:], typos.x["input_ids"][:, -4:])
    batch = next(rows(problem.test))
    whole = problem.model(input_ids=batch.x["input_ids"]).logits
    assert torch.allclose(output_tensor(problem.model(**batch.x)), whole[:, -5:])
    flat, targets = flat_rows(problem.likelihood.predict(whole[:, -5:], whole[:, -5:] ** 2, None), batch.y,
                              problem.likelihood)  # fmt: skip
    assert torch.equal(targets, batch.x["input_ids"][:, -4:].flatten())
    assert torch.equal(flat.mean, whole[:, -5:-1].flatten(0, 1))


def test_more_severe_shifts_have_more_typos(problem):
    plain = torch.cat([batch.x["input_ids"] for batch in rows(problem.test)])
    shares = []
    for severity in range(1, 6):
        typos = torch.cat([batch.x["input_ids"] for batch in rows(problem.shifts[f"typos-{severity}"])])
        shares.append(float((typos != plain)[:, :-4].double().mean()))
    expected = [rate * 31 / 32 for rate in (0.05, 0.1, 0.2, 0.35, 0.5)]
    assert shares == pytest.approx(expected, abs=0.03)


def test_characters_are_those_of_the_alphabet():
    found = causal_lm._codes("Ab 7é\n.")
    assert "".join(causal_lm._ALPHABET[i] for i in found) == "ab 0?\n."
    assert len(causal_lm._ALPHABET) == 32


class Echo:
    """A tokenizer with a token a word, by its length."""

    eos_token_id, pad_token_id = 99, None

    def __call__(self, texts, *, truncation, max_length):
        assert truncation
        return {"input_ids": [[len(word) for word in text.split()][:max_length] for text in texts]}


def test_short_texts_are_padded_and_padding_has_no_label():
    found = TokenRows.of(["a bb ccc", "dddd", "a b c d e"], Echo(), 4)
    assert found.ids.tolist() == [[1, 2, 3, 99], [4, 99, 99, 99], [1, 1, 1, 1]]
    first, last = found.training(batch_size=2)
    assert first["labels"].tolist() == [[1, 2, 3, -100], [4, -100, -100, -100]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert len(last["input_ids"]) == 1
    with pytest.raises(DataError, match="without padding"):
        found.scored(2, batch_size=2)
    (scored,) = TokenRows.of(["a bb ccc dd"], Echo(), 4).scored(2, batch_size=2)
    assert scored["labels"].tolist() == [[2, 3, 2]]
    assert scored["logits_to_keep"] == 3


class Table(list):
    def select(self, index):
        return [self[i]["text"] for i in index]


def test_rows_are_drawn_by_the_seed_and_short_texts_passed_over():
    table = Table({"text": " ".join(["w"] * n)} for n in range(30))
    drawn = drawn_rows(table, 10, 3, least_words=5)
    assert len(set(drawn)) == 10
    assert min(len(text.split()) for text in drawn) >= 5
    assert drawn_rows(table, 10, 3, least_words=5) == drawn
    assert drawn_rows(table, 10, 4, least_words=5) != drawn
    assert len(drawn_rows(table, 100, 3, least_words=5)) == 25


def test_a_missing_extra_is_named(monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(optional, "import_module", missing)
    with pytest.raises(UnsupportedError, match=r"transformers.*pip install \"bdl-bench\[text\]\""):
        package("transformers.models", extra="text")


def test_a_sentence_is_the_mean_of_its_tokens():
    found = SentenceClassifier(lambda hidden, blocked: hidden + blocked[:, 0, 0, :, None].clamp(min=-1), 2, 3)
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    by_hand = torch.stack([hidden[0, :2].mean(0), hidden[1, 0]])
    assert torch.allclose(found(hidden, mask), found.head(by_hand))
