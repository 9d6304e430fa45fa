"""Client for LightSeq models served by Triton: a library (`Client`) and the command `lightseq-client`."""

from lightseq_client.answers import Answer, Failure, Hypothesis
from lightseq_client.client import Client, Health, ModelState
from lightseq_client.errors import (
    ClientError,
    ModelError,
    RequestFailed,
    RequestTimeout,
    RowError,
    ServerUnreachable,
    VocabularyError,
)
from lightseq_client.signature import GENERATE, SCORE, TRANSLATE
from lightseq_client.stream import Part
from lightseq_client.vocabulary import Ids, ServerText, Vocabulary, Words

__all__ = [
    "GENERATE",
    "SCORE",
    "TRANSLATE",
    "Answer",
    "Client",
    "ClientError",
    "Failure",
    "Health",
    "Hypothesis",
    "Ids",
    "ModelError",
    "ModelState",
    "Part",
    "RequestFailed",
    "RequestTimeout",
    "RowError",
    "ServerText",
    "ServerUnreachable",
    "Vocabulary",
    "VocabularyError",
    "Words",
]
