"""How one request wants its text: the methods, the options and what each may be. Files give the defaults."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from lightseq_backend.errors import RequestError

BEAM_SEARCH = "beam_search"  # LightSeq's
STANDARD_BEAM = "standard_beam"  # the search of Hugging Face's generate
TOPK_GREEDY = "topk_greedy"  # k best first tokens, each continued greedily (LightSeq)
GREEDY = "greedy"  # beam search with one beam
TOPK = "topk"
TOPP = "topp"
SAMPLE = "sample"  # the whole distribution, unless top_k or top_p narrow it
SEARCH_METHODS = (BEAM_SEARCH, STANDARD_BEAM, TOPK_GREEDY, GREEDY)
SAMPLING_METHODS = (TOPK, TOPP, SAMPLE)
METHODS = SEARCH_METHODS + SAMPLING_METHODS

NEVER = "never"  # of early_stopping, beside true and false
MAX_SEED = 2**63 - 1  # what a Triton request parameter can carry
MOST_STOPS, MOST_STOP = 64, 256  # stop words of a request, ids or characters of one: the host looks for each
MOST_END_IDS = 8  # beside the model's own: a lane's record has room for so many
LISTED = 1024  # numbers that the lists of one request's rules may take in device memory

Ids = tuple[int, ...]
StopWord = Ids | str


@dataclass(frozen=True)
class DecodingOptions:
    """How one request wants its text. Files give the defaults; `with_changes` applies a request's own.

    top_k = 0 and top_p = 1 mean "do not narrow"; seed None means "any"; max_new_tokens and max_length None mean
    "as many as the model allows"; num_hypotheses None means "all beams", or one when sampling.

    Options under the names of Hugging Face's generate mean what they mean there. min_length and max_length count what
    a decoder is fed (the start token, a prefix) or a GPT's prompt. The rules, min_length and what follows, change the
    scores of a row before anything is chosen. Where both are given, min_new_tokens and max_new_tokens count.

    A text ends before the first of `stop` (words of ids or of text; behind it with include_stop), and with the first
    of end_ids, in every method, as it does with the model's own end id.
    """

    sampling_method: str = BEAM_SEARCH
    beam_size: int = 4
    length_penalty: float = 0.6
    diverse_lambda: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int | None = None
    max_new_tokens: int | None = None
    num_hypotheses: int | None = None
    early_stopping: bool | str = False
    max_length: int | None = None
    forced_bos_token_id: int | None = None
    decoder_prefix: Ids = ()
    token_log_probabilities: bool = False
    min_length: int = 0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    suppress_tokens: Ids = ()
    begin_suppress_tokens: Ids = ()
    bad_words_ids: tuple[Ids, ...] = ()
    forced_eos_token_id: int | None = None
    stop: tuple[StopWord, ...] = ()
    include_stop: bool = False
    end_ids: Ids = ()

    @property
    def stops(self) -> bool:
        """Whether anything but an end id ends a text."""
        return bool(self.stop)

    @property
    def detailed(self) -> bool:
        """Whether the log-probability of every token is kept: where a text is cut, its score is their sum."""
        return self.token_log_probabilities or self.stops

    @cached_property
    def searches(self) -> bool:
        return self.sampling_method in SEARCH_METHODS

    @cached_property
    def ruled(self) -> bool:
        """Whether any rule changes the scores."""
        return any(getattr(self, name) != nothing for name, nothing in NO_RULES.items())

    @cached_property
    def standard(self) -> bool:
        """Whether the standard search is what chooses. With one beam it is greedy; LightSeq's has no rules."""
        return self.sampling_method == STANDARD_BEAM or (self.sampling_method == GREEDY and self.ruled)

    @cached_property
    def width(self) -> int:
        """Rows a sequence needs: its beams, or its independent samples."""
        if self.sampling_method == GREEDY:
            return 1
        return self.beam_size if self.searches else self.num_hypotheses or 1

    @cached_property
    def hypotheses(self) -> int:
        """Hypotheses that go back to the caller."""
        return self.num_hypotheses or self.width

    def with_changes(self, changes: Mapping[str, object], limits: DecodingLimits) -> DecodingOptions:
        """These options with a request's own settings; RequestError names each bad one with its limit."""
        try:
            return _changed(self, tuple((name, type(value), value) for name, value in changes.items()), limits)
        except TypeError:  # a list, which cannot be looked up
            return _changed.__wrapped__(self, tuple((name, list, value) for name, value in changes.items()), limits)


@dataclass(frozen=True)
class DecodingLimits:
    """What a loaded model can be asked for: max_beam_size rows a sequence, ids below vocabulary.

    candidates  of the standard search: best tokens of a beam that it can look at. It looks at twice as many as it has
                beams, or at as many and the end ids
    """

    max_beam_size: int
    vocabulary: int
    candidates: int = 1 << 30

    def beams(self, options: DecodingOptions) -> int:
        """The widest search of that method, with those end ids."""
        if options.sampling_method != STANDARD_BEAM:
            return self.max_beam_size
        return min(self.max_beam_size, self.candidates // 2, self.candidates - 1 - len(options.end_ids))


@lru_cache(maxsize=256)  # most requests of a server ask for the same
def _changed(
    before: DecodingOptions, given: tuple[tuple[str, type, object], ...], limits: DecodingLimits
) -> DecodingOptions:
    """given: name, type and value of each change; the type, because True is 1 to a look-up."""
    changes = {name: value for name, _, value in given}
    unknown = sorted(set(changes) - set(OPTION_TYPES))
    if unknown:
        raise RequestError(f"unknown option {', '.join(unknown)}; options are {', '.join(OPTION_TYPES)}")
    values = {name: _typed(name, value) for name, value in changes.items()}
    if values.get("sampling_method", before.sampling_method) not in METHODS:
        raise RequestError(f"sampling_method is {values['sampling_method']!r}; methods are {', '.join(METHODS)}")
    options = replace(before, **values)  # type: ignore[arg-type]
    forgotten = _of_another_method(before.sampling_method, options.sampling_method)
    # A request's own limit stands for the file's, whichever way that counts.
    forgotten |= {"max_new_tokens": None} if "max_length" in values else {}
    forgotten |= {"min_new_tokens": 0} if "min_length" in values else {}
    options = replace(options, **{name: value for name, value in forgotten.items() if name not in values})
    faults = [*_range_faults(options, set(values), limits), *_combination_faults(options, set(values))]
    if faults:
        raise RequestError("; ".join(faults))
    return options


OPTION_TYPES: dict[str, type] = {
    "sampling_method": str,
    "beam_size": int,
    "length_penalty": float,
    "diverse_lambda": float,
    "top_k": int,
    "top_p": float,
    "temperature": float,
    "seed": int,
    "max_new_tokens": int,
    "num_hypotheses": int,
    "early_stopping": bool,
    "max_length": int,
    "forced_bos_token_id": int,
    "decoder_prefix": list,
    "token_log_probabilities": bool,
    "min_length": int,
    "min_new_tokens": int,
    "no_repeat_ngram_size": int,
    "repetition_penalty": float,
    "suppress_tokens": list,
    "begin_suppress_tokens": list,
    "bad_words_ids": list,
    "forced_eos_token_id": int,
    "stop": list,
    "include_stop": bool,
    "end_ids": list,
}
NO_RULES: dict[str, Any] = {
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "bad_words_ids": (),
    "forced_eos_token_id": None,
}
_SAMPLING_ONLY = ("top_k", "top_p", "temperature")
_LIGHTSEQ_SEARCHES = (BEAM_SEARCH, TOPK_GREEDY)


def _of_another_method(before: str, method: str) -> dict[str, Any]:
    """What a file says of another method must not leak into the one that was asked for: what stands instead."""
    forgotten: dict[str, Any] = {}
    if method != TOPK:
        forgotten["top_k"] = 0
    if method != TOPP:
        forgotten["top_p"] = 1.0
    if method != BEAM_SEARCH:
        forgotten["diverse_lambda"] = 0.0
    if method != STANDARD_BEAM:
        forgotten["early_stopping"] = False
    if method in _LIGHTSEQ_SEARCHES:
        forgotten |= NO_RULES
    if method not in (GREEDY, *SAMPLING_METHODS):
        forgotten |= {"stop": (), "include_stop": False}
    if (method == STANDARD_BEAM) != (before == STANDARD_BEAM):  # a length penalty means something else there
        forgotten["length_penalty"] = 1.0 if method == STANDARD_BEAM else DecodingOptions.length_penalty
    return forgotten


def _typed(name: str, value: object) -> object:
    wanted = OPTION_TYPES[name]
    if wanted is list:
        return _listed(name, value)
    if wanted is bool and isinstance(value, str) and value in ("true", "false"):
        return value == "true"
    if name == "early_stopping" and value == NEVER:
        return value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    if wanted is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise RequestError(f"{name} is {value!r}; it takes a value of type {wanted.__name__}")
    return value


def _listed(name: str, value: object) -> object:
    """Ids, or words of ids, as tuples. They come as lists or, in a request's parameters, as the JSON of one."""
    given = value
    if isinstance(value, str):
        with suppress(ValueError):
            given = json.loads(value)

    def ids(part: object) -> Ids:
        if not isinstance(part, list | tuple) or any(type(id_) is not int for id_ in part):
            raise TypeError
        return tuple(part)

    try:
        if name == "stop":
            return _stop_words(given if isinstance(given, list) else value)
        if name != "bad_words_ids":
            return ids(given)
        if isinstance(given, list | tuple):
            return tuple(ids(word) for word in given)
        raise TypeError
    except TypeError:
        raise RequestError(f"{name} is {value!r}; it takes a value of type list") from None


def _stop_words(given: object) -> tuple[StopWord, ...]:
    """One text, or a list of texts, of words of ids and of single ids; TypeError for anything else."""
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list | tuple):
        raise TypeError
    found: list[StopWord] = []
    for word in words:
        ids = [word] if type(word) is int else word
        if not isinstance(ids, str | list | tuple) or (
            not isinstance(ids, str) and any(type(id_) is not int for id_ in ids)
        ):
            raise TypeError
        found.append(ids if isinstance(ids, str) else tuple(ids))
    return tuple(found)


def _range_faults(options: DecodingOptions, given: set[str], limits: DecodingLimits) -> list[str]:
    """One sentence a value out of range. Only what the request gave, or what its method uses, is looked at."""
    faults = []

    def check(name: str, holds: bool, limit: str) -> None:
        if not holds:
            faults.append(f"{name} is {getattr(options, name)}; it must be {limit}")

    beams = limits.beams(options)
    if options.searches or "beam_size" in given:
        check("beam_size", 1 <= options.beam_size <= beams, f"from 1 to {beams}, this model's maximum")
    check("length_penalty", -10 <= options.length_penalty <= 10, "from -10 to 10")
    check("diverse_lambda", 0 <= options.diverse_lambda < math.inf, "a number from 0 up")
    if options.sampling_method == TOPK or "top_k" in given:
        check("top_k", 1 <= options.top_k <= limits.vocabulary, f"from 1 to {limits.vocabulary}, the vocabulary")
    check("top_p", 0 < options.top_p <= 1, "over 0 and at most 1")
    check("temperature", 1e-3 <= options.temperature <= 1e3, "from 0.001 to 1000")
    if options.seed is not None:
        check("seed", 0 <= options.seed <= MAX_SEED, f"from 0 to {MAX_SEED}")
    for name in ("max_new_tokens", "max_length"):
        if getattr(options, name) is not None:
            check(name, getattr(options, name) >= 1, "at least 1")
    if options.num_hypotheses is not None:
        most, why = (options.beam_size, "the beam size") if options.searches else (beams, "this model's maximum")
        most = 1 if options.sampling_method == GREEDY else most
        check("num_hypotheses", 1 <= options.num_hypotheses <= most, f"from 1 to {most}, {why}")
    for name in ("min_length", "min_new_tokens", "no_repeat_ngram_size"):
        check(name, 0 <= getattr(options, name) < 1 << 31, f"from 0 to {(1 << 31) - 1}")
    check("repetition_penalty", 0.01 <= options.repetition_penalty <= 100, "from 0.01 to 100")
    faults += _stop_faults(options)
    return faults + _id_faults(options, limits.vocabulary)


def _id_faults(options: DecodingOptions, vocabulary: int) -> list[str]:
    """One sentence an option that has an id which is none, and one where the lists are too long."""
    named: dict[str, Ids] = {
        name: getattr(options, name)
        for name in ("decoder_prefix", "suppress_tokens", "begin_suppress_tokens", "end_ids")
    }
    named["stop"] = tuple(id_ for word in options.stop if not isinstance(word, str) for id_ in word)
    named["bad_words_ids"] = tuple(id_ for word in options.bad_words_ids for id_ in word)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        named[name] = () if getattr(options, name) is None else (getattr(options, name),)
    wrong = {name: [id_ for id_ in ids if not 0 <= id_ < vocabulary] for name, ids in named.items()}
    faults = [f"{name} has id {ids[0]}; ids are 0 to {vocabulary - 1}" for name, ids in wrong.items() if ids]
    if not all(options.bad_words_ids):
        faults.append("bad_words_ids has a word without ids; it needs at least one")
    length = listed(options)
    if length > LISTED:
        faults.append(
            f"suppress_tokens, begin_suppress_tokens and bad_words_ids take {length} numbers (an id one, a word one "
            f"more); there is room for {LISTED}"
        )
    return faults


def _stop_faults(options: DecodingOptions) -> list[str]:
    faults = []
    if not all(options.stop):
        faults.append("stop has an empty word; it needs at least one id or one character")
    most = max(map(len, options.stop), default=0)
    if most > MOST_STOP:
        faults.append(f"stop has a word of {most} ids or characters; there may be {MOST_STOP}")
    if len(options.stop) > MOST_STOPS:
        faults.append(f"stop has {len(options.stop)} words; there may be {MOST_STOPS}")
    if len(options.end_ids) > MOST_END_IDS:
        faults.append(f"end_ids has {len(options.end_ids)} ids; there may be {MOST_END_IDS} beside the model's own")
    return faults


def listed(options: DecodingOptions) -> int:
    """Numbers that the lists take."""
    words = sum(1 + len(word) for word in options.bad_words_ids)
    return len(options.suppress_tokens) + len(options.begin_suppress_tokens) + words


def _combination_faults(options: DecodingOptions, given: set[str]) -> list[str]:
    """Options that the chosen method would ignore are refused, not dropped."""
    method = options.sampling_method
    faults = []
    if options.searches:
        faults += [
            f"{name} needs a sampling method ({', '.join(SAMPLING_METHODS)}); this request uses {method}"
            for name in _SAMPLING_ONLY
            if name in given
        ]
    elif "beam_size" in given:
        faults.append(f"beam_size needs a search ({', '.join(SEARCH_METHODS)}); this request uses {method}")
    if method == GREEDY and "beam_size" in given and options.beam_size != 1:
        faults.append(f"beam_size is {options.beam_size}; {GREEDY} has one beam")
    if method != BEAM_SEARCH and options.diverse_lambda:
        faults.append(f"diverse_lambda needs {BEAM_SEARCH}; this request uses {method}")
    if method != STANDARD_BEAM and options.early_stopping:
        faults.append(f"early_stopping needs {STANDARD_BEAM}; this request uses {method}")
    if method in _LIGHTSEQ_SEARCHES:
        faults += [
            f"{name} needs {STANDARD_BEAM}, {GREEDY} or a sampling method; this request uses {method}"
            for name, nothing in NO_RULES.items()
            if getattr(options, name) != nothing
        ]
    if options.stops and method not in (GREEDY, *SAMPLING_METHODS):
        faults.append(f"stop needs {GREEDY} or a sampling method; this request uses {method}")
    if options.include_stop and not options.stop:
        faults.append("include_stop needs stop, which is not given")
    if options.decoder_prefix and "forced_bos_token_id" in given:
        faults.append("decoder_prefix and forced_bos_token_id both say what comes first; a request gives one of them")
    return faults
