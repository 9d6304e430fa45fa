"""How a Hugging Face directory chooses text, its generation settings, as options of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lightseq_backend.options import (
    GREEDY,
    LISTED,
    MOST_END_IDS,
    SAMPLE,
    STANDARD_BEAM,
    TOPK,
    TOPP,
    DecodingOptions,
    listed,
)

ENDS = "eos_token_id"  # one id or a list

# Generation settings that have no counterpart, and the values that ask for nothing.
LEFT_OUT: dict[str, tuple[Any, ...]] = {
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "renormalize_logits": (False,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "typical_p": (1,),
    "min_p": (0,),
    "penalty_alpha": (0,),
}
# Those that are options of ours under the same name, and how they are read.
RULES: dict[str, Callable[[Any], Any]] = {
    "max_length": int,
    "min_length": int,
    "no_repeat_ngram_size": int,
    "repetition_penalty": float,
    "suppress_tokens": tuple,
    "begin_suppress_tokens": tuple,
}


class Generation(Protocol):
    """What is asked of the directory's settings; `notes` and `faults` grow by a line each."""

    notes: list[str]
    faults: list[str]

    def generation(self, key: str, default: Any = None) -> Any: ...

    def token(self, key: str) -> int: ...


def decoding(settings: Generation, forced: bool = False, never_id: int | None = None) -> DecodingOptions:
    """The directory's own defaults, as far as this engine has them. forced: whether a first token is; never_id: the
    bad word that the configuration has."""
    for key, nothing in LEFT_OUT.items():
        value = settings.generation(key)
        if value is not None and value not in nothing:
            settings.notes.append(f"{key} is {value}: this engine has no such option")
    rules = _rules(settings, forced, never_id)
    beams = settings.generation("num_beams", 1)
    if not settings.generation("do_sample", False):
        penalty = float(settings.generation("length_penalty", 1.0))
        if beams == 1:
            return DecodingOptions(GREEDY, 1, penalty, **rules)
        early = settings.generation("early_stopping", False)
        return DecodingOptions(STANDARD_BEAM, beams, penalty, early_stopping=early, **rules)
    top_k, top_p = settings.generation("top_k", 50), settings.generation("top_p", 1.0)
    method = TOPP if top_p < 1 else TOPK if top_k else SAMPLE
    temperature = float(settings.generation("temperature", 1.0))
    return DecodingOptions(method, top_k=top_k, top_p=top_p, temperature=temperature, **rules)


def _rules(settings: Generation, forced: bool, never_id: int | None) -> dict[str, Any]:
    """Lengths, and what changes scores."""
    rules = {
        name: read(settings.generation(name)) for name, read in RULES.items() if settings.generation(name) is not None
    }
    for name in ("max_new_tokens", "min_new_tokens"):
        if settings.generation(name) is not None:  # where a forced first token counts; here it is not in the answer
            rules[name] = max(0, settings.generation(name) - forced)
    if settings.generation("forced_eos_token_id") is not None:
        rules["forced_eos_token_id"] = settings.token("forced_eos_token_id")
    if settings.generation("num_return_sequences") is not None:
        rules["num_hypotheses"] = settings.generation("num_return_sequences")
    ends = settings.generation(ENDS)
    if isinstance(ends, list):
        rules["end_ids"] = tuple(ends[1:])
    if len(rules.get("end_ids", ())) > MOST_END_IDS:
        settings.faults.append(f"{ENDS} has {len(ends)} ids; there may be {1 + MOST_END_IDS}")
    words = [word for word in settings.generation("bad_words_ids", []) if word != [never_id]]
    rules["bad_words_ids"] = tuple(map(tuple, words))
    taken = listed(DecodingOptions(**rules))
    if taken > LISTED:
        settings.faults.append(
            f"suppress_tokens, begin_suppress_tokens and bad_words_ids take {taken} numbers; there is room for {LISTED}"
        )
    return rules
