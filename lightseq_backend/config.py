"""What a model is and how much room its engine gets: frozen, self-checking. How it decodes is in options.py."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

from lightseq_backend.errors import ConfigError
from lightseq_backend.options import (  # noqa: F401 -- handed on: whoever asks for a configuration finds them here
    BEAM_SEARCH,
    GREEDY,
    MAX_SEED,
    METHODS,
    OPTION_TYPES,
    SAMPLE,
    SAMPLING_METHODS,
    SEARCH_METHODS,
    STANDARD_BEAM,
    TOPK,
    TOPK_GREEDY,
    TOPP,
    DecodingLimits,
    DecodingOptions,
    Ids,
)

TABLE, LEARNED, SINUSOIDS, INTERLEAVED = "table", "learned", "sinusoids", "interleaved_sinusoids"
# A table of unknown making, a learned one, fairseq's and tensor2tensor's sinusoids, and Marian's.
POSITIONS = (TABLE, LEARNED, SINUSOIDS, INTERLEAVED)
ACTIVATIONS = ("relu", "gelu", "gelu_erf", "silu")  # gelu is the tanh form, LightSeq's only one


@dataclass(frozen=True)
class Dialect:
    """Where the releases of LightSeq differ for one and the same file.

    name            "head" (3.x) or "v0" (the release of 2019)
    norm_epsilon    inside the square root of every LayerNorm
    other_beams     log-probability that the beams but the first start with
    spare_columns   a search of at most M = min(max_step, source + extra) columns generates
                    M - spare_columns tokens before it is cut
    end_is_last     the end id is always vocabulary - 1, whatever the file says
    bans_unknown    id vocabulary - 3 is never generated
    """

    name: str
    norm_epsilon: float
    other_beams: float
    spare_columns: int
    end_is_last: bool
    bans_unknown: bool


DIALECTS = {
    "head": Dialect("head", 1e-12, -1000.0, 2, False, False),
    "v0": Dialect("v0", 1e-6, -5000.0, 1, True, True),
}


def dialect_named(name: str) -> Dialect:
    if name not in DIALECTS:
        raise ConfigError(f"dialect is {name!r}; known dialects are {', '.join(DIALECTS)}")
    return DIALECTS[name]


class Norms(NamedTuple):
    """Where a stack has LayerNorms: TransformerConfig says what each means."""

    post: bool
    first: bool
    embedding: bool


@dataclass(frozen=True)
class TransformerConfig:
    """An encoder-decoder Transformer as LightSeq's transformer.pb describes it.

    max_positions is LightSeq's max_step: rows of both position tables. With scaled_embedding (the file's
    `no_scale_embedding` is false) the tables already hold sqrt(hidden) and logits are multiplied by
    1/sqrt(hidden). post_norm is LightSeq's form: a LayerNorm stands *before* each sublayer and the residual
    takes its output. end_id is resolved: never "0 means vocabulary - 1" here.

    What LightSeq's files cannot say: norm_epsilon (None: the dialect's); without first_norm nothing normalises what
    the first sublayer reads; with embedding_norm a LayerNorm of its own follows the embeddings; without
    encoder_final_norm or decoder_final_norm none follows that stack; the other decoder_* are those of the decoder
    where it differs (None: as the encoder's); never_id is an id that is never generated; forced_id is fed after the
    start id, before anything is generated (a multilingual model's target language), and is not in the answer. A
    standard post-norm model is LightSeq's form with its LayerNorms moved one sublayer on: the first sublayer has the
    embeddings' (BART) or none (Marian), the last one is the final one.

    positions says what the tables are (POSITIONS), and position_offset how many positions in front of theirs the
    source has that no token uses. Nothing is computed from either.
    """

    hidden: int
    inner: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    source_vocabulary: int
    target_vocabulary: int
    max_positions: int
    padding_id: int
    start_id: int
    end_id: int
    extra_decode_length: int = 50
    post_norm: bool = False
    activation: str = "relu"
    scaled_embedding: bool = True
    norm_epsilon: float | None = None
    first_norm: bool = True
    embedding_norm: bool = False
    encoder_final_norm: bool = True
    decoder_final_norm: bool = True
    decoder_post_norm: bool | None = None
    decoder_first_norm: bool | None = None
    decoder_embedding_norm: bool | None = None
    positions: str = TABLE
    position_offset: int = 0
    never_id: int | None = None
    forced_id: int | None = None
    dialect: Dialect = DIALECTS["head"]
    decoding: DecodingOptions = field(default_factory=DecodingOptions)

    def __post_init__(self) -> None:
        sizes = ("hidden", "inner", "heads", "encoder_layers", "decoder_layers", "max_positions")
        faults = _architecture_faults(self, (*sizes, "source_vocabulary", "target_vocabulary"))
        optional = [name for name in ("never_id", "forced_id") if getattr(self, name) is not None]
        for name in ("start_id", "end_id", *optional):
            if not 0 <= getattr(self, name) < self.target_vocabulary:
                faults.append(f"{name} is {getattr(self, name)}; the target vocabulary has {self.target_vocabulary}")
        if faults:
            raise ConfigError("\n".join(faults))

    @property
    def encoder_norms(self) -> Norms:
        return Norms(self.post_norm, self.first_norm, self.embedding_norm)

    @property
    def decoder_norms(self) -> Norms:
        own = (self.decoder_post_norm, self.decoder_first_norm, self.decoder_embedding_norm)
        return Norms(*(there if here is None else here for here, there in zip(own, self.encoder_norms)))

    @property
    def vocabulary(self) -> int:
        """Ids that decoding chooses from."""
        return self.target_vocabulary

    @property
    def input_vocabulary(self) -> int:
        """Ids that a request may contain."""
        return self.source_vocabulary

    @property
    def banned_id(self) -> int:
        """The id that is never generated, or -1."""
        if self.never_id is not None:
            return self.never_id
        return self.target_vocabulary - 3 if self.dialect.bans_unknown else -1

    @property
    def epsilon(self) -> float:
        return self.dialect.norm_epsilon if self.norm_epsilon is None else self.norm_epsilon

    @property
    def logit_scale(self) -> float:
        return 1 / math.sqrt(self.hidden) if self.scaled_embedding else 1.0

    def new_tokens(self, source_length: int, options: DecodingOptions) -> int:
        """Tokens that a source of that padded length may grow (lightseq_format.md 3.5); 0 is possible."""
        fed = len(self.prefix(options))
        if options.standard or options.sampling_method in (TOPK_GREEDY, *SAMPLING_METHODS):
            limit = self.max_positions - 1 - fed
        else:
            columns = min(self.max_positions, source_length + self.extra_decode_length)
            limit = columns - self.dialect.spare_columns - fed
        return max(0, _shortened(limit, options, 1 + fed))

    def prefix(self, options: DecodingOptions) -> Ids:
        """What the decoder is fed after the start id before it chooses: a request's own prefix or the forced token."""
        if options.decoder_prefix:
            return options.decoder_prefix
        forced = self.forced_id if options.forced_bos_token_id is None else options.forced_bos_token_id
        return () if forced is None else (forced,)


@dataclass(frozen=True)
class GptConfig:
    """A decoder-only model as LightSeq's gpt.pb describes it. extra_decode_length <= 0: up to max_positions.

    What LightSeq's files cannot say is as in TransformerConfig; without final_norm none follows the last layer.
    """

    hidden: int
    inner: int
    heads: int
    layers: int
    vocabulary: int
    max_positions: int
    padding_id: int
    end_id: int
    extra_decode_length: int = 0
    activation: str = "gelu"
    norm_epsilon: float | None = None
    final_norm: bool = True
    positions: str = TABLE
    position_offset: int = 0
    dialect: Dialect = DIALECTS["head"]
    decoding: DecodingOptions = field(default_factory=lambda: DecodingOptions(TOPK, top_k=4))

    def __post_init__(self) -> None:
        faults = _architecture_faults(self, ("hidden", "inner", "heads", "layers", "vocabulary", "max_positions"))
        if not 0 <= self.end_id < self.vocabulary:
            faults.append(f"end_id is {self.end_id}; the vocabulary has {self.vocabulary}")
        if faults:
            raise ConfigError("\n".join(faults))

    @property
    def input_vocabulary(self) -> int:
        """Ids that a request may contain."""
        return self.vocabulary

    @property
    def banned_id(self) -> int:
        return -1

    @property
    def epsilon(self) -> float:
        return self.dialect.norm_epsilon if self.norm_epsilon is None else self.norm_epsilon

    @property
    def logit_scale(self) -> float:
        return 1.0

    def new_tokens(self, prompt_length: int, options: DecodingOptions) -> int:
        """Tokens that a prompt of that length may grow. A full context still gives one (lightseq_format.md 3.9); with a
        max_length that the prompt has reached there are none."""
        extra = self.extra_decode_length if self.extra_decode_length > 0 else self.max_positions
        limit = max(1, min(self.max_positions, prompt_length + extra) - prompt_length)
        return _shortened(limit, options, prompt_length)


Config = TransformerConfig | GptConfig


def _shortened(limit: int, options: DecodingOptions, fed: int) -> int:
    """The limit of new tokens as a request's own limits leave it, after so many tokens that were fed. Where there are
    two, that of new tokens counts."""
    if options.max_new_tokens is not None:
        return min(limit, options.max_new_tokens)
    return limit if options.max_length is None else min(limit, options.max_length - fed)


def _architecture_faults(config: Config, sizes: tuple[str, ...]) -> list[str]:
    faults = [
        f"{name} is {getattr(config, name)}; it must be at least 1" for name in sizes if getattr(config, name) < 1
    ]
    if config.activation not in ACTIVATIONS:
        faults.append(f"activation is {config.activation!r}; known activations are {', '.join(ACTIVATIONS)}")
    if config.positions not in POSITIONS:
        faults.append(f"positions is {config.positions!r}; known kinds are {', '.join(POSITIONS)}")
    if config.position_offset < 0:
        faults.append(f"position_offset is {config.position_offset}; it must be at least 0")
    if config.norm_epsilon is not None and not 0 < config.norm_epsilon < 1:
        faults.append(f"norm_epsilon is {config.norm_epsilon}; it must be over 0 and below 1")
    if config.heads > 0 and config.hidden % config.heads:
        faults.append(f"hidden size {config.hidden} does not divide into {config.heads} heads")
    return faults


@dataclass(frozen=True)
class EngineConfig:
    """How much room an engine gets and how it paces itself.

    slots           rows that decode at the same time: beams and samples of all sequences together
    max_beam_size   widest sequence
    queue           sequences that may wait; one more is refused with Overloaded
    queue_tokens    tokens that those may have together
    queue_seconds   how long one may wait; then it is answered with Overloaded
    prompt_tokens   source or prompt tokens in one prefill pass (at least the model's max_positions)
    burst           decode steps between two looks at what finished
    scores          whether given tokens can be scored: on a GPU every such pass is captured when the model is loaded
    """

    slots: int = 32
    max_beam_size: int = 16
    queue: int = 256
    queue_tokens: int = sys.maxsize
    queue_seconds: float = math.inf
    prompt_tokens: int = 1024
    burst: int = 1
    scores: bool = True

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if name != "scores"}
        faults = [f"{name} is {value}; it must be at least 1" for name, value in sizes.items() if not value >= 1]
        if self.max_beam_size > self.slots:
            faults.append(f"max_beam_size is {self.max_beam_size}; there are {self.slots} slots")
        if faults:
            raise ConfigError("\n".join(faults))
