"""python any_runtime.py WHEEL BUNDLE CASES.npz: answers in another ONNX Runtime, whose files lie in WHEEL; prints JSON.

By NumPy and that runtime alone, as a host of few lines: test_runtimes.py calls it.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])  # before any other

import numpy as np
import onnxruntime as ort

OPTIONS = ort.SessionOptions()
OPTIONS.log_severity_level = 4
OPTIONS.intra_op_num_threads = 1


def main(folder, cases):
    prefill, decode, sample, preprocess = (
        ort.InferenceSession(str(Path(folder) / f"{name}.onnx"), OPTIONS, providers=["CPUExecutionProvider"])
        for name in ("prefill", "decode", "sample", "preprocess")
    )
    side = prefill.get_inputs()[0].shape[2]
    noise = np.random.default_rng(0).integers(0, 256, (2 * side, side, 3), np.uint8)
    assert preprocess.run(None, {"image": noise})[0].shape == (1, 3, side, side)
    chance = {
        "temperature": np.zeros((), np.float32), "top_p": np.ones((), np.float32), "top_k": np.zeros((), np.int64),
        "uniform": np.zeros(1, np.float32),
    }  # fmt: skip
    past = [value.name for value in decode.get_inputs() if value.name.startswith("past_key_values.")]
    answers = []
    for pixel_values, ids, length in zip(cases["pixel_values"], cases["input_ids"], cases["lengths"], strict=True):
        lengths = np.array([length], np.int32)
        feeds = {"pixel_values": pixel_values[None], "input_ids": ids[None, :length], "lengths": lengths}
        logits, *cache = prefill.run(None, {**feeds, "capacity": np.array(length + cases["steps"], np.int64)})
        answers.append([])
        for _ in range(cases["steps"]):
            token = sample.run(["token"], {"logits": logits, **chance})[0]
            answers[-1].append(int(token[0]))
            feeds = {"input_ids": token[:, None], "lengths": lengths, **dict(zip(past, cache, strict=True))}
            logits, *cache = decode.run(None, feeds)
            lengths = lengths + 1
    return {"version": ort.__version__, "answers": answers}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[2], np.load(sys.argv[3]))))
