"""The options of text that becomes tokens, which `gptfast prepare` and `gptfast train` share."""

from __future__ import annotations

from dataclasses import dataclass

from gptfast._options import option

SHARD_TOKENS = 100_000_000  # of a token file: 200 MB of GPT-2's ids


@dataclass(frozen=True)
class DataOptions:
    """What to read, and how to cut it into tokens; the arguments of `gptfast.data.prepare`."""

    data: str = option(
        "shakespeare",
        "The text: 'shakespeare' (42 plays and poems, built in), 'shakespeare:comedy,poetry' (some of them), a UTF-8 text "
        "file, a folder whose .txt files are one document each, a file or folder of records or a folder of Hugging Face's "
        "datasets (see `text_field`), or, for training, a mixture: a .toml file of [[source]] tables with name, data and weight.",
    )
    glob: list[str] | None = option(
        None, "Which files of a folder to read, such as '*.md'; may be given several times.", words="*.txt"
    )
    text_field: str | None = option(
        None,
        "The field of a record that is the text, in .jsonl, .json, .csv, .tsv, .parquet and .arrow files and in folders of "
        "Hugging Face's datasets; each record is a document.",
    )
    tokenizer: str = option(
        "gpt2",
        "How to cut text into tokens. gpt2: GPT-2's 50257 subwords, to compare with it or to fine-tune it. char: one token "
        "per character, best for a small model and minutes of training. word: one per word. bpe: subwords learnt from your "
        "text. wordpiece: BERT's kind of subwords, in lower case, learnt from your text. Or the FOLDER of a checkpoint, to use its tokenizer.",
    )
    vocab_size: int | None = option(
        None,
        "How many tokens bpe, wordpiece or word learns. More tokens make shorter sequences and a larger embedding matrix.",
        words="8192 for bpe and wordpiece, all words for word",
    )
    unk: bool = option(
        False, "char: a token <|unk|> for characters that the text does not have; without it they are an error."
    )
    val_fraction: float = option(
        0.1,
        "Part of the text that training never sees, to measure how well the model predicts new text; in (0, 1). Whole "
        "documents are kept where there are enough.",
    )
    seed: int = option(0, "Chooses the documents for validation.")
