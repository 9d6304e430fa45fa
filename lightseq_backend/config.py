"""What a model is, how it decodes by default and how much room its engine gets: frozen, self-checking."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field, replace

from lightseq_backend.errors import ConfigError, RequestError

BEAM_SEARCH = "beam_search"
TOPK_GREEDY = "topk_greedy"  # k best first tokens, each continued greedily (LightSeq)
GREEDY = "greedy"  # beam search with one beam
TOPK = "topk"
TOPP = "topp"
SAMPLE = "sample"  # the whole distribution, unless top_k or top_p narrow it
SEARCH_METHODS = (BEAM_SEARCH, TOPK_GREEDY, GREEDY)
SAMPLING_METHODS = (TOPK, TOPP, SAMPLE)
METHODS = SEARCH_METHODS + SAMPLING_METHODS

ACTIVATIONS = ("relu", "gelu", "gelu_erf", "silu")  # gelu is the tanh form, LightSeq's only one
MAX_SEED = 2**63 - 1  # what a Triton request parameter can carry


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


@dataclass(frozen=True)
class DecodingOptions:
    """How one request wants its text. Files give the defaults; `with_changes` applies a request's own.

    top_k = 0 and top_p = 1 mean "do not narrow"; seed None means "any"; max_new_tokens None means
    "as many as the model allows"; num_hypotheses None means "all beams", or one when sampling.
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

    @property
    def searches(self) -> bool:
        return self.sampling_method in SEARCH_METHODS

    @property
    def width(self) -> int:
        """Rows a sequence needs: its beams, or its independent samples."""
        if self.sampling_method == GREEDY:
            return 1
        return self.beam_size if self.searches else self.num_hypotheses or 1

    @property
    def hypotheses(self) -> int:
        """Hypotheses that go back to the caller."""
        return self.num_hypotheses or self.width

    def with_changes(self, changes: dict[str, object], limits: DecodingLimits) -> DecodingOptions:
        """These options with a request's own settings; RequestError names each bad one with its limit."""
        unknown = sorted(set(changes) - set(OPTION_TYPES))
        if unknown:
            raise RequestError(f"unknown option {', '.join(unknown)}; options are {', '.join(OPTION_TYPES)}")
        values = {name: _typed(name, value) for name, value in changes.items()}
        if values.get("sampling_method", self.sampling_method) not in METHODS:
            raise RequestError(f"sampling_method is {values['sampling_method']!r}; methods are {', '.join(METHODS)}")
        options = replace(self, **values)  # type: ignore[arg-type]
        # What the file says of another method must not leak into the one that was asked for.
        if options.sampling_method != TOPK and "top_k" not in values:
            options = replace(options, top_k=0)
        if options.sampling_method != TOPP and "top_p" not in values:
            options = replace(options, top_p=1.0)
        if options.sampling_method != BEAM_SEARCH and "diverse_lambda" not in values:
            options = replace(options, diverse_lambda=0.0)
        faults = [*_range_faults(options, set(values), limits), *_combination_faults(options, set(values))]
        if faults:
            raise RequestError("; ".join(faults))
        return options


@dataclass(frozen=True)
class DecodingLimits:
    """What a loaded model can be asked for: max_beam_size rows a sequence, ids below vocabulary."""

    max_beam_size: int
    vocabulary: int


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
}
_SAMPLING_ONLY = ("top_k", "top_p", "temperature")


def _typed(name: str, value: object) -> object:
    wanted = OPTION_TYPES[name]
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    if wanted is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}; it takes a value of type {wanted.__name__}")
    return value


def _range_faults(options: DecodingOptions, given: set[str], limits: DecodingLimits) -> list[str]:
    """One sentence a value out of range. Only what the request gave, or what its method uses, is looked at."""
    faults = []

    def check(name: str, holds: bool, limit: str) -> None:
        if not holds:
            faults.append(f"{name} is {getattr(options, name)}; it must be {limit}")

    beams = limits.max_beam_size
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
    if options.max_new_tokens is not None:
        check("max_new_tokens", options.max_new_tokens >= 1, "at least 1")
    if options.num_hypotheses is not None:
        most, why = (options.beam_size, "the beam size") if options.searches else (beams, "this model's maximum")
        most = 1 if options.sampling_method == GREEDY else most
        check("num_hypotheses", 1 <= options.num_hypotheses <= most, f"from 1 to {most}, {why}")
    return faults


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
    return faults


@dataclass(frozen=True)
class TransformerConfig:
    """An encoder-decoder Transformer as LightSeq's transformer.pb describes it.

    max_positions is LightSeq's max_step: rows of both position tables. With scaled_embedding (the file's
    `no_scale_embedding` is false) the tables already hold sqrt(hidden) and logits are multiplied by
    1/sqrt(hidden). post_norm is LightSeq's form: a LayerNorm stands *before* each sublayer and the residual
    takes its output. end_id is resolved: never "0 means vocabulary - 1" here.

    What LightSeq's files cannot say: norm_epsilon (None: the dialect's); without first_norm nothing normalises what
    the first sublayer of either stack reads; with embedding_norm a LayerNorm of its own follows the embeddings;
    never_id is an id that is never generated; forced_id is fed after the start id, before anything is generated (a
    multilingual model's target language), and is not in the answer. A standard post-norm model is LightSeq's form
    with its LayerNorms moved one sublayer on: the first sublayer has the embeddings' (BART) or none (Marian), the
    last one is the final one.
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
        if options.sampling_method in (TOPK_GREEDY, *SAMPLING_METHODS):
            limit = self.max_positions - 1 - (self.forced_id is not None)
        else:
            columns = min(self.max_positions, source_length + self.extra_decode_length)
            limit = max(0, columns - self.dialect.spare_columns - (self.forced_id is not None))
        return limit if options.max_new_tokens is None else min(limit, options.max_new_tokens)


@dataclass(frozen=True)
class GptConfig:
    """A decoder-only model as LightSeq's gpt.pb describes it. extra_decode_length <= 0: up to max_positions."""

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
        """Tokens that a prompt of that length may grow. A full context still gives one (lightseq_format.md 3.9)."""
        extra = self.extra_decode_length if self.extra_decode_length > 0 else self.max_positions
        limit = max(1, min(self.max_positions, prompt_length + extra) - prompt_length)
        return limit if options.max_new_tokens is None else min(limit, options.max_new_tokens)


Config = TransformerConfig | GptConfig


def _architecture_faults(config: Config, sizes: tuple[str, ...]) -> list[str]:
    faults = [
        f"{name} is {getattr(config, name)}; it must be at least 1" for name in sizes if getattr(config, name) < 1
    ]
    if config.activation not in ACTIVATIONS:
        faults.append(f"activation is {config.activation!r}; known activations are {', '.join(ACTIVATIONS)}")
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
    prompt_tokens   source or prompt tokens in one prefill pass (at least the model's max_positions)
    burst           decode steps between two looks at what finished
    scores          whether given tokens can be scored: on a GPU every such pass is captured when the model is loaded
    """

    slots: int = 32
    max_beam_size: int = 16
    queue: int = 256
    prompt_tokens: int = 1024
    burst: int = 1
    scores: bool = True

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if name != "scores"}
        faults = [f"{name} is {value}; it must be at least 1" for name, value in sizes.items() if value < 1]
        if self.max_beam_size > self.slots:
            faults.append(f"max_beam_size is {self.max_beam_size}; there are {self.slots} slots")
        if faults:
            raise ConfigError("\n".join(faults))
