"""Translators of many languages whose source begins or ends with its language: NLLB, mBART, mBART-50, M2M100."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightseq_backend.config import Config, TransformerConfig
from lightseq_backend.errors import ConfigError, RequestError
from lightseq_backend.text.tokenizer import BLANK, NO_TOKEN, Tokenizer, check_known, load_pieces, read_ids, read_json

MODEL = "sentencepiece.bpe.model"
CONFIG, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"
START, PADDING, END, UNKNOWN, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
FAIRSEQ_IDS = {START: 0, PADDING: 1, END: 2, UNKNOWN: 3}
FAIRSEQ_OFFSET = 1  # SentencePiece begins with <unk>, <s>, </s>; fairseq puts one more in front of the first real piece
# Of families whose files need not list them, in the order of their ids.
MBART_LANGUAGES = (
    *("ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN", "it_IT", "ja_XX"),
    *("kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO", "ru_RU", "si_LK", "tr_TR", "vi_VN"),
    "zh_CN",
)
MBART50_LANGUAGES = (
    *MBART_LANGUAGES,
    *("af_ZA", "az_AZ", "bn_IN", "fa_IR", "he_IL", "hr_HR", "id_ID", "ka_GE", "km_KH", "mk_MK", "ml_IN", "mn_MN"),
    *("mr_IN", "pl_PL", "ps_AF", "pt_XX", "sv_SE", "sw_KE", "ta_IN", "te_IN", "th_TH", "tl_XX", "uk_UA", "ur_PK"),
    *("xh_ZA", "gl_ES", "sl_SI"),
)
M2M100_LANGUAGES = tuple(
    f"__{name}__"
    for line in (
        "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr",
        "fy ga gd gl gu ha he hi hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb",
        "lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru sd",
        "si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu",
    )
    for name in line.split()
)


@dataclass(frozen=True)
class Family:
    """language_first: a source is its language, its pieces and </s>; otherwise its pieces, </s> and its language."""

    language_first: bool
    languages: tuple[str, ...] = ()
    mark: str = "{}"  # how the vocabulary writes a language's name

    def placed(self, ids: list[int], language: int, end: int) -> list[int]:
        return [language, *ids, end] if self.language_first else [*ids, end, language]


# By Hugging Face's name of the tokenizer's class.
FAMILIES = {
    "NllbTokenizer": Family(True),
    "MBartTokenizer": Family(False, MBART_LANGUAGES),
    "MBart50Tokenizer": Family(True, MBART50_LANGUAGES),
    "M2M100Tokenizer": Family(True, M2M100_LANGUAGES, "__{}__"),
}


def family_of(directory: Path) -> Family | None:
    """What tokenizer_config.json says the tokenizer is, if it is one of a multilingual translator."""
    config = read_json(directory / CONFIG)
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if name == "NllbTokenizer" and config.get("legacy_behaviour"):
        return Family(False)
    return FAMILIES.get(name)


class Multilingual:
    """SentencePiece's pieces with fairseq's ids, or vocab.json's where there is one, and the languages behind them."""

    def __init__(self, directory: Path, model: Config, language: str | None) -> None:
        path, config = directory / MODEL, read_json(directory / CONFIG)
        family = family_of(directory)
        if family is None:
            raise ConfigError(
                f"{directory / CONFIG} has tokenizer_class {config.get('tokenizer_class')!r}; {MODEL} is known of "
                f"{', '.join(FAMILIES)}"
            )
        self._family = family
        self._pieces = load_pieces(path)
        given = directory / "vocab.json"
        self._ids = read_ids(given) if given.is_file() else _fairseq_ids(self._pieces)
        missing = [token for token in FAIRSEQ_IDS if token not in self._ids]
        if missing:
            raise ConfigError(f"{given} has no {', '.join(missing)}")
        self._languages = _languages(directory, config, family, max(self._ids.values()) + 1)
        self._tokens = {id_: token for token, id_ in self._ids.items()}
        self._hidden = {*(self._ids[token] for token in FAIRSEQ_IDS), *self._languages.values()}
        self.source_size = self.target_size = max(*self._ids.values(), *self._languages.values()) + 1
        self.end_id: int | None = self._ids[END]
        self.padding_id: int | None = self._ids[PADDING]
        self._model = model
        self._language = _language(language or config.get("src_lang"), family, self._languages, path)

    def encode(self, text: str) -> list[int]:
        return self._family.placed(self._found(text), self._language, self._ids[END])

    def encode_target(self, text: str) -> list[int]:
        check_told(self._model)
        return [*self._found(text), self._ids[END]]

    def language_id(self, name: str) -> int | None:
        return self._languages.get(name, self._languages.get(self._family.mark.format(name)))

    def _found(self, text: str) -> list[int]:
        unknown = self._ids[UNKNOWN]
        ids = [self._ids.get(piece, unknown) for piece in self._pieces.encode(text, out_type=str)]
        check_known(ids, (unknown, self._ids.get(BLANK)), self.source_size)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._pieces.decode_pieces(
            [self._tokens.get(id_, NO_TOKEN) for id_ in ids if id_ not in self._hidden]
        )
        return text.strip()


def check_told(model: Config) -> None:
    """RequestError where the decoder is not fed its language: what it writes would have to begin with one."""
    if isinstance(model, TransformerConfig) and model.forced_id is None and model.start_id == model.end_id:
        raise RequestError("this model has no target language of its own: it scores ids, which begin with one")


def load_multilingual(directory: Path, config: Config, language: str | None) -> Tokenizer:
    return Multilingual(directory, config, language)


def _fairseq_ids(pieces: Any) -> dict[str, int]:
    """Ids of all pieces but SentencePiece's own first three, which fairseq has in another order."""
    own = {
        pieces.id_to_piece(id_): id_ + FAIRSEQ_OFFSET for id_ in range(len(FAIRSEQ_IDS) - 1, pieces.get_piece_size())
    }
    return {**own, **FAIRSEQ_IDS}


def _languages(directory: Path, config: dict[str, Any], family: Family, first: int) -> dict[str, int]:
    """Ids of the languages: as written in added_tokens_decoder, or in a row behind the pieces, in the files' order."""
    decoder = config.get("added_tokens_decoder", {})
    written = {entry["content"]: int(id_) for id_, entry in decoder.items()}
    found = {token: id_ for token, id_ in written.items() if token not in (*FAIRSEQ_IDS, MASK)}
    if found:
        return found
    names = _listed(config) or _listed(read_json(directory / SPECIALS)) or list(family.languages)
    if not names:
        raise ConfigError(f"{directory} has no list of languages; {CONFIG} or {SPECIALS} must have one")
    return {name: first + place for place, name in enumerate(names)}


def _listed(values: dict[str, Any]) -> list[str]:
    """The names in a list of special tokens, each a string or an object, but for those that are no languages'."""
    entries = values.get("additional_special_tokens") or values.get("extra_special_tokens") or ()
    names = (entry if isinstance(entry, str) else entry["content"] for entry in entries)
    return [name for name in names if name not in (*FAIRSEQ_IDS, MASK)]


def _language(name: str | None, family: Family, languages: dict[str, int], path: Path) -> int:
    for written in (name, family.mark.format(name)):
        if written in languages:
            return languages[written]
    known = ", ".join(list(languages)[:8]) + (f" and {len(languages) - 8} more" if len(languages) > 8 else "")
    raise ConfigError(f"source_language is {name!r}; the languages of {path} are {known}")
