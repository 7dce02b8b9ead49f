"""The Trainer mixin adds (λ/N) Σ |f| and nothing else; a Trainer's two networks give the response of MeanAbsolute."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install bdl-bench[text]")
pytest.importorskip("accelerate", reason="needs the extra: pip install bdl-bench[text]")

from estimators import LinearResponse, MeanAbsolute, RegVar  # noqa: E402
from estimators.errors import DataError  # noqa: E402
from estimators.integrations import MeanAbsoluteTraining, RegularizedPair  # noqa: E402

N, LENGTH, WORDS = 22, 6, 40


class RegularizedTrainer(MeanAbsoluteTraining, transformers.Trainer):
    pass


def small(kind, **options):
    torch.manual_seed(0)
    if kind == "causal":
        shape = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(**shape, **dropout, bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    return transformers.BertForSequenceClassification(config)


def rows(kind, n=N):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (n, LENGTH), generator=g)
    labels = ids.clone() if kind == "causal" else torch.randint(0, 3, (n,), generator=g)
    if kind == "causal":
        labels[::3, -2:] = -100
    pairs = zip(ids, labels, strict=True)
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": label} for i, label in pairs]


def trainer(model, data, tmp_path, **options):
    settings = {"lam": 0.2, "causal": False, "n_data": None}
    settings.update({name: options.pop(name) for name in list(options) if name in settings})
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **options
    )
    return RegularizedTrainer(model, arguments, train_dataset=data, **settings)


def batch_of(data):
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def test_the_term_is_lambda_over_n_times_the_mean_size_of_the_logits(tmp_path):
    model, data = small("classification").train(), rows("classification")
    batch = batch_of(data[:7])
    plain = model(**batch)
    found = trainer(model, data, tmp_path).compute_loss(model, batch)
    assert torch.allclose(found, plain.loss + 0.2 / N * plain.logits.abs().mean(), rtol=1e-6)
    model.eval()
    assert torch.allclose(trainer(model, data, tmp_path).compute_loss(model, batch), model(**batch).loss)


def test_tokens_without_a_label_do_not_count_and_causal_labels_are_shifted(tmp_path):
    model, data = small("causal").eval(), rows("causal")
    batch = batch_of(data[:7])
    logits = model(**batch).logits.detach()
    model.train()
    made = trainer(model, data, tmp_path, causal=True, n_data=100, lam=50.0)
    counted = batch["labels"][:, 1:] != -100
    size = logits[:, :-1].abs().mean(-1)[counted]
    plain = model(**batch).loss
    assert torch.allclose(made.compute_loss(model, batch) - plain, 50.0 / 100 * size.mean(), rtol=1e-4)
    items = torch.tensor(60)  # of all the batches that one step accumulates
    found = made.compute_loss(model, batch, num_items_in_batch=items) - model(**batch, num_items_in_batch=items).loss
    assert torch.allclose(found, 50.0 / 100 * size.sum() / 60, rtol=1e-4)


def test_two_networks_of_a_trainer_give_the_response_of_the_classifier(tmp_path):
    model, data = small("classification"), rows("classification")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("classifier"))

    class WithPrior(RegularizedTrainer):
        def compute_loss(self, model, inputs, **keywords):
            prior = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
            return super().compute_loss(model, inputs, **keywords) + 0.5 * 5.0 / N * prior

    def train(network, lam):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            num_train_epochs=100,
            per_device_train_batch_size=N,
            learning_rate=0.5,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
        )
        WithPrior(network, arguments, train_dataset=data, lam=lam).train()
        return network.double().eval()

    plain = train(copy.deepcopy(model), 1e-12)
    regularized = train(copy.deepcopy(plain).float().train(), 1.0)
    loader = [batch_of(data[i : i + 5]) for i in range(0, N, 5)]
    query = {name: tensor for name, tensor in batch_of(data[:6]).items() if name != "labels"}
    found = (
        RegularizedPair(plain, regularized, "classification", lam=1.0, prior_precision=5.0).fit(loader).variance(query)
    )
    exact = RegVar(
        plain,
        "classification",
        prior_precision=5.0,
        regularizer=MeanAbsolute(),
        solver=LinearResponse(tol=1e-10),
    )
    reference = exact.fit(loader).variance(query)
    assert float((found - reference).abs().max() / reference.max()) < 0.05


def test_without_training_rows_it_says_so(tmp_path):
    model, data = small("classification").train(), rows("classification")
    with pytest.raises(DataError, match="a train_dataset"):
        trainer(model, None, tmp_path).compute_loss(model, batch_of(data[:3]))
