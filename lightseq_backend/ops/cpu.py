"""Every operation in NumPy: the specification, and the engine of machines without a GPU.

Conventions. A row is a token: activations are float32 [rows, width], C-contiguous. `norm` is (gain, bias), each
[width]; `linear` is (weight [in, out], bias [out]). Results go to `out`; nothing else is written unless said. A row's
result depends on that row alone, to the last bit: never on how many rows there are or where it stands (product.py
says how). `rows` is int32 [n]: the slot of each row, the rows of one sequence next to each other, its beam 0 first;
the record of a slot is ops/slots.py. `keys` and `values` are one layer's cache, [slots, steps, hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend.ops.choice import FLOAT, Array, beam_step, target_log_probabilities, top
from lightseq_backend.ops.choice import sample_step as sample_step
from lightseq_backend.ops.product import choose_threads, product, scratch
from lightseq_backend.ops.standard import apply_rules as apply_rules
from lightseq_backend.ops.standard import standard_step

NAME = "cpu"
PRECISION = "fp32"
SCORED_ROWS = 32  # rows whose logits are held at the same time when texts are scored
BURSTS_AHEAD = 1  # bursts queued before the end of the first is looked at: a GPU must not wait for the host
MOST_BEAMS = 1 << 30  # of one search: no limit
MOST_CANDIDATES = 1 << 30  # best tokens of one row
LOGITS_ALIGNMENT = 1  # rows of logits begin at multiples of so many numbers


class Norm(NamedTuple):
    gain: Array
    bias: Array


class Folded(NamedTuple):
    """A weight with the LayerNorm in front of it: layer_norm(x) . W = ((x - mean) / deviation) . weight + offsets."""

    weight: Array
    offsets: Array


class Linear(NamedTuple):
    weight: Any  # Array or, only for operations with a LayerNorm in front, Folded
    bias: Array | None


# Memory and transfer -------------------------------------------------------------------------------------------------


def start() -> None:
    """Readies the process: settles how BLAS is used (product.py)."""
    choose_threads()


def matrix(array: Array, norm: Norm | None = None) -> Array:
    """A weight [in, out] as `linear` operations want it.

    norm: a promise (gain and bias on the host) that only operations with that LayerNorm in front (norm_linear, those of
    the vocabulary) will use it, and that nothing reads `normed` afterwards: a device may fold the gain into the weight.
    """
    return np.asarray(array, FLOAT)


def vocabulary_matrix(array: Array, norm: Norm | None = None) -> Array:
    """The same for a weight that only operations of the vocabulary use."""
    return matrix(array, norm)


def vector(array: Array) -> Array:
    """A gain or bias [width] as operations want it."""
    return np.ascontiguousarray(array, FLOAT)


def table(array: Array) -> Array:
    """An embedding table [ids, width] as the embed operations want it; a transposed view will do."""
    return np.asarray(array, FLOAT)


def weight_bytes(shape: tuple[int, ...], use: str) -> int:
    """Memory that an array takes beside itself where it is put to use: none here.

    use: the function that puts it, "matrix" and so on.
    """
    return 0


def shared_bytes(shape: tuple[int, ...], use: str) -> int:
    """Memory that an array takes while it is used, the same for all of them: as much as the most of one. None here."""
    return 0


def available_memory() -> int:
    """Bytes that can still be allocated: the smaller of what the machine and the control group have left."""
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as used:
            limit = most.read().strip()
            if limit != "max":
                free = min(free, max(0, int(limit) - int(used.read())))
    except OSError:
        pass
    return free


def allocate(size: int) -> Array:
    """One block of `size` bytes, uint8, zeroed, aligned to 64 bytes; pages are taken when first touched."""
    block = np.zeros(size + 64, np.uint8)
    shift = -block.ctypes.data % 64
    return block[shift : shift + size]


def view(block: Array, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The part of a block that starts at byte `offset`, as an array."""
    return np.ndarray(shape, dtype, block.data, offset)


def put(destination: Array, source: Array) -> None:
    """Copies from the host."""
    destination[...] = source


def get(source: Array) -> Array:
    """A copy on the host of what no queued operation writes any more; read-only."""
    return _kept(source)


def fetch(source: Array) -> Callable[[], Array]:
    """Queues a copy to the host behind the operations before it; calling the result waits for it and returns it,
    read-only."""
    copy = _kept(source)
    return lambda: copy


def _kept(source: Array) -> Array:
    copy = np.array(source)
    copy.flags.writeable = False
    return copy


def fault() -> str | None:
    """Why the device cannot go on after an error, or None where it can."""
    return None


def pass_sizes(most: int) -> Sequence[int]:
    """Numbers of rows, ascending up to `most`, that a pass over sequences is captured for; others are filled up."""
    return range(1, most + 1)


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """What replays `run`: a graph launch on a GPU, `run` itself here."""
    return run


# Embedding -----------------------------------------------------------------------------------------------------------


def embed_tokens(tokens: Array, positions: Array, token_table: Array, position_table: Array, out: Array) -> None:
    """out[r] = token_table[tokens[r]] + position_table[positions[r]], or zeros where tokens[r] is negative.

    tokens, positions: int32 [rows]; tables: [ids, width], [positions, width]; out: [rows, width].
    """
    np.add(token_table[tokens], position_table[positions], out=out)
    out[tokens < 0] = 0


def embed_rows(rows: Array, slots: Array, token_table: Array, position_table: Array, out: Array) -> None:
    """embed_tokens for the token that each row's slot holds, at the position it will have in the cache."""
    embed_tokens(slots["token"][rows], slots["length"][rows], token_table, position_table, out)


# Normalisation and matrix products -----------------------------------------------------------------------------------


def layer_norm(x: Array, norm: Norm, epsilon: float, out: Array) -> None:
    """out = (x - mean) / sqrt(variance + epsilon) * gain + bias, over the last axis; biased variance, two passes."""
    width = FLOAT.type(x.shape[-1])
    np.subtract(x, x.sum(axis=-1, keepdims=True) / width, out=out)
    variance = np.square(out).sum(axis=-1, keepdims=True) / width
    out /= np.sqrt(variance + FLOAT.type(epsilon))
    out *= norm.gain
    out += norm.bias


def linear(x: Array, linear: Linear, out: Array) -> None:
    """out = x . W + b. x: [rows, in]; out: [rows, out]."""
    product(x, linear.weight, out, lambda part, columns: _add_bias(part, linear.bias, columns))


def norm_linear(
    x: Array, norm: Norm, linear: Linear, epsilon: float, activation: str, normed: Array, out: Array
) -> None:
    """normed = layer_norm(x), without gain and bias if they are in W; out = activation(normed . W + b).

    x, normed: [rows, in], not the same memory; out: [rows, out]; activation: none, relu, gelu (tanh form), gelu_erf
    or silu.
    """
    weight, offsets = _normalise(x, norm, linear, epsilon, normed)

    def finish(part: Array, columns: slice) -> None:
        _add_bias(part, offsets, columns)
        _add_bias(part, linear.bias, columns)
        _ACTIVATIONS[activation](part)

    product(normed, weight, out, finish)


def linear_residual(x: Array, linear: Linear, residual: Array, out: Array) -> None:
    """out = residual + x . W + b. x: [rows, in]; residual, out: [rows, out]; out may be the residual itself."""
    change = scratch("change", out.shape)
    product(x, linear.weight, change, lambda part, columns: _add_bias(part, linear.bias, columns))
    np.add(residual, change, out=out)


def _normalise(
    x: Array, norm: Norm | None, linear: Linear, epsilon: float, normed: Array
) -> tuple[Array, Array | None]:
    """normed = layer_norm(x), as far as it is not in the weight; that, and what is to be added to the product."""
    if norm is None:
        normed[:] = x
        return linear.weight, None
    if isinstance(linear.weight, Folded):
        layer_norm(x, Norm(np.ones(1, FLOAT), np.zeros(1, FLOAT)), epsilon, normed)
        return linear.weight
    layer_norm(x, norm, epsilon, normed)
    return linear.weight, None


def _add_bias(part: Array, bias: Array | None, columns: slice) -> None:
    if bias is not None:
        part += bias[columns]


def _relu(x: Array) -> None:
    np.maximum(x, 0, out=x)


def _gelu(x: Array) -> None:
    """x = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), in place (Hendrycks and Gimpel 2016, tanh form)."""
    inner = np.multiply(x, x)
    inner *= FLOAT.type(0.044715)
    inner += 1
    inner *= x
    inner *= FLOAT.type(0.7978845608028654)
    np.tanh(inner, out=inner)
    inner += 1
    x *= inner
    x *= FLOAT.type(0.5)


def _gelu_erf(x: Array) -> None:
    """x = 0.5 x (1 + erf(x / sqrt(2))), in place (Hendrycks and Gimpel 2016): max(x, 0) - |x| upper_tail(|x|).

    NumPy has no erf. The normal distribution's upper tail at a is exp(-a^2 / 2) times a polynomial in
    1 / (1 + a / 4), fitted over 0 to 12; |x| times its error stays under 1.1e-8.
    """
    size = np.abs(x)
    place = 1 / (1 + size * FLOAT.type(0.25))
    tail = np.full_like(x, _TAIL[0])
    for coefficient in _TAIL[1:]:
        tail *= place
        tail += FLOAT.type(coefficient)
    np.multiply(size, size, out=place)
    place *= FLOAT.type(-0.5)
    tail *= np.exp(place, out=place)
    tail *= size
    np.maximum(x, 0, out=x)
    x -= tail


_TAIL = (
    -0.09768290019, 0.3710454916, -0.3264953209, 0.3460100975,
    -0.01612857488, 0.1270656686, 0.09596467103, 0.0002208587514,
)  # fmt: skip


def _silu(x: Array) -> None:
    """x = x / (1 + exp(-x)), in place; below -80, where exp might overflow, it is as good as nothing."""
    divisor = np.maximum(x, FLOAT.type(-80))
    np.negative(divisor, out=divisor)
    np.exp(divisor, out=divisor)
    divisor += 1
    x /= divisor


_ACTIVATIONS: dict[str, Callable[[Array], None]] = {
    "none": lambda x: None,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_erf": _gelu_erf,
    "silu": _silu,
}


# Attention -----------------------------------------------------------------------------------------------------------


def packed_attention(qkv: Array, starts: Array, heads: int, causal: bool, out: Array) -> None:
    """Self-attention inside each packed sequence: rows starts[b] to starts[b + 1].

    out[r] = concat over heads of softmax(q[r] . k[s] / sqrt(d)) . v[s], s over r's sequence (up to r when causal).
    qkv: [rows, 3 * hidden] (q, k, v); starts: int32 [sequences + 1]; out: [rows, hidden]. A sequence may be empty;
    rows that belong to none are left as they are.
    """
    hidden = qkv.shape[1] // 3
    for sequence in np.flatnonzero(np.diff(starts)):
        first, last = starts[sequence : sequence + 2].tolist()
        q, k, v = (_by_head(qkv[first:last, i * hidden : (i + 1) * hidden], heads) for i in range(3))
        for block in range(0, last - first, _QUERIES):
            queries = q[:, block : block + _QUERIES]
            mask = None
            if causal:
                mask = np.arange(last - first) > np.arange(block, block + queries.shape[1])[:, None]
            context = _attend(queries, k, v, mask)
            out[first + block : first + block + queries.shape[1]] = _rows(context)


def decode_attention(
    qkv: Array, rows: Array, slots: Array, ancestors: Array, keys: Array, values: Array, heads: int, out: Array
) -> None:
    """One new token a row: stores its keys and values at step `length` of its slot, then attends to its past.

    Step t of slot s is found at keys[ancestors[s, t], t]; ancestors[s, length] becomes s.
    qkv: [rows, 3 * hidden]; ancestors: int32 [slots, steps]; out: [rows, hidden].
    """
    hidden = qkv.shape[1] // 3
    lengths = slots["length"][rows]
    keys[rows, lengths] = qkv[:, hidden : 2 * hidden]
    values[rows, lengths] = qkv[:, 2 * hidden :]
    ancestors[rows, lengths] = rows
    # Rows with pasts of one length go together; a stacked product treats each of them by itself.
    for length in np.unique(lengths).tolist():
        here = np.flatnonzero(lengths == length)
        lanes, steps = ancestors[rows[here], : length + 1], np.arange(length + 1)
        q, k, v = qkv[here, None, :hidden], keys[lanes, steps], values[lanes, steps]
        out[here] = _rows(_attend(_by_head(q, heads), _by_head(k, heads), _by_head(v, heads)))[:, 0]


def cross_attention(
    query: Array, rows: Array, slots: Array, keys: Array, values: Array, heads: int, out: Array
) -> None:
    """Each row attends to the first memory_length entries of its sequence's memory lane.

    query, out: [rows, hidden]; keys, values: [slots, source tokens, hidden]. Rows of nobody's lane give zeros.
    """
    records = slots[rows]
    out[records["width"] == 0] = 0
    leads = np.flatnonzero((records["beam"] == 0) & (records["width"] > 0))
    shapes = records[["width", "memory_length"]][leads]
    # Sequences of one shape go together; a stacked product treats each of them by itself.
    for width, length in set(shapes.tolist()):
        here = leads[(shapes["width"] == width) & (shapes["memory_length"] == length)]
        lanes, beams = records["memory"][here], here[:, None] + np.arange(width)
        context = _attend(
            _by_head(query[beams], heads),
            _by_head(keys[lanes, :length], heads),
            _by_head(values[lanes, :length], heads),
        )
        out[beams] = _rows(context)


def store(key_values: Array, lanes: Array, steps: Array, keys: Array, values: Array) -> None:
    """keys[l, lanes[r], steps[r]], values[...] = the two halves of part l of key_values[r], for every layer l.

    key_values: [rows, layers * 2 * hidden]; lanes, steps: int32 [rows]; keys, values: [layers, slots, steps, hidden].
    """
    layers, hidden = len(keys), keys.shape[-1]
    for layer in range(layers):
        first = layer * 2 * hidden
        keys[layer, lanes, steps] = key_values[:, first : first + hidden]
        values[layer, lanes, steps] = key_values[:, first + hidden : first + 2 * hidden]


_QUERIES = 256  # queries whose scores are held at the same time


def _by_head(x: Array, heads: int) -> Array:
    """[..., rows, hidden] as [..., heads, rows, d]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(-2, -3)


def _rows(x: Array) -> Array:
    """[..., heads, rows, d] as [..., rows, hidden]."""
    heads, rows, size = x.shape[-3:]
    return x.swapaxes(-2, -3).reshape(*x.shape[:-3], rows, heads * size)


def _attend(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """softmax(q . k^T / sqrt(d)) . v over [..., queries, d] and [..., steps, d]; True in mask: not seen."""
    scores = np.matmul(q, k.swapaxes(-1, -2))
    scores *= FLOAT.type(1 / np.sqrt(q.shape[-1]))
    if mask is not None:
        scores[..., mask] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.matmul(scores, v)


# The vocabulary ------------------------------------------------------------------------------------------------------


def vocabulary_logits(
    x: Array, norm: Norm | None, output: Linear, epsilon: float, scale: float, normed: Array, logits: Array
) -> None:
    """logits = scale * (layer_norm(x) . W) + b; of x itself where norm is None, here and below.
    x, normed: [rows, hidden]; logits: [rows, vocabulary]."""
    weight, offsets = _normalise(x, norm, output, epsilon, normed)

    def finish(part: Array, columns: slice) -> None:
        _add_bias(part, offsets, columns)
        if scale != 1:
            part *= FLOAT.type(scale)
        _add_bias(part, output.bias, columns)

    product(normed, weight, logits, finish)


def vocabulary_search(
    x: Array, norm: Norm | None, output: Linear, epsilon: float, scale: float, normed: Array, logits: Array,
    banned: int, ids: Array, log_probabilities: Array, rows: Array, slots: Array, ancestors: Array, history: Array,
    details: Array,
) -> None:  # fmt: skip
    """One step of beam search from the last hidden states: vocabulary_logits, top, beam_step.

    normed, logits, ids and log_probabilities are work space, which a device may leave unwritten.
    """
    vocabulary_logits(x, norm, output, epsilon, scale, normed, logits)
    top(logits, banned, ids, log_probabilities)
    beam_step(rows, slots, ancestors, history, details, ids, log_probabilities)


def vocabulary_standard_search(
    x: Array, norm: Norm | None, output: Linear, epsilon: float, scale: float, normed: Array, logits: Array,
    banned: int, ids: Array, log_probabilities: Array, rows: Array, slots: Array, ancestors: Array, history: Array,
    details: Array, pool: Array, pool_details: Array,
) -> None:  # fmt: skip
    """One step of the standard search from the last hidden states: vocabulary_logits, top, standard_step.

    normed, logits, ids and log_probabilities are work space, which a device may leave unwritten.
    """
    vocabulary_logits(x, norm, output, epsilon, scale, normed, logits)
    top(logits, banned, ids, log_probabilities)
    standard_step(rows, slots, ancestors, history, details, pool, pool_details, ids, log_probabilities)


def vocabulary_scores(
    x: Array, norm: Norm | None, output: Linear, epsilon: float, scale: float, normed: Array, logits: Array,
    targets: Array, out: Array,
) -> None:  # fmt: skip
    """out[r] = log softmax(logits[r])[targets[r]], logits as of vocabulary_logits: work space, like normed, for so many
    rows at a time as it has.

    targets: int32 [rows]; out: [rows].
    """
    for start in range(0, len(x), len(logits)):
        rows = slice(start, start + len(logits))
        own = logits[: len(x[rows])]
        vocabulary_logits(x[rows], norm, output, epsilon, scale, normed[rows], own)
        target_log_probabilities(own, targets[rows], out[rows])
