"""Compile the .proto files into schema.desc: python -m lightseq_backend.weights.compile_schema (needs grpcio-tools)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightseq_backend.weights.schema import COMPILED, FOLDER, SOURCES


def compile_schema() -> bytes:
    """The serialized FileDescriptorSet of the .proto files; RuntimeError when the compiler refuses them."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder, "schema.desc")
        status = protoc.main(["protoc", f"--proto_path={FOLDER}", f"--descriptor_set_out={compiled}", *SOURCES])
        if status:
            raise RuntimeError(f"protoc ended with status {status}")
        return compiled.read_bytes()


if __name__ == "__main__":
    COMPILED.write_bytes(compile_schema())
