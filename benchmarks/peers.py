"""The engines that are compared, each built from the same transformer.pb; each runs in a process of its own.

    translate(sources, tokens, beams)  int [sentences, beams, tokens]: every hypothesis, best first
    sizes()                            bytes: what is known of weights and work space

Ours and HuggingFace also have probe(sources): the encoder's output, [sentences, tokens, hidden], and the first step's
log-probabilities, [sentences, vocabulary].
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.transformer_base import CONFIG, END, LENGTH_PENALTY, PADDING, START, parameters
from lightseq_backend import ops, weights
from lightseq_backend.config import EngineConfig, TransformerConfig
from lightseq_backend.engine import Engine
from lightseq_backend.engine.buffers import allocate
from lightseq_backend.models.pack import Pack
from lightseq_backend.models.transformer import Transformer

THREADS = 2


class Peer(Protocol):
    def translate(self, sources: np.ndarray, tokens: int, beams: int) -> np.ndarray: ...
    def sizes(self) -> dict[str, int]: ...


class Ours:
    def __init__(self, path: Path, beams: int, sentences: int):
        _, arrays = weights.load(path)
        self._weights = parameters(arrays)
        self._ops = ops.load("cpu")
        self._settings = EngineConfig(slots=sentences * beams, max_beam_size=beams, prompt_tokens=512)
        self._model = Transformer(CONFIG, arrays, self._ops)
        self._engine = Engine(self._model, self._settings, self._ops)

    def translate(self, sources: np.ndarray, tokens: int, beams: int) -> np.ndarray:
        outputs = self._engine.answer(sources.tolist(), changes={"max_new_tokens": tokens, "beam_size": beams})
        return np.stack([[hypothesis.tokens for hypothesis in output.hypotheses] for output in outputs])

    def sizes(self) -> dict[str, int]:
        return {"weights": self._weights, "arena": self._engine.memory}

    def probe(self, sources: np.ndarray) -> dict[str, np.ndarray]:
        sentences, length = sources.shape
        ops, model = self._ops, self._model
        buffers = allocate(model, self._settings, self._settings.max_beam_size, ops)
        pack = Pack.of(np.zeros(Pack.elements(sources.size), np.int32), sources.size)
        pack.tokens[:] = sources.ravel()
        pack.lanes[:], pack.positions[:] = (grid.ravel() for grid in np.indices(sources.shape))
        pack.steps[:] = pack.positions
        pack.starts[:] = np.minimum(np.arange(sources.size + 1) * length, sources.size)
        encoder = buffers.work.first(sources.size)
        model.prefill(pack, encoder, buffers.cache)
        encoded = encoder.normed.copy()

        rows, slots, head = np.arange(sentences, dtype=np.int32), buffers.state.slots, model.head
        slots["method"][:sentences], slots["width"][:sentences] = 1, 1
        slots["token"][:sentences], slots["memory_length"][:sentences] = START, length
        slots["memory"][:sentences] = rows
        work, logits = buffers.work.first(sentences), buffers.state.logits[:sentences]
        model.step(rows, slots, work, buffers.cache)
        ops.vocabulary_logits(work.x, head.norm, head.output, head.epsilon, head.scale, work.normed, logits)
        return {"encoder": encoded.reshape(sentences, length, -1), "first_step": _log_softmax(logits)}


class HuggingFace:
    """M2M100ForConditionalGeneration: pre-norm, a final norm on both sides, sinusoidal positions from row 2 on.

    Replaced in it: the position table by ours, the norms' epsilon by 1e-12, and the output projection gets the bias.
    """

    def __init__(self, path: Path, beams: int, sentences: int):
        import torch
        from transformers import M2M100ForConditionalGeneration

        torch.set_num_threads(THREADS)
        self._torch = torch
        _, arrays = weights.load(path)
        self._weights = parameters(arrays)
        config = m2m100_config(CONFIG)
        with torch.device("meta"):
            model = M2M100ForConditionalGeneration(config)
        model.to_empty(device="cpu")
        state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in _huggingface(arrays).items()}
        missing = set(model.state_dict()) ^ set(state)
        if missing:
            raise ValueError(f"this release of transformers names other weights: {sorted(missing)}")
        model.load_state_dict(state, strict=True)
        model.tie_weights()
        model.lm_head.bias = torch.nn.Parameter(torch.from_numpy(arrays["output.bias"].copy()))
        for side, name in ((model.model.encoder, "source"), (model.model.decoder, "target")):
            table = np.concatenate([np.zeros((2, CONFIG.hidden), np.float32), arrays[f"{name}.positions"]])
            side.embed_positions.weights = torch.from_numpy(table)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = CONFIG.dialect.norm_epsilon
        self._model = model.eval()

    def translate(self, sources: np.ndarray, tokens: int, beams: int) -> np.ndarray:
        torch = self._torch
        ids = torch.from_numpy(sources)
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_beams=beams,
                num_return_sequences=beams,
                max_new_tokens=tokens,
                do_sample=False,
                **({"length_penalty": LENGTH_PENALTY} if beams > 1 else {}),
            )
        return np.asarray(out[:, 1:].numpy().reshape(len(sources), beams, tokens))

    def sizes(self) -> dict[str, int]:
        return {"weights": self._weights}

    def probe(self, sources: np.ndarray) -> dict[str, np.ndarray]:
        torch = self._torch
        ids = torch.from_numpy(sources)
        with torch.inference_mode():
            start = torch.full((len(sources), 1), START)
            out = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=start)
        return {"encoder": out.encoder_last_hidden_state.numpy(), "first_step": _log_softmax(out.logits[:, 0].numpy())}


class CTranslate2:
    """Its TransformerSpec filled from the file, float32, one translator of two threads."""

    def __init__(self, path: Path, beams: int, sentences: int):
        import ctranslate2

        _, arrays = weights.load(path)
        self._weights = parameters(arrays)
        names = [str(i) for i in range(CONFIG.target_vocabulary)]
        spec = _ctranslate2(arrays)
        spec.register_source_vocabulary(names)
        spec.register_target_vocabulary(names)
        spec.config.add_source_bos = spec.config.add_source_eos = False
        spec.config.decoder_start_token = spec.config.bos_token = names[START]
        spec.config.eos_token, spec.config.unk_token = names[END], names[PADDING]
        spec.config.layer_norm_epsilon = CONFIG.dialect.norm_epsilon
        spec.validate()
        spec.optimize(quantization=None)
        with tempfile.TemporaryDirectory() as folder:
            spec.save(folder)
            self._translator = ctranslate2.Translator(
                folder, device="cpu", compute_type="float32", inter_threads=1, intra_threads=THREADS
            )

    def translate(self, sources: np.ndarray, tokens: int, beams: int) -> np.ndarray:
        results = self._translator.translate_batch(
            [[str(token) for token in row] for row in sources],
            beam_size=beams,
            num_hypotheses=beams,
            length_penalty=LENGTH_PENALTY,
            min_decoding_length=tokens,
            max_decoding_length=tokens,
        )
        return np.array([[[int(token) for token in one] for one in result.hypotheses] for result in results])

    def sizes(self) -> dict[str, int]:
        return {"weights": self._weights}


class Gemms:
    """Only the products of decode steps, in NumPy with the BLAS's own threads: nothing in between, no result."""

    def __init__(self, path: Path, beams: int, sentences: int):
        from threadpoolctl import threadpool_limits

        _, arrays = weights.load(path)
        decoder = (f"decoder.{i}." for i in range(CONFIG.decoder_layers))
        parts = ("self_qkv", "self_output", "cross_query", "cross_output", "ffn_inner", "ffn_output")
        self._matrices = [arrays[f"{layer}{part}.weight"] for layer in decoder for part in parts]
        self._matrices.append(arrays["output.weight"])
        rows = sentences * beams
        self._inputs = {width: np.ones((rows, width), np.float32) for width in (CONFIG.hidden, CONFIG.inner)}
        self._outputs = [np.empty((rows, matrix.shape[1]), np.float32) for matrix in self._matrices]
        self._limit = threadpool_limits(THREADS, user_api="blas")

    def translate(self, sources: np.ndarray, tokens: int, beams: int) -> np.ndarray:
        for _ in range(tokens):
            for matrix, out in zip(self._matrices, self._outputs, strict=True):
                np.matmul(self._inputs[len(matrix)], matrix, out=out)
        return np.zeros((len(sources), beams, tokens), np.int64)

    def sizes(self) -> dict[str, int]:
        return {"weights": sum(matrix.nbytes for matrix in self._matrices)}


PEERS: dict[str, Any] = {
    "this engine": Ours,
    "Hugging Face": HuggingFace,
    "CTranslate2": CTranslate2,
    "GEMMs alone": Gemms,
}


def m2m100_config(config: TransformerConfig) -> Any:
    """The same network as Hugging Face's M2M100; both sides share one embedding there."""
    from transformers import M2M100Config

    return M2M100Config(bos_token_id=config.start_id, **huggingface_settings(config))


def huggingface_settings(config: TransformerConfig) -> dict[str, Any]:
    """What the settings of all its encoder-decoder models have in common."""
    return {
        "vocab_size": config.target_vocabulary,
        "d_model": config.hidden,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.inner,
        "decoder_ffn_dim": config.inner,
        "max_position_embeddings": config.max_positions,
        "activation_function": config.activation,
        "scale_embedding": True,
        "pad_token_id": config.padding_id,
        "eos_token_id": config.end_id,
        "decoder_start_token_id": config.start_id,
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


# Our file's arrays under other names -------------------------------------------------------------------------------


def _huggingface(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tokens = arrays["source.tokens"] / np.float32(np.sqrt(CONFIG.hidden))
    state = dict.fromkeys(("model.shared.weight", "lm_head.weight"), tokens)
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_tokens.weight"] = tokens
        state |= _norm(f"model.{side}.layer_norm", arrays, f"{side}.norm")
    return state | huggingface_layers(CONFIG, arrays)


def huggingface_layers(config: TransformerConfig, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Both stacks as Hugging Face names them; each LayerNorm goes to the sublayer whose name it has here."""
    state: dict[str, np.ndarray] = {}
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for i in range(layers):
            ours, theirs = f"{side}.{i}.", f"model.{side}.layers.{i}."
            own = "attention" if side == "encoder" else "self"
            state |= _norm(f"{theirs}self_attn_layer_norm", arrays, f"{ours}{own}_norm")
            state |= _linears(theirs + "self_attn.", ("q_proj", "k_proj", "v_proj"), arrays, f"{ours}{own}_qkv")
            state |= _linears(theirs, ("self_attn.out_proj",), arrays, f"{ours}{own}_output")
            if side == "decoder":
                state |= _norm(f"{theirs}encoder_attn_layer_norm", arrays, f"{ours}cross_norm")
                state |= _linears(theirs, ("encoder_attn.q_proj",), arrays, f"{ours}cross_query")
                state |= _linears(theirs + "encoder_attn.", ("k_proj", "v_proj"), arrays, f"{ours}cross_kv")
                state |= _linears(theirs, ("encoder_attn.out_proj",), arrays, f"{ours}cross_output")
            state |= _norm(f"{theirs}final_layer_norm", arrays, f"{ours}ffn_norm")
            state |= _linears(theirs, ("fc1",), arrays, f"{ours}ffn_inner")
            state |= _linears(theirs, ("fc2",), arrays, f"{ours}ffn_output")
    return state


def _norm(theirs: str, arrays: dict[str, np.ndarray], ours: str) -> dict[str, np.ndarray]:
    return {f"{theirs}.weight": arrays[f"{ours}.gain"], f"{theirs}.bias": arrays[f"{ours}.bias"]}


def _linears(prefix: str, names: tuple[str, ...], arrays: dict[str, np.ndarray], ours: str) -> dict[str, np.ndarray]:
    """One of our linears as several of theirs, [out, in]."""
    kernels = np.split(arrays[f"{ours}.weight"].T, len(names))
    biases = np.split(arrays[f"{ours}.bias"], len(names))
    state = {f"{prefix}{name}.weight": kernel for name, kernel in zip(names, kernels, strict=True)}
    return state | {f"{prefix}{name}.bias": bias for name, bias in zip(names, biases, strict=True)}


def _ctranslate2(arrays: dict[str, np.ndarray]) -> Any:
    from ctranslate2.specs import Activation, TransformerSpec

    spec = TransformerSpec.from_config(
        (CONFIG.encoder_layers, CONFIG.decoder_layers), CONFIG.heads, pre_norm=True, activation=Activation.RELU
    )

    def norm(target: Any, ours: str) -> None:
        target.gamma, target.beta = arrays[f"{ours}.gain"], arrays[f"{ours}.bias"]

    def linear(target: Any, ours: str) -> None:
        target.weight = np.ascontiguousarray(arrays[f"{ours}.weight"].T)
        target.bias = np.ascontiguousarray(arrays[f"{ours}.bias"])

    def feed_forward(target: Any, ours: str) -> None:
        norm(target.layer_norm, f"{ours}.ffn_norm")
        linear(target.linear_0, f"{ours}.ffn_inner")
        linear(target.linear_1, f"{ours}.ffn_output")

    tokens = arrays["source.tokens"] / np.float32(np.sqrt(CONFIG.hidden))
    for side, name in ((spec.encoder, "source"), (spec.decoder, "target")):
        embeddings = side.embeddings[0] if name == "source" else side.embeddings
        embeddings.weight, side.scale_embeddings = tokens, True
        side.position_encodings.encodings = arrays[f"{name}.positions"]
    norm(spec.encoder.layer_norm, "encoder.norm")
    norm(spec.decoder.layer_norm, "decoder.norm")
    spec.decoder.projection.weight, spec.decoder.projection.bias = tokens, arrays["output.bias"]
    for i, layer in enumerate(spec.encoder.layer):
        norm(layer.self_attention.layer_norm, f"encoder.{i}.attention_norm")
        linear(layer.self_attention.linear[0], f"encoder.{i}.attention_qkv")
        linear(layer.self_attention.linear[1], f"encoder.{i}.attention_output")
        feed_forward(layer.ffn, f"encoder.{i}")
    for i, layer in enumerate(spec.decoder.layer):
        norm(layer.self_attention.layer_norm, f"decoder.{i}.self_norm")
        linear(layer.self_attention.linear[0], f"decoder.{i}.self_qkv")
        linear(layer.self_attention.linear[1], f"decoder.{i}.self_output")
        norm(layer.attention.layer_norm, f"decoder.{i}.cross_norm")
        for at, part in enumerate(("cross_query", "cross_kv", "cross_output")):
            linear(layer.attention.linear[at], f"decoder.{i}.{part}")
        feed_forward(layer.ffn, f"decoder.{i}")
    return spec
