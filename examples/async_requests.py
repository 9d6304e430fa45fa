"""Ten requests at once with tritonclient alone: a [2, 8] INT32 matrix each, both outputs read.

python examples/async_requests.py --host localhost --port 8001
"""

from __future__ import annotations

import argparse
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

REQUESTS, ROWS, LENGTH = 10, 2, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8001, help="gRPC port (default: %(default)s)")
    parser.add_argument("--model", default="transformer")
    parser.add_argument("--vocabulary", type=int, default=20, help="ids are drawn from 4 up to this, without it")
    arguments = parser.parse_args()

    random = np.random.default_rng(0)
    arrived: queue.Queue[tuple[int, Any, Exception | None]] = queue.Queue()
    with triton.InferenceServerClient(f"{arguments.host}:{arguments.port}") as client:
        for number in range(REQUESTS):
            ids = random.integers(4, arguments.vocabulary, (ROWS, LENGTH), dtype=np.int32)
            source = triton.InferInput("source_ids", ids.shape, "INT32")
            source.set_data_from_numpy(ids)
            outputs = [triton.InferRequestedOutput(name) for name in ("target_ids", "target_scores")]

            def answered(result: Any, error: Exception | None, number: int = number) -> None:
                arrived.put((number, result, error))  # on a thread of gRPC's: hand over, no more

            client.async_infer(arguments.model, [source], answered, outputs=outputs, client_timeout=60)
        failures = 0
        for _ in range(REQUESTS):
            number, result, error = arrived.get()
            if error is not None:
                failures += 1
                print(f"request {number}: {error}", file=sys.stderr)
                continue
            ids, scores = result.as_numpy("target_ids"), result.as_numpy("target_scores")
            print(f"request {number}: target_ids {list(ids.shape)} target_scores {list(scores.shape)}")
            for row in range(ROWS):
                print(f"  row {row}: {scores[row, 0]:.4f}  {' '.join(map(str, ids[row, 0]))}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
