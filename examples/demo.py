"""What `make demo` shows: a translator and a language model, asked over gRPC and HTTP."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightseq_client import Client, Words

MODELS = Path(__file__).parents[1] / "model_repository"
FRENCH = [
    "quatre-vingt-dix-sept",
    "mille neuf cent quatre-vingt-quatre",
    "deux cent mille un",
    "sept cent soixante-dix-sept mille cinq cent quatre-vingt-un",
]
COUNTING = "twelve , thirteen , fourteen ,"
SEED = 5
RIGHT = "twenty-one , twenty-two , twenty-three"
WRONG = "twenty-one , forty , twenty-three"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grpc", required=True, metavar="HOST:PORT")
    parser.add_argument("--http", required=True, metavar="HOST:PORT")
    addresses = parser.parse_args()
    with Client(addresses.grpc, "grpc") as grpc, Client(addresses.http, "http") as http:
        for client in (grpc, http):
            translate(client)
        hypotheses(grpc)
        generate(http)
        score(grpc)


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


def score(client: Client) -> None:
    print("\nMean negative log-likelihood by GPT, a right sequence and a wrong one:")
    codec = Words.for_generation(MODELS / "gpt")
    for text, loss in zip([RIGHT, WRONG], client.score([RIGHT, WRONG], codec=codec), strict=True):
        print(f"  {loss:7.4f}  {text}")


if __name__ == "__main__":
    main()
