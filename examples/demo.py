"""What `make demo` shows: a translator and a language model, asked over gRPC and HTTP."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tokenizers import Tokenizer

from lightseq_backend.text.marian import Marian
from lightseq_client import GENERATE, Client, Words

MODELS = Path(__file__).parents[1] / "model_repository"
FRENCH = [
    "quatre-vingt-dix-sept",
    "mille neuf cent quatre-vingt-quatre",
    "deux cent mille un",
    "sept cent soixante-dix-sept mille cinq cent quatre-vingt-un",
]
COUNTING = "twelve , thirteen , fourteen ,"
INTERFACE = [
    "Échec de la création du pool de stockage",
    "Impossible d'ouvrir « %s » : le fichier n'existe pas.",
    "Afficher la liste des fenêtres ouvertes",
    "Voulez-vous vraiment supprimer ce calque ?",
    "Cet utilitaire affiche l'état de la batterie de votre ordinateur portable.",
]
SEED = 5
RIGHT = "twenty-one , twenty-two , twenty-three"
WRONG = "twenty-one , forty , twenty-three"
ENGLISH = ["To mount the file system when the machine starts,", "If the connection is closed by the server,"]
SENTENCE = "The file system is mounted when the elephant starts."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grpc", required=True, metavar="HOST:PORT")
    parser.add_argument("--http", required=True, metavar="HOST:PORT")
    addresses = parser.parse_args()
    with Client(addresses.grpc, "grpc") as grpc, Client(addresses.http, "http") as http:
        translate_interface(grpc)
        continue_english(grpc)
        surprise(addresses.grpc)
        for client in (grpc, http):
            translate(client)
        hypotheses(grpc)
        generate(http)
        stream(grpc)
        score(grpc)


def translate_interface(client: Client) -> None:
    """Sentences of real programs: the four beams of each, which the server's own tokenizer could read as well."""
    print("\nFrom French program interfaces (model fr2en, 4 beams with their scores):")
    codec = Marian(MODELS / "fr2en")
    for answer in client.translate(INTERFACE, model="fr2en", codec=codec, beam_size=4, num_hypotheses=4):
        print(f"  {answer.given}")
        for one in answer.hypotheses:
            print(f"   {one.score:8.4f}  {one.text}")


def continue_english(client: Client) -> None:
    print("\nEnglish prose of manuals continued (gpt_en: greedy, beam search, two samples with their seeds):")
    methods: list[dict[str, Any]] = [
        {"sampling_method": "greedy", "no_repeat_ngram_size": 3, "stop": "\n"},
        {"sampling_method": "standard_beam", "beam_size": 4, "no_repeat_ngram_size": 3},
        {"seed": SEED, "stop": "\n"},  # as the model's own settings say: the likeliest nine tenths, few repetitions
        {"seed": SEED + 1, "stop": "\n"},
    ]
    for prompt in ENGLISH:
        print(f"  {prompt}")
        for options in methods:
            (answer,) = client.generate([prompt], model="gpt_en", codec=Pieces(), max_new_tokens=32, **options)
            print(f"    ...{answer.hypotheses[0].text.removeprefix(prompt).splitlines()[0]}")


def surprise(address: str) -> None:
    print("\nBits by which each word of a sentence surprises it (gpt_en_score):")
    pieces = Pieces().tokenizer.encode(SENTENCE)
    ids = triton.InferInput("token_ids", [1, len(pieces.ids)], "INT32")
    ids.set_data_from_numpy(np.array([pieces.ids], np.int32))
    with triton.InferenceServerClient(address) as client:
        found = client.infer("gpt_en_score", [ids]).as_numpy("token_log_probabilities")[0]
    bits: dict[int, float] = {}
    for word, log_probability in zip(pieces.word_ids[1:], found):  # the first token is <|endoftext|>, and given
        bits[word] = bits.get(word, 0.0) - float(log_probability) / math.log(2)
    for word, surprised in bits.items():
        first, last = pieces.word_to_chars(word)
        print(f"  {surprised:5.1f}  {SENTENCE[first:last].strip():<10} {'#' * round(surprised)}")


class Pieces:
    """The tokenizer of gpt_en, as lightseq_client wants a codec."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(MODELS / "gpt_en" / "tokenizer.json"))
        self.end_id: int | None = self.tokenizer.token_to_id("<|endoftext|>")
        self.padding_id: int | None = None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))


def translate(client: Client) -> None:
    print(f"\nTranslated over {client.protocol} (beam search, 4 beams):")
    for answer in client.translate(FRENCH, codec=Words.for_translation(MODELS / "transformer")):
        print(f"  {answer.given}\n    -> {answer.hypotheses[0].text}")


def hypotheses(client: Client) -> None:
    print("\nThe four beams of one sentence, with their scores (model transformer_generate):")
    codec = Words.for_translation(MODELS / "transformer")
    (answer,) = client.translate(FRENCH[3:], model="transformer_generate", codec=codec, beam_size=4)
    for one in answer.hypotheses:
        print(f"  {one.score:8.4f}  {one.text}")


def generate(client: Client) -> None:
    print("\nContinued by GPT (greedy, then one sample with a seed):")
    codec = Words.for_generation(MODELS / "gpt")
    greedy = {"sampling_method": "greedy"}
    sampled = {"sampling_method": "sample", "temperature": 1.2, "seed": SEED}
    for options in (greedy, sampled):
        (answer,) = client.generate([COUNTING], codec=codec, **options)
        print(f"  {answer.hypotheses[0].text}")


def stream(client: Client) -> None:
    print("\nThe same as a stream: what came, part by part, and when the first part did:")
    codec, parts, arrived = Words.for_generation(MODELS / "gpt"), [], []
    for part in client.stream(GENERATE, COUNTING, codec=codec, sampling_method="greedy"):
        parts += part.texts
        arrived.append(part.seconds)
    print(f"  {'|'.join(text for text in parts if text)}")
    print(f"  first part after {arrived[0] * 1e3:.0f} ms, all after {arrived[-1] * 1e3:.0f} ms")


def score(client: Client) -> None:
    print("\nMean negative log-likelihood by GPT, a right sequence and a wrong one:")
    codec = Words.for_generation(MODELS / "gpt")
    for text, loss in zip([RIGHT, WRONG], client.score([RIGHT, WRONG], codec=codec), strict=True):
        print(f"  {loss:7.4f}  {text}")


if __name__ == "__main__":
    main()
