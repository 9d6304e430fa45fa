"""Which method a sequence's text is chosen by: its first records, and its answer from the last ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from lightseq_backend.config import Config, GptConfig
from lightseq_backend.decoding import beam, sampling, standard
from lightseq_backend.request import Output, Sequence


def begin(sequence: Sequence, config: Config) -> np.ndarray:
    """SLOT [width]: the records that the sequence's slots start with."""
    options = sequence.request.options
    if options.standard:
        records = standard.begin(sequence, config)
    elif options.searches:
        records = beam.begin(sequence, config.end_id, config.dialect)
    else:
        records = sampling.begin(sequence, config.end_id)
    records["detailed"], records["ruled"] = options.token_log_probabilities, options.ruled
    if isinstance(config, GptConfig):
        records["token"], records["length"] = sequence.tokens[-1], len(sequence.tokens) - 1
    else:
        fed = (config.start_id, *config.prefix(options))
        records["token"], records["length"] = fed[-1], len(fed) - 1
        records["memory"], records["memory_length"] = sequence.slots[0], len(sequence.tokens)
    return records


def kept(sequences: Iterable[Sequence]) -> list[str]:
    """Names of the arrays of the decoding state that hold what these sequences have found."""
    options = [one.request.options for one in sequences]
    names = {"pool" if one.standard else "history" for one in options}
    names |= {"pool_details" if one.standard else "details" for one in options if one.token_log_probabilities}
    return sorted(names)


def finish(sequence: Sequence, records: np.ndarray, lanes: Mapping[str, np.ndarray]) -> Output:
    """The answer. records: SLOT [width]; lanes: the sequence's rows of the arrays that `kept` names."""
    options = sequence.request.options
    if options.standard:
        return standard.finish(sequence, records, lanes)
    details = lanes["details"] if options.token_log_probabilities else None
    if options.searches:
        return beam.finish(sequence, records, lanes["history"], details)
    return sampling.finish(records, lanes["history"], details)
