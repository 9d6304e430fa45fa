"""Tokenizers: each kind on a tiny vocabulary made here, against literals and the packages themselves."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import small_models
import tokenizers

from lightseq_backend import text
from lightseq_backend.config import Config
from lightseq_backend.errors import ConfigError, RequestError
from lightseq_client import Words

SHIPPED = Path(__file__).resolve().parents[1] / "model_repository"
TRANSLATOR, _ = small_models.transformer()
GENERATOR, _ = small_models.gpt()
SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a stitch in time saves nine, and the dog sleeps",
    "le renard brun saute par-dessus le chien paresseux",
    "un tiens vaut mieux que deux tu l'auras, dit le chien",
    "the dog jumps and the fox jumps, the dog sleeps and the fox sleeps",
    "le chien dort et le renard dort, le chien saute et le renard saute",
    "nine lazy dogs and nine brown foxes save the time of the lazy dogs",
    "deux chiens et deux renards dorment, les chiens sautent mieux que les renards",
    "quick quick, said the fox, the lazy dog sleeps and time jumps over it",
    "vite vite, dit le renard, le chien paresseux dort et le temps saute",
]
TEXTS = ["the fox sleeps", "  le   chien saute ", "dog", "zebra étonné", "Ψ the dog", "don't, 12 dogs!\n"]


def fitting(config: Config, source: int, target: int, end: int, padding: int) -> Config:
    """A configuration for a vocabulary of those sizes and special ids."""
    if config is GENERATOR:
        return replace(GENERATOR, vocabulary=target, end_id=end, padding_id=padding)
    return replace(
        TRANSLATOR, source_vocabulary=source, target_vocabulary=target, start_id=0, end_id=end, padding_id=padding
    )


def load(directory: Path, config: Config, language: str | None = None) -> text.Tokenizer:
    tokenizer = text.load([directory], config, language)
    assert tokenizer is not None
    return tokenizer


def write_lines(path: Path, *lines: str) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 90 pieces, with <unk>, <s> and </s> first as fairseq's and Marian's have them."""
    root = tmp_path_factory.mktemp("pieces")
    write_lines(root / "sentences", *SENTENCES)
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "sentences"), model_prefix=str(root / "own"), model_type="bpe", vocab_size=90, minloglevel=2
    )
    return root / "own.model"


# A word a line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["mille neuf cent", " deux\tcent ", "deux chats", "mille </s> un", "<pad> un"])
def test_translators_words_are_the_clients(words: str) -> None:
    ours = load(SHIPPED / "transformer", fitting(TRANSLATOR, 103, 108, 107, 0))
    theirs = Words.for_translation(SHIPPED / "transformer", warn=lambda _: None)
    assert ours.encode(words) == theirs.encode(words)


def test_words_of_a_target_are_the_targets() -> None:
    tokenizer = load(SHIPPED / "transformer", fitting(TRANSLATOR, 103, 108, 107, 0))
    words = (SHIPPED / "transformer" / "target.vocab.txt").read_text().split("\n")
    assert tokenizer.encode_target("one thousand") == [words.index("one"), words.index("thousand"), 107]


@pytest.mark.parametrize("ids", [[98, 107, 5], [1, 2, 3], [106, 0, 105, 99], []])
def test_translators_ids_are_the_clients_text(ids: list[int]) -> None:
    ours = load(SHIPPED / "transformer", fitting(TRANSLATOR, 103, 108, 107, 0))
    assert ours.decode(ids) == Words.for_translation(SHIPPED / "transformer").decode(ids)


def test_prompts_are_the_clients() -> None:
    ours = load(SHIPPED / "gpt", fitting(GENERATOR, 109, 109, 108, 0))
    theirs = Words.for_generation(SHIPPED / "gpt")
    assert ours.encode("twelve , thirteen") == theirs.encode("twelve , thirteen") == [107, 13, 105, 14]
    assert ours.decode([107, 13, 105, 14, 108]) == theirs.decode([107, 13, 105, 14, 108]) == "twelve , thirteen"


def test_id_without_a_word_is_shown_as_such() -> None:
    ours = load(SHIPPED / "transformer", fitting(TRANSLATOR, 103, 112, 107, 0))
    assert ours.decode([2, 110, 3]) == "one \ufffd two"


def test_every_fault_of_a_vocabulary_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "vocab.txt", "</s>", "", "a", "b c", "a")
    with pytest.raises(ConfigError) as error:
        load(tmp_path, GENERATOR)
    assert [line.rpartition(", line ")[2] for line in str(error.value).splitlines()] == [
        "2: '' is not one word",
        "4: 'b c' is not one word",
        "5: 'a' has id 2 already",
    ]


def test_unknown_word_is_refused_where_there_is_no_token_for_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "vocab.txt", "<pad>", "<s>", "</s>", "un")
    words = load(tmp_path, fitting(GENERATOR, 4, 4, 2, 0))
    with pytest.raises(RequestError, match="'chat': not among the 4 words of this model, which has no <unk>"):
        words.encode("un chat")


# fairseq ----------------------------------------------------------------------------------------------------------


def test_fairseq_dictionary_begins_with_its_four_specials(tmp_path: Path) -> None:
    write_lines(tmp_path / "dict.txt", "le 20", "ch@@ 7", "ien 7", "madeupword0000 0")
    words = load(tmp_path, fitting(TRANSLATOR, 8, 8, 2, 1))
    assert words.encode("le ch@@ ien dort") == [4, 5, 6, 3, 2]
    assert words.decode([4, 5, 6, 3, 2, 4]) == "le ch@@ ien <unk>"


def test_fairseq_source_language_chooses_the_source(tmp_path: Path) -> None:
    write_lines(tmp_path / "dict.en.txt", "dog 3", "the 2")
    write_lines(tmp_path / "dict.fr.txt", "chien 2")
    words = load(tmp_path, fitting(TRANSLATOR, 5, 6, 2, 1), "fr")
    assert words.encode("chien") == [4, 2]
    assert words.decode([5, 4, 2]) == "the dog"
    with pytest.raises(ConfigError, match=r"dict\.en\.txt, dict\.fr\.txt; the parameter source_language must name"):
        load(tmp_path, TRANSLATOR)


def test_fairseq_word_may_take_a_specials_place(tmp_path: Path) -> None:
    write_lines(tmp_path / "dict.txt", "<pad> 0 #fairseq:overwrite", "le 20")
    words = load(tmp_path, fitting(TRANSLATOR, 6, 6, 2, 4))
    assert words.encode("le <pad> le") == [5, 4, 5, 2]


CODES = ["t h", "th e</w>", "d o", "do g</w>"]  # of their version 0.2, where a word's last symbol ends in </w>


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("bpecodes", ["#version: 0.2", *CODES]),
        ("code", ["#version: 0.2", *CODES]),
        ("bpecodes", [f"{pair} {9 - count}" for count, pair in enumerate(CODES)]),  # fastBPE's
    ],
)
def test_fairseq_words_are_cut_by_the_codes_beside_the_dictionary(tmp_path: Path, name: str, lines: list[str]) -> None:
    write_lines(tmp_path / "dict.txt", "the 20", "dog 9", "th@@ 7", "e@@ 7", "n 7", "do@@ 3", "t 1")
    write_lines(tmp_path / name, *lines)
    words = load(tmp_path, fitting(TRANSLATOR, 11, 11, 2, 1))
    assert words.encode(" the  dog then dot cat") == [4, 5, 6, 7, 8, 9, 10, 3, 3, 10, 2]
    assert words.decode([4, 6, 7, 8, 9, 10, 2, 5]) == "the then dot"
    assert words.decode([4, 6, 2]) == "the th"
    assert tmp_path / name in text.files_of(tmp_path)


def test_fairseqs_codes_that_are_none_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "dict.txt", "the 20")
    write_lines(tmp_path / "bpecodes", "t h", "th e</w> x y")
    with pytest.raises(ConfigError, match=r"bpecodes must have two symbols a line; one is 'th e</w> x y'"):
        load(tmp_path, TRANSLATOR)
    write_lines(tmp_path / "bpecodes", "#version: 0.2")
    with pytest.raises(ConfigError, match=r"bpecodes must have two symbols a line"):
        load(tmp_path, TRANSLATOR)


def test_pieces_of_words_are_not_kept_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightseq_backend.text import words as module

    monkeypatch.setattr(module, "_MOST_CACHED", 3)
    write_lines(tmp_path / "dict.txt", "the 20")
    write_lines(tmp_path / "bpecodes", "#version: 0.2", *CODES)
    tokenizer: Any = load(tmp_path, fitting(TRANSLATOR, 5, 5, 2, 1))
    for number in range(9):
        tokenizer.encode(f"the {number}")
        assert len(tokenizer._codes.cache) <= 5


def test_faults_of_a_dictionary_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "dict.txt", "le 20", "chien", "un x")
    with pytest.raises(ConfigError, match=r"line 2: 'chien' is not a word and its count\n.*line 3: 'un x' is not"):
        load(tmp_path, TRANSLATOR)
    write_lines(tmp_path / "dict.txt", "le 20", "le 3")
    with pytest.raises(ConfigError, match="line 2: 'le' has id 4 already"):
        load(tmp_path, TRANSLATOR)


# Marian -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def marian(tmp_path: Path, pieces: Path) -> Path:
    """Ids of vocab.json run against the order of the pieces, as OPUS-MT's do; <pad> is the last."""
    (tmp_path / "source.spm").symlink_to(pieces)
    (tmp_path / "target.spm").symlink_to(pieces)
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    names = ["</s>", "<unk>", *sorted(own.id_to_piece(i) for i in range(3, 90)), ">>fra<<", "<pad>"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: id_ for id_, name in enumerate(names)}))
    return tmp_path


def marian_config(size: int = 91) -> Config:
    return fitting(TRANSLATOR, size, size, 0, size - 1)


@pytest.mark.parametrize("sentence", TEXTS)
def test_marian_has_sentencepieces_pieces_with_its_own_ids_and_the_end(
    marian: Path, pieces: Path, sentence: str
) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    ids = json.loads((marian / "vocab.json").read_text())
    found = load(marian, marian_config()).encode(sentence)
    assert found == [*(ids.get(piece, 1) for piece in own.encode(sentence, out_type=str)), 0]


def test_marian_decodes_what_it_encoded(marian: Path) -> None:
    tokenizer = load(marian, marian_config())
    assert tokenizer.decode([90, *tokenizer.encode("the fox sleeps"), 0, 0]) == "the fox sleeps"


def test_marian_marks_what_it_does_not_know(marian: Path) -> None:
    tokenizer = load(marian, fitting(TRANSLATOR, 100, 100, 0, 90))
    assert tokenizer.decode([99, 1]).split() == ["\ufffd"]  # 1, <unk>, is left out as transformers leaves it out


def test_marian_takes_a_target_language_in_front(marian: Path) -> None:
    tokenizer = load(marian, marian_config())
    assert tokenizer.encode(">>fra<< the dog") == [89, *tokenizer.encode("the dog")]


def test_marian_writes_pieces_that_the_targets_model_lacks(marian: Path) -> None:
    ids = json.loads((marian / "vocab.json").read_text())
    del ids["<pad>"]
    (marian / "vocab.json").write_text(json.dumps({**ids, "▁zoo": 90, "<pad>": 91}))
    tokenizer = load(marian, marian_config(92))
    assert tokenizer.decode([ids["▁the"], 90, 0]) == "the zoo"


def test_marian_without_special_tokens_is_refused(marian: Path) -> None:
    (marian / "vocab.json").write_text('{"a": 0, "</s>": 1}')
    with pytest.raises(ConfigError, match=r"vocab\.json has no <pad>, <unk>"):
        load(marian, marian_config())


def test_damaged_model_of_pieces_is_refused(marian: Path) -> None:
    (marian / "source.spm").unlink()
    (marian / "source.spm").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"source\.spm is no SentencePiece model"):
        load(marian, marian_config())


def test_marian_writes_a_target_with_the_targets_ids(marian: Path, pieces: Path) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    names = ["<unk>", *(own.id_to_piece(i) for i in range(89, 2, -1)), "<pad>", "</s>"]
    (marian / "target_vocab.json").write_text(json.dumps({name: id_ for id_, name in enumerate(names)}))
    tokenizer = load(marian, fitting(TRANSLATOR, 91, 90, 89, 90))
    assert tokenizer.encode_target("the dog") == [*(90 - id_ for id_ in own.encode("the dog")), 89]


# Many languages ---------------------------------------------------------------------------------------------------


def multilingual(root: Path, pieces: Path, kind: str, languages: list[str], **settings: Any) -> Path:
    (root / "sentencepiece.bpe.model").symlink_to(pieces)
    (root / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **settings}))
    (root / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": languages}))
    return root


NAMES = ["eng_Latn", "fra_Latn"]  # ids 91 and 92: 90 pieces, and fairseq's one more


@pytest.mark.parametrize(
    ("kind", "settings", "before", "after"),
    [
        ("NllbTokenizer", {}, [92], [2]),
        ("NllbTokenizerFast", {"legacy_behaviour": True}, [], [2, 92]),
        ("MBart50Tokenizer", {}, [92], [2]),
        ("MBartTokenizer", {}, [], [2, 92]),
    ],
)
def test_source_has_its_language_where_its_family_puts_it(
    tmp_path: Path, pieces: Path, kind: str, settings: dict[str, Any], before: list[int], after: list[int]
) -> None:
    directory = multilingual(tmp_path, pieces, kind, NAMES, **settings)
    tokenizer = load(directory, fitting(TRANSLATOR, 94, 94, 2, 1), "fra_Latn")
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    assert tokenizer.encode("le chien") == [*before, *(id_ + 1 for id_ in own.encode("le chien")), *after]
    assert tokenizer.decode([2, 91, *(id_ + 1 for id_ in own.encode("the dog")), 2]) == "the dog"


def test_unknown_piece_has_fairseqs_unknown_id(tmp_path: Path, pieces: Path) -> None:
    tokenizer = load(multilingual(tmp_path, pieces, "MBartTokenizer", NAMES, src_lang="eng_Latn"), config_of(94))
    assert 3 in tokenizer.encode("the Ψ")
    with pytest.raises(RequestError, match="none of them is in the vocabulary of 93"):
        tokenizer.encode("ΨΩ")


@pytest.mark.parametrize("kind", ["NllbTokenizer", "MBartTokenizer"])
def test_target_begins_behind_the_language_that_the_decoder_is_fed(tmp_path: Path, pieces: Path, kind: str) -> None:
    directory = multilingual(tmp_path, pieces, kind, NAMES, src_lang="eng_Latn")
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    wanted = [*(id_ + 1 for id_ in own.encode("le chien")), 2]
    for fed in ({"forced_id": 92, "start_id": 2}, {"start_id": 92}):
        assert load(directory, replace(config_of(94), **fed)).encode_target("le chien") == wanted
    with pytest.raises(RequestError, match="no target language of its own"):
        load(directory, replace(config_of(94), start_id=2)).encode_target("le chien")


@pytest.mark.parametrize(
    ("kind", "names", "asked"),
    [
        ("NllbTokenizer", NAMES, "fra_Latn"),
        ("MBart50Tokenizer", ["en_XX", "fr_XX"], "fr_XX"),
        ("M2M100Tokenizer", ["__en__", "__fr__"], "fr"),
    ],
)
def test_target_language_comes_to_the_first_id(
    tmp_path: Path, pieces: Path, kind: str, names: list[str], asked: str
) -> None:
    directory = multilingual(tmp_path, pieces, kind, names, src_lang=names[0])
    config = replace(config_of(94), start_id=2, forced_id=91)
    tokenizer = load(directory, config)
    wanted = {"beam_size": 2, "forced_bos_token_id": 92}
    assert text.with_language({"beam_size": 2, "target_language": asked}, tokenizer, config) == wanted
    assert text.with_language({"beam_size": 2}, tokenizer, config) == {"beam_size": 2}
    for wrong in ("xx", 92, None):
        with pytest.raises(RequestError, match=f"target_language is {wrong!r}; .* knows no such language"):
            text.with_language({"target_language": wrong}, tokenizer, config)
    with pytest.raises(RequestError, match="both say what comes first"):
        text.with_language({"target_language": asked, "forced_bos_token_id": 3}, tokenizer, config)
    with pytest.raises(RequestError, match="this model has no tokenizer"):
        text.with_language({"target_language": asked}, None, config)
    starts = replace(config, start_id=92, forced_id=None)  # as mBART
    assert text.with_language({"target_language": asked}, tokenizer, starts) == {}
    with pytest.raises(RequestError, match="id 91; this model starts with id 92"):
        text.with_language({"target_language": names[0]}, tokenizer, starts)


def config_of(size: int) -> Config:
    return fitting(TRANSLATOR, size, size, 2, 1)


def test_ids_of_languages_are_read_where_they_are_written(tmp_path: Path, pieces: Path) -> None:
    added = {"0": {"content": "<s>"}, "95": {"content": "fra_Latn"}, "96": {"content": "<mask>"}}
    directory = multilingual(tmp_path, pieces, "NllbTokenizer", [], src_lang="fra_Latn", added_tokens_decoder=added)
    assert load(directory, config_of(97)).encode("le chien")[0] == 95


def test_m2m100_has_ids_of_its_own_and_marks_its_languages(tmp_path: Path, pieces: Path) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    names = ["<s>", "<pad>", "</s>", "<unk>", *sorted(own.id_to_piece(i) for i in range(3, 90))]
    directory = multilingual(tmp_path, pieces, "M2M100Tokenizer", ["__en__", "__fr__"])
    (directory / "vocab.json").write_text(json.dumps({name: id_ for id_, name in enumerate(names)}))
    tokenizer = load(directory, config_of(100), "fr")
    wanted = [names.index(piece) for piece in own.encode("le chien", out_type=str)]
    assert tokenizer.encode("le chien") == [92, *wanted, 2]
    assert tokenizer.decode([2, 91, *wanted, 2]) == "le chien"


@pytest.mark.parametrize(
    ("kind", "language", "id_", "languages"),
    [("MBartTokenizer", "fr_XX", 98, 25), ("MBart50Tokenizer", "sl_SI", 142, 52), ("M2M100Tokenizer", "fr", 115, 100)],
)
def test_languages_of_old_families_need_no_list(
    tmp_path: Path, pieces: Path, kind: str, language: str, id_: int, languages: int
) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    directory = multilingual(tmp_path, pieces, kind, [])
    if kind == "M2M100Tokenizer":
        names = ["<s>", "<pad>", "</s>", "<unk>", *(own.id_to_piece(i) for i in range(3, 90))]
        (directory / "vocab.json").write_text(json.dumps({name: id_ for id_, name in enumerate(names)}))
    assert id_ in load(directory, config_of(91 + languages), language).encode("le chien")


def test_source_language_must_be_known(tmp_path: Path, pieces: Path) -> None:
    directory = multilingual(tmp_path, pieces, "NllbTokenizer", NAMES)
    with pytest.raises(ConfigError, match=r"source_language is None; the languages of .* are eng_Latn, fra_Latn"):
        load(directory, config_of(94))
    with pytest.raises(ConfigError, match="source_language is 'klingon'"):
        load(directory, config_of(94), "klingon")


def test_pieces_of_an_unknown_family_are_refused(tmp_path: Path, pieces: Path) -> None:
    directory = multilingual(tmp_path, pieces, "XLMRobertaTokenizer", NAMES)
    with pytest.raises(ConfigError, match=r"tokenizer_class 'XLMRobertaTokenizer'; .* is known of NllbTokenizer"):
        load(directory, config_of(94))


# The package tokenizers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's two files: 256 bytes, 44 merges, <|endoftext|> last (id 300)."""
    root = tmp_path_factory.mktemp("bpe")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES, vocab_size=300, min_frequency=1, show_progress=False)
    trained.save_model(str(root))
    ids = json.loads((root / "vocab.json").read_text())
    (root / "vocab.json").write_text(json.dumps({**ids, "<|endoftext|>": 300}))
    return root


def bpe_config() -> Config:
    return fitting(GENERATOR, 301, 301, 300, 301)


@pytest.mark.parametrize("sentence", TEXTS)
def test_gpt2_text_is_the_packages_bytes_and_comes_back_unchanged(bpe: Path, sentence: str) -> None:
    oracle = tokenizers.ByteLevelBPETokenizer(str(bpe / "vocab.json"), str(bpe / "merges.txt"))
    tokenizer = load(bpe, bpe_config())
    ids = tokenizer.encode(sentence)
    assert ids == oracle.encode(sentence).ids
    assert tokenizer.decode([*ids, 300]) == sentence


def test_id_that_the_package_lacks_is_shown_as_such(bpe: Path) -> None:
    tokenizer = load(bpe, fitting(GENERATOR, 304, 304, 300, 304))
    assert tokenizer.decode([*tokenizer.encode("the"), 302, *tokenizer.encode(" dog")]) == "the\ufffd dog"


def saved(root: Path, bpe: Path, template: str | None = None, **config: Any) -> Path:
    """tokenizer.json of the BPE, with a post-processor where there is a template."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(bpe / "vocab.json"), str(bpe / "merges.txt")))
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    own.add_special_tokens(["<|endoftext|>", "<pad>", "</s>", "fr_XX"])  # ids 300 to 303
    if template:
        own.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("</s>", 302), ("fr_XX", 303)]
        )
    own.enable_truncation(4)
    own.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    return root


def test_tokenizer_file_says_what_stands_around_a_text(tmp_path: Path, bpe: Path) -> None:
    directory = saved(tmp_path, bpe, "$A </s>", eos_token="</s>", pad_token={"content": "<pad>"})
    tokenizer = load(directory, fitting(TRANSLATOR, 304, 304, 302, 301))
    plain = load(bpe, bpe_config()).encode(SENTENCES[0])
    assert len(plain) > 4  # the file's own truncation would cut it
    assert tokenizer.encode(SENTENCES[0]) == [*plain, 302]
    assert tokenizer.decode([301, *plain, 302]) == SENTENCES[0]


def test_tokenizer_file_writes_a_target_as_its_kind_does(tmp_path: Path, bpe: Path) -> None:
    plain, config = load(bpe, bpe_config()).encode("le chien"), fitting(TRANSLATOR, 304, 304, 302, 301)
    directory = saved(tmp_path, bpe, "$A </s>", eos_token="</s>", pad_token="<pad>")
    assert load(directory, config).encode_target("le chien") == [*plain, 302]
    directory = saved(tmp_path, bpe, "fr_XX $A </s>", eos_token="</s>", tokenizer_class="MBart50Tokenizer")
    assert load(directory, replace(config, forced_id=303)).encode_target("le chien") == [*plain, 302]


def test_source_language_stands_where_the_family_puts_it_in_a_tokenizer_file_too(tmp_path: Path, bpe: Path) -> None:
    directory = saved(tmp_path, bpe, "$A </s>", eos_token="</s>", tokenizer_class="MBartTokenizer")
    tokenizer = load(directory, fitting(TRANSLATOR, 304, 304, 302, 0), "fr_XX")
    assert tokenizer.encode("le chien")[-2:] == [302, 303]
    with pytest.raises(ConfigError, match=r"source_language is 'xx'; .*tokenizer\.json has no such token"):
        load(directory, TRANSLATOR, "xx")


def test_bart_reads_a_source_between_start_and_end(tmp_path: Path, bpe: Path) -> None:
    ids = json.loads((bpe / "vocab.json").read_text())
    del ids["<|endoftext|>"]
    specials = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    moved = {token: id_ + 4 for token, id_ in ids.items()}
    (tmp_path / "vocab.json").write_text(json.dumps({**specials, **moved}))
    (tmp_path / "merges.txt").symlink_to(bpe / "merges.txt")
    plain = load(bpe, bpe_config()).encode("the dog")
    tokenizer = load(tmp_path, fitting(TRANSLATOR, 304, 304, 2, 1))
    assert tokenizer.encode("the dog") == [0, *(id_ + 4 for id_ in plain), 2]
    assert tokenizer.decode([2, 0, *(id_ + 4 for id_ in plain), 2]) == "the dog"


def test_bart_writes_a_start_unless_its_decoder_is_fed_one(tmp_path: Path, bpe: Path) -> None:
    ids = json.loads((bpe / "vocab.json").read_text())
    specials = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    moved = {token: id_ + 4 for token, id_ in ids.items() if token != "<|endoftext|>"}
    (tmp_path / "vocab.json").write_text(json.dumps({**specials, **moved}))
    (tmp_path / "merges.txt").symlink_to(bpe / "merges.txt")
    plain, config = [id_ + 4 for id_ in load(bpe, bpe_config()).encode("the dog")], fitting(TRANSLATOR, 304, 304, 2, 1)
    assert load(tmp_path, config).encode_target("the dog") == [0, *plain, 2]
    assert load(tmp_path, replace(config, forced_id=0)).encode_target("the dog") == [*plain, 2]


def test_damaged_tokenizer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be used"):
        load(tmp_path, GENERATOR)


# All kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", ["", "   "])
def test_empty_text_is_refused(marian: Path, nothing: str) -> None:
    for tokenizer in (load(marian, marian_config()), load(SHIPPED / "gpt", fitting(GENERATOR, 109, 109, 108, 0))):
        with pytest.raises(RequestError, match="the text is empty; it needs at least one token"):
            tokenizer.encode(nothing)


def test_nothing_is_no_target_either(marian: Path) -> None:
    with pytest.raises(RequestError, match="the text is empty"):
        load(marian, marian_config()).encode_target(" ")
    with pytest.raises(RequestError, match="none of them is in the vocabulary of 91"):
        load(marian, marian_config()).encode_target("Ψ")


def test_vocabulary_of_another_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(ConfigError) as error:
        load(SHIPPED / "transformer", fitting(TRANSLATOR, 102, 240, 107, 0))
    assert "has 103 source tokens; the model's source vocabulary has 102" in str(error.value)
    assert "has 108 target tokens; the model's target vocabulary has 240" in str(error.value)


def test_special_ids_of_another_model_are_refused_with_both_ids() -> None:
    with pytest.raises(ConfigError) as error:
        load(SHIPPED / "transformer", fitting(TRANSLATOR, 103, 108, 2, 1))
    assert "has end id 107; the model's is 2" in str(error.value)
    assert "has padding id 0; the model's is 1" in str(error.value)


@pytest.mark.parametrize("package", ["sentencepiece", "tokenizers"])
def test_missing_package_is_named_with_its_extra(
    marian: Path, bpe: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    directory = marian if package == "sentencepiece" else bpe
    with pytest.raises(ConfigError, match=f"needs the package {package} .*: install the extra `text`"):
        load(directory, TRANSLATOR)


def test_first_directory_with_a_tokenizer_counts(tmp_path: Path) -> None:
    assert text.load([tmp_path], GENERATOR) is None
    found = text.load([tmp_path, SHIPPED / "gpt"], fitting(GENERATOR, 109, 109, 108, 0))
    assert found is not None
    assert found.encode("one") == [107, 2]
