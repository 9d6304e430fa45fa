"""Text to ids and back: one file a kind of tokenizer, chosen by the files that a directory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from lightseq_backend.config import Config, TransformerConfig
from lightseq_backend.errors import ConfigError, RequestError
from lightseq_backend.text.huggingface import load_file, load_gpt2
from lightseq_backend.text.marian import FILES, load_marian
from lightseq_backend.text.multilingual import MODEL, load_multilingual
from lightseq_backend.text.tokenizer import Tokenizer as Tokenizer
from lightseq_backend.text.words import CODES, load_fairseq, load_words

# Options of a request: the language by its name, and what it comes to.
TARGET_LANGUAGE, FIRST_ID = "target_language", "forced_bos_token_id"
ROUNDING = 128  # a table of weights may have up to so many rows more than there are tokens, less one

# The first of which a directory holds every file makes its tokenizer.
KINDS: dict[tuple[str, ...], Callable[[Path, Config, str | None], Tokenizer]] = {
    FILES: load_marian,
    (MODEL,): load_multilingual,
    ("tokenizer.json",): load_file,
    ("vocab.json", "merges.txt"): load_gpt2,
    ("source.vocab.txt", "target.vocab.txt"): load_words,
    ("vocab.txt",): load_words,
    ("dict.*txt",): load_fairseq,
}
FILE_SETS = "; ".join(" + ".join(files) for files in KINDS)
# Read beside some of them.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *CODES)


def load(directories: Iterable[Path], config: Config, language: str | None = None) -> Tokenizer | None:
    """The tokenizer in the first directory that holds one, or None. language: the source's, for models of many.

    ConfigError when its files cannot be used, a package is missing, or the model's vocabulary is another one.
    """
    for directory in directories:
        for files, make in KINDS.items():
            if all(any(directory.glob(file)) for file in files):
                tokenizer = make(directory, config, language)
                _check_fits(tokenizer, config, f"{directory}: the tokenizer of {' + '.join(files)}")
                return tokenizer
    return None


def files_of(directory: Path) -> list[Path]:
    """The files of the tokenizer that `load` would find in a directory, with its settings; none where it finds none."""
    for files in KINDS:
        found = [sorted(directory.glob(file)) for file in files]
        if all(found):
            settings = [directory / name for name in SETTINGS if (directory / name).is_file()]
            return [*(path for paths in found for path in paths), *settings]
    return []


def missing_files(directory: Path) -> list[str]:
    """What the tokenizer lacks that a directory holds in part: of the set that it holds most of. None where it holds a
    whole one, or nothing of any."""
    if files_of(directory):
        return []
    parts = [[file for file in files if not any(directory.glob(file))] for files in KINDS]
    begun = [(len(files) - len(missing), missing) for files, missing in zip(KINDS, parts) if len(missing) < len(files)]
    return max(begun, default=(0, []), key=lambda part: part[0])[1]


def with_language(changes: dict[str, object], tokenizer: Tokenizer | None, config: Config) -> dict[str, object]:
    """A request's options with the first id of its target language in place of that language's name."""
    if TARGET_LANGUAGE not in changes:
        return changes
    rest = {name: value for name, value in changes.items() if name != TARGET_LANGUAGE}
    name = changes[TARGET_LANGUAGE]
    id_ = tokenizer.language_id(name) if tokenizer is not None and isinstance(name, str) else None
    if id_ is None:
        knows = "has no tokenizer" if tokenizer is None else "has a tokenizer that knows no such language"
        raise RequestError(f"{TARGET_LANGUAGE} is {name!r}; this model {knows}")
    if FIRST_ID in rest:
        raise RequestError(f"{TARGET_LANGUAGE} and {FIRST_ID} both say what comes first; a request gives one of them")
    if isinstance(config, TransformerConfig) and config.forced_id is None and config.start_id != config.end_id:
        if id_ != config.start_id:  # mBART: the language is where the decoder starts
            raise RequestError(f"{TARGET_LANGUAGE} is {name!r}, id {id_}; this model starts with id {config.start_id}")
        return rest
    return {**rest, FIRST_ID: id_}


def _check_fits(tokenizer: Tokenizer, config: Config, what: str) -> None:
    faults = []
    sides = [("", tokenizer.target_size, config.vocabulary)]
    if isinstance(config, TransformerConfig):
        source = ("source ", tokenizer.source_size, config.input_vocabulary)
        sides = [source, ("target ", tokenizer.target_size, config.vocabulary)]
    for side, tokens, rows in sides:
        if not tokens <= rows < tokens + ROUNDING:
            faults.append(f"{what} has {tokens} {side}tokens; the model's {side}vocabulary has {rows}")
    specials = [("end", tokenizer.end_id, config.end_id)]
    if isinstance(config, TransformerConfig):  # a GPT's text is never filled up; its files name any token for that
        specials.append(("padding", tokenizer.padding_id, config.padding_id))
    for name, ours, models in specials:
        if ours is not None and ours != models:
            faults.append(f"{what} has {name} id {ours}; the model's is {models}")
    if faults:
        raise ConfigError("\n".join(faults))
