"""Text as tokens: documents are read, held-out ones set apart, a tokenizer is learnt, and all is packed.

Documents stand one after the other with an end-of-text token behind each, cut into windows of one length without
regard to where a document ends; attention sees across that border, as in most pretraining. What was made is kept in a
folder and used again by the same settings and files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynadepth.adapter import atomically
from dynadepth.errors import ConfigError, DataError
from dynadepth.pretraining.recipe import BYTES, PretrainRecipe
from dynadepth.records import is_table, read_json, read_lines, read_rows, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"
PIECE = 1 << 16
"""Characters encoded at once; pieces end at a line's end."""

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Corpus:
    """Packed token ids: `train` and `valid` are uint16 or uint32 `[n]`. `byte_lengths` `[vocabulary]`: bytes of text
    that a token stands for, none for the end of a text. `facts` say what it was made of."""

    train: np.ndarray
    valid: np.ndarray
    tokenizer: PreTrainedTokenizerBase
    byte_lengths: np.ndarray
    facts: dict[str, Any]

    def check_size(self, sequence_length: int, batch_size: int) -> None:
        """Raises DataError for text smaller than one batch, or held-out text smaller than one window."""
        needed = sequence_length * batch_size
        if len(self.train) < needed:
            raise DataError(
                f"The training text has {len(self.train):,} tokens, and one batch takes {needed:,} ({batch_size} "
                f"sequences of {sequence_length}): give more text, or a smaller batch_size or sequence_length."
            )
        if len(self.valid) < sequence_length:
            raise DataError(
                f"The held-out text has {len(self.valid):,} tokens, less than one window of {sequence_length}: "
                "give more, or a larger holdout."
            )

    def windows(self, sequence_length: int, at_most: int) -> np.ndarray:
        """Held-out windows `[n, sequence_length]` of at most so many tokens, at least one, evenly spread."""
        whole = len(self.valid) // sequence_length
        count = max(1, min(whole, at_most // sequence_length))
        places = np.linspace(0, whole - 1, count).round().astype(int)
        return self.valid[: whole * sequence_length].reshape(whole, sequence_length)[places].astype(np.int64)


def prepare(
    recipe: PretrainRecipe, files: Sequence[Path], valid: Sequence[Path], folder: Path, tell: Tell = lambda line: None
) -> Corpus:
    """The corpus of these files, made in `folder` or found there. Raises DataError for files without usable text."""
    facts = facts_of(recipe, files, valid)
    made = folder / "corpus.json"
    if not made.is_file() or read_json(made).get("made_of") != facts:
        _make(recipe, files, valid, folder, facts, tell)
    return load(folder, recipe.start)


def load(folder: Path, start: str = "") -> Corpus:
    """The corpus that was made in a folder; `start` as in its recipe. Raises DataError where there is none."""
    if not (folder / "corpus.json").is_file():
        raise DataError(f"{folder} holds no corpus: give the text with --data FILE.")
    from transformers import AutoTokenizer

    from dynadepth.hub import load_tokenizer

    facts = read_json(folder / "corpus.json")["made_of"]
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "valid", "bytes")}
    tokenizer = load_tokenizer(start) if start else AutoTokenizer.from_pretrained(folder)
    return Corpus(arrays["train"], arrays["valid"], tokenizer, np.array(arrays["bytes"]), facts)


def documents(path: Path) -> Iterator[dict[str, str]]:
    """`text`, and `id` and `split` where the row has them, of a file's documents: a text file is one.

    Raises DataError where the file is missing, empty, damaged, binary, or a table without a text column.
    """
    if not is_table(path):
        rows: list[dict[str, Any]] = [{"text": "".join(read_lines(path))}]
    else:
        rows = read_rows(path)
    found = False
    for number, row in enumerate(rows, start=1):
        text = row.get("text")
        if not isinstance(text, str):
            columns = ", ".join(map(repr, row)) or "none"
            raise DataError(f"Row {number} of {path} has no text in 'text'; its columns are {columns}.")
        if "\x00" in text:
            raise DataError(f"{path} is binary (it holds a zero byte), not plain text.")
        if text.strip():
            found = True
            yield {"text": text, "id": str(row.get("id", "")), "split": str(row.get("split", ""))}
    if not found:
        raise DataError(f"{path} is empty: there is no text to train on.")


def facts_of(recipe: PretrainRecipe, files: Sequence[Path], valid: Sequence[Path]) -> dict[str, Any]:
    """What a corpus depends on: settings, and the files' digests. Raises DataError for a file that is not there, and
    for one that is both trained on and held out."""
    if not files:
        raise ConfigError("Pretraining needs text: give --data FILE (.txt, .jsonl, .jsonl.gz), once or several times.")
    names = ("start", "tokenizer", "vocab_size", "holdout", "validation_ids")
    settings = {name: getattr(recipe, name) for name in names}
    settings["validation_ids"] = list(recipe.validation_ids)
    trained, held_out = _digests(files), _digests(valid)
    for name, digest in held_out.items():
        if twin := next((other for other, same in trained.items() if same == digest), None):
            raise DataError(
                f"--valid {name} holds the same text as --data {twin}: what is trained on is not held out; give "
                "another text, or leave --valid out to hold out the end of the data."
            )
    return {**settings, "files": trained, "validation files": held_out}


def _digests(files: Sequence[Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in files:
        if not path.is_file():
            list(read_lines(path))  # says what is wrong
        if path.name in found:
            raise DataError(f"Two files are called {path.name}: give each a name of its own.")
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def _split(recipe: PretrainRecipe, files: Sequence[Path], valid: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Texts to train on, and texts to validate with."""
    read = [document for path in files for document in documents(path)]
    chosen = set(recipe.validation_ids)
    if missing := chosen - {document["id"] for document in read}:
        raise DataError(f"validation_ids names {sorted(missing)[0]!r}, which no row of the data has as its id.")
    held_out = [d for d in read if (d["id"] in chosen if chosen else d["split"] in ("valid", "validation"))]
    train = [d["text"] for d in read if d["id"] not in chosen and d["split"] not in ("valid", "validation", "test")]
    if valid:
        return train, [document["text"] for path in valid for document in documents(path)]
    if held_out:
        return train, [document["text"] for document in held_out]
    whole = sum(map(len, train))
    left, held = round(whole * recipe.holdout), []
    while left > 0 and train:  # from the end
        last = train.pop()
        held.append(last[-left:])
        if len(last) > left:
            train.append(last[:-left])
        left -= len(held[-1])
    return train, held[::-1]


def _make(
    recipe: PretrainRecipe,
    files: Sequence[Path],
    valid: Sequence[Path],
    folder: Path,
    facts: dict[str, Any],
    tell: Tell,
) -> None:
    """Writes tokenizer, arrays and, last of all, what they were made of."""
    tell("reading text")
    train, held_out = _split(recipe, files, valid)
    if not train:
        raise DataError("All the text is held out: nothing is left to train on.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.json").unlink(missing_ok=True)
    if recipe.start:
        from dynadepth import hub

        tokenizer = hub.load_tokenizer(recipe.start)
    else:
        tell(f"learning a tokenizer on {sum(map(len, train)):,} characters")
        tokenizer = _learn(recipe, train)
        tokenizer.save_pretrained(folder)
    sizes = byte_lengths(tokenizer)
    dtype = np.uint16 if len(sizes) <= 1 << 16 else np.uint32
    for name, texts in (("train", train), ("valid", held_out)):
        tell(f"encoding {name}")
        _save(folder / f"{name}.npy", np.concatenate([np.zeros(0, dtype), *_encode(tokenizer, texts, dtype)]))
    _save(folder / "bytes.npy", sizes)
    write_json(folder / "corpus.json", {"made_of": facts})


def _learn(recipe: PretrainRecipe, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer: of single bytes, or with merges learnt on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257 if recipe.tokenizer == BYTES else recipe.vocab_size,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], dtype: Any) -> Iterator[np.ndarray]:
    """Ids of each text, its end marked."""
    end = tokenizer.eos_token_id
    for text in texts:
        encoded = tokenizer(list(_pieces(text)), add_special_tokens=False, verbose=False)["input_ids"]
        ids = [token for piece in encoded for token in piece] + ([] if end is None else [end])
        yield np.array(ids, dtype=dtype)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about `PIECE` characters, each whole lines where lines are shorter."""
    held: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Bytes of text that each token stands for, int64 `[vocabulary]`; special tokens stand for none.

    Of a byte-level vocabulary this is exact: each character of a token is one byte.
    """
    sizes = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    special = set(tokenizer.all_special_ids)
    for token, index in tokenizer.get_vocab().items():
        sizes[index] = 0 if index in special else len(token)
    return sizes


def _save(path: Path, array: np.ndarray) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # np.save adds a suffix to a name
            np.save(file, array)

    try:
        atomically(path, write)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
