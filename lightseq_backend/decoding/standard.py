"""The standard beam search, as Hugging Face's generate has it: its start and its result; the step is ops.standard_step.

Also the rules on scores that any method but LightSeq's searches may have: what of a request the device reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lightseq_backend.config import Config, DecodingOptions, GptConfig
from lightseq_backend.decoding.state import new_records
from lightseq_backend.ops.choice import length_norm
from lightseq_backend.ops.slots import (
    EMPTY,
    RULES,
    STANDARD,
    UNTIL_FULL,
    UNTIL_NO_BETTER,
    UNTIL_NONE_CAN_BE,
    end_ids,
)
from lightseq_backend.options import GREEDY, LISTED, NEVER, NO_RULES
from lightseq_backend.request import Hypothesis, Output, Sequence

OTHER_BEAMS = -1e9  # log-probability that the beams but the first start with


def begin(options: DecodingOptions, config: Config) -> np.ndarray:
    """SLOT [beams]. All beams start alike; all but the first are out of the question, so the first step fans out."""
    records = new_records(options, STANDARD, config.end_id)
    records["log_probability"][1:] = OTHER_BEAMS
    if options.sampling_method == GREEDY:  # its scores are LightSeq's: from the plain sum
        records["length_penalty"] = 0
    records["pool_score"] = EMPTY
    records["counted"] = counted(options, config)
    if options.width == 1 or options.early_stopping is True:  # with one beam the search is greedy
        records["stopping"] = UNTIL_FULL
    else:
        records["stopping"] = UNTIL_NONE_CAN_BE if options.early_stopping == NEVER else UNTIL_NO_BETTER
    return records


def finish(sequence: Sequence, records: np.ndarray, lanes: Mapping[str, np.ndarray]) -> Output:
    """records: SLOT [beams]; lanes: pool, int32 [beams, steps], and pool_details. The pool, best first.

    A rule may leave too few texts possible: then hypotheses without tokens fill it up, as bad as can be.
    """
    options = sequence.request.options
    hypotheses = []
    for place in np.argsort(-records["pool_score"], kind="stable")[: options.hypotheses].tolist():
        length, score = int(records["pool_length"][place]), float(records["pool_score"][place])
        tokens = lanes["pool"][place, :length]
        ended = bool(length) and int(tokens[-1]) in end_ids(records[place])
        silent = int(ended and tokens[-1] != records["end_id"][place])
        if options.sampling_method == GREEDY:
            norm = float(length_norm(length, options.length_penalty))
            score *= norm if options.length_penalty >= 0 else 1 / max(length - ended, 1e-6)
        details = lanes["pool_details"][place, :length] if options.detailed else None
        hypotheses.append(Hypothesis(tokens, score, ended, details, silent))
    longest = max(len(one.tokens) for one in hypotheses)
    return Output(tuple(hypotheses), longest, cut=not all(one.finished for one in hypotheses))


def counted(options: DecodingOptions, config: Config) -> int:
    """Tokens in front of the answer that count as generated: a forced first one does, a request's prefix does not."""
    return 0 if isinstance(config, GptConfig) or options.decoder_prefix else len(config.prefix(options))


def rules_act(sequence: Sequence, steps: int) -> bool:
    """Whether the sequence's rules may change a score in its next `steps` steps: some do at the start or the limit
    alone, and a step without rules is faster."""
    options = sequence.request.options
    if not options.ruled:
        return False
    starting = 1 if options.begin_suppress_tokens else 0
    starting = max(starting, options.min_new_tokens or options.min_length)
    ending = options.forced_eos_token_id is not None and sequence.queued + steps >= sequence.limit
    return ending or sequence.queued < starting or any(getattr(options, name) != NO_RULES[name] for name in _ALWAYS)


_ALWAYS = ("no_repeat_ngram_size", "repetition_penalty", "suppress_tokens", "bad_words_ids")


def rules(sequence: Sequence, config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RULES [1], int32 [LISTED] and the context, int32 [n]: what a request asks of its rows' scores."""
    options = sequence.request.options
    context = sequence.tokens
    if not isinstance(config, GptConfig):
        context = np.array([config.start_id, *config.prefix(options)], np.int32)
    ends = {(id_,) for id_ in (config.end_id, *options.end_ids)}
    words = [word for word in options.bad_words_ids if word not in ends]
    numbers = [*options.suppress_tokens, *options.begin_suppress_tokens]
    for word in words:
        numbers += [len(word), *word]
    listed = np.zeros(LISTED, np.int32)
    listed[: len(numbers)] = numbers
    record = np.zeros(1, RULES)
    record["repetition_penalty"] = options.repetition_penalty
    record["no_repeat"] = options.no_repeat_ngram_size
    record["least"] = options.min_new_tokens or max(0, options.min_length - len(context))
    record["forced_end"] = -1 if options.forced_eos_token_id is None else options.forced_eos_token_id
    record["context"] = len(context)
    record["suppressed"], record["suppressed_first"] = len(options.suppress_tokens), len(options.begin_suppress_tokens)
    record["words"] = len(words)
    return record, listed, context
