"""LightSeq's message types, as descriptors of protobuf's own runtime.

schema.desc is the .proto files beside it compiled; `python -m lightseq_backend.weights.compile_schema` writes it anew.
A descriptor set and not generated Python, because generated code ties itself to a range of
runtimes, and because LightSeq's files have no package: in protobuf's default pool they would collide with the
transformer_pb2 of an installed LightSeq. The pool here is private.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

SOURCES = ("transformer.proto", "gpt.proto", "quant_transformer.proto", "quant_gpt.proto")
FOLDER = Path(__file__).parent
COMPILED = FOLDER / "schema.desc"


@cache
def message_type(name: str) -> type[message.Message]:
    """The class of one of LightSeq's messages, for example "Transformer"."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(COMPILED.read_bytes()).file:
        pool.Add(file)
    return pool
