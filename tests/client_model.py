"""The model that test_client.py serves: LightSeq's tensors around a rule that a test can work out in its head.

Copied into a model repository as <model>/1/model.py. A row is stripped of padding (0) and end (2), reversed
and ended; hypothesis k lacks its first k ids. Some ids make it misbehave. Replies come from threads, as
the real models' do, so that a slow row does not hold up the others.
"""

import json
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from lightseq_backend.serving.tensors import to_numpy, to_tensor

PADDING, END = 0, 2
BUSY_ONCE, BUSY, SLOW, REFUSED, TELLS_OPTIONS = 901, 902, 903, 904, 905
SLOW_SECONDS = 0.4


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.input = config["input"][0]["name"]
        self.outputs = [output["name"] for output in config["output"]]
        self.ids_type = np.int64 if config["output"][0]["data_type"] == "TYPE_INT64" else np.int32
        self.seen = set()

    def execute(self, requests):
        for request in requests:
            ids = to_numpy(pb_utils.get_input_tensor_by_name(request, self.input)).copy()
            sender, options = request.get_response_sender(), json.loads(request.parameters() or "{}")
            threading.Thread(target=self.reply, args=(ids, options, sender)).start()

    def reply(self, ids, options, sender):
        if SLOW in ids:
            time.sleep(SLOW_SECONDS)
        error = self.error(ids, options)
        if error is not None:
            response = pb_utils.InferenceResponse(error=error)
        else:
            response = pb_utils.InferenceResponse([to_tensor(*pair) for pair in self.answer(ids, options)])
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def error(self, ids, options):
        codes = pb_utils.TritonError
        row = tuple(ids[0])
        if BUSY in ids or (BUSY_ONCE in ids and row not in self.seen):
            self.seen.add(row)
            return pb_utils.TritonError("the queue is full", codes.UNAVAILABLE)
        if REFUSED in ids:
            return pb_utils.TritonError(f"id {REFUSED} is beyond the vocabulary", codes.INVALID_ARG)
        if TELLS_OPTIONS in ids:
            return pb_utils.TritonError(json.dumps(options, sort_keys=True), codes.INVALID_ARG)
        return None

    def answer(self, ids, options):
        rows = [[id_ for id_ in row if id_ not in (PADDING, END)] for row in ids.tolist()]
        if self.outputs == ["loss"]:
            return [("loss", np.array([[sum(row) / 10] for row in rows], np.float32))]
        count = options.get("num_hypotheses", options.get("beam_size", 2))
        if "result" in self.outputs:
            texts = [[row + [*row[::-1], END][k:] for k in range(options.get("num_hypotheses", 1))] for row in rows]
        else:
            texts = [[[*row[::-1], END][k:] for k in range(count)] for row in rows]
        width = max(len(text) for beams in texts for text in beams)
        array = np.array([[text + [END] * (width - len(text)) for text in beams] for beams in texts], self.ids_type)
        scores = np.array([[-0.5 * (k + 1) for k in range(count)] for _ in rows], np.float32)
        if len(self.outputs) == 2:
            return [(self.outputs[0], array), (self.outputs[1], scores)]
        return [(self.outputs[0], array if "num_hypotheses" in options and array.shape[1] > 1 else array[:, 0])]
