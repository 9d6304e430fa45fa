"""Which method a sequence's text is chosen by: its first records, and its answer from the last ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from lightseq_backend.config import TOPK_GREEDY, Config, DecodingOptions, GptConfig, TransformerConfig
from lightseq_backend.decoding import beam, sampling, standard, stops
from lightseq_backend.ops.slots import SLOT
from lightseq_backend.request import Hypothesis, Output, Sequence
from lightseq_backend.small import remembered


def begin(sequence: Sequence, config: Config) -> np.ndarray:
    """SLOT [width]: the records that the sequence's slots start with."""
    options = sequence.request.options
    records = np.frombuffer(bytearray(_asked_for(options, config)), SLOT)  # NumPy takes 7 us to copy such an array
    records["limit"] = sequence.limit
    if not options.searches and not options.standard:
        sampling.draw(records, sequence)
    if isinstance(config, GptConfig):
        records["token"], records["length"] = sequence.tokens[-1], len(sequence.tokens) - 1
    else:
        records["memory"], records["memory_length"] = sequence.slots[0], len(sequence.tokens)
    return records


@remembered  # most requests of a server ask for the same
def _asked_for(options: DecodingOptions, config: Config) -> bytes:
    """What of its first records is the same for every sequence with these options."""
    if options.standard:
        records = standard.begin(options, config)
    elif options.searches:
        records = beam.begin(options, config.end_id, config.dialect)
    else:
        records = sampling.begin(options, config.end_id)
    records["detailed"], records["ruled"] = options.detailed, options.ruled
    if isinstance(config, TransformerConfig):
        fed = (config.start_id, *config.prefix(options))
        records["token"], records["length"] = fed[-1], len(fed) - 1
    return records.tobytes()


def without_a_step(sequence: Sequence, config: Config) -> Output | None:
    """The answer to a source too short for a single token; and, as in LightSeq, to a prompt that ends with the end
    id. None for all others."""
    options = sequence.request.options
    if isinstance(config, GptConfig):
        if sequence.tokens[-1] != config.end_id or options.standard:
            return None
        hypothesis = Hypothesis(np.array([config.end_id], np.int32), 0.0, finished=True)
        return Output((hypothesis,) * options.hypotheses, steps=1)
    if sequence.limit > 0:
        return None
    hypothesis = Hypothesis(np.zeros(0, np.int32), 0.0, finished=False)
    return Output((hypothesis,) * options.hypotheses, steps=0, cut=True)


def kept(sequences: Iterable[Sequence]) -> list[str]:
    """Names of the arrays of the decoding state that hold what these sequences have found."""
    options = [one.request.options for one in sequences]
    names = {"pool" if one.standard else "history" for one in options}
    names |= {"pool_details" if one.standard else "details" for one in options if one.detailed}
    return sorted(names)


def looked_at(sequences: Iterable[Sequence]) -> list[str]:
    """Names of the arrays that `begun` and, where a stop word has ended a text, `finish_early` read."""
    options = [one.request.options for one in sequences]
    names = {"history"} | {"pool" for one in options if one.standard} | {"details" for one in options if one.stops}
    return sorted(names)


def texts(options: DecodingOptions) -> int:
    """How many texts `begun` tells of."""
    if options.searches and options.width > 1 and not _keeps_places(options):
        return 1
    return options.hypotheses


def begun(sequence: Sequence, records: np.ndarray, lanes: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What the answer of a sequence that goes on begins with, whatever comes: int32 [n] a text.

    Rows that do not compete are a text each. Beams have one, what they all begin with, and the best finished one.
    """
    options = sequence.request.options
    generated = int(records["generated"][0])
    rows = list(lanes["history"][:, :generated])
    for row in np.flatnonzero(records["finished"]).tolist():
        rows[row] = rows[row][: beam.text_length(records[row], rows[row])]
    if not options.searches or options.width == 1 or _keeps_places(options):
        return rows[: options.hypotheses]
    if options.standard and (records["pool_length"] > 0).any():
        best = int(np.where(records["pool_length"] > 0, records["pool_score"], -np.inf).argmax())
        rows.append(lanes["pool"][best, : records["pool_length"][best]])
    shortest = min(map(len, rows))
    differs = np.any([row[:shortest] != rows[0][:shortest] for row in rows], axis=0)
    return [rows[0][: int(differs.argmax()) if differs.any() else shortest]]


def finish(sequence: Sequence, records: np.ndarray, lanes: Mapping[str, np.ndarray]) -> Output:
    """The answer. records: SLOT [width]; lanes: the sequence's rows of the arrays that `kept` names."""
    options = sequence.request.options
    if options.standard:
        output = standard.finish(sequence, records, lanes)
    else:
        details = lanes["details"] if options.detailed else None
        if options.searches:
            output = beam.finish(sequence, records, lanes["history"], details)
        else:
            output = sampling.finish(records, lanes["history"], details)
    return output if sequence.stops is None else stops.cut(output, sequence.stops, options)


def finish_early(sequence: Sequence, records: np.ndarray, lanes: Mapping[str, np.ndarray]) -> Output:
    """The answer where every text has a stop or is finished; lanes: of the arrays that `looked_at` names."""
    output = sampling.finish(records, lanes["history"], lanes["details"])  # their scores are stops.cut's affair
    return stops.cut(output, sequence.stops, sequence.request.options)


def _keeps_places(options: DecodingOptions) -> bool:
    """Whether the beams of a search stay what they are after their first token."""
    return options.sampling_method == TOPK_GREEDY and options.length_penalty >= 0
