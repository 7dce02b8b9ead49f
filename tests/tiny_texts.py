"""Small data of text and a small GPT-Neo, in the formats of the hub."""

import json

import torch

WORDS = [f"w{i}" for i in range(30)]


def texts(n, words, seed):
    """n texts of so many words, each beginning with its own number."""
    draws = torch.randint(len(WORDS), (n, words), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join([WORDS[i % 30], WORDS[i // 30], *(WORDS[j] for j in row)][:words]) for i, row in enumerate(draws)]


def write_wikitext(folder, *, words):
    """Three splits in parquet, in two files for train, with titles and empty lines between the paragraphs."""
    import datasets

    (folder / "wikitext-103").mkdir(parents=True)
    for name, n, seed in (("train-0", 12, 0), ("train-1", 12, 1), ("validation", 8, 2), ("test", 9, 3)):
        column = [line for text in texts(n, words, seed) for line in ("", " = Title = ", text)]
        datasets.Dataset.from_dict({"text": column}).to_parquet(folder / "wikitext-103" / f"{name}.parquet")


def write_imdb(folder, *, words):
    """Two splits with labels, as lines of JSON."""
    (folder / "imdb").mkdir(parents=True)
    for split, n, seed in (("train", 40, 4), ("test", 12, 5)):
        lines = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts(n, words, seed))]
        (folder / "imdb" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def write_gpt_neo(folder, name, *, positions):
    """A network of one global and one local layer and its tokenizer, as save_pretrained writes them."""
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unknown>", eos_token="<end>")
    config = transformers.GPTNeoConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=2,
        intermediate_size=20,
        max_position_embeddings=positions,
        window_size=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    network = transformers.GPTNeoForCausalLM(config)
    for part in (network, wrapped):
        part.save_pretrained(folder / "models" / name)
