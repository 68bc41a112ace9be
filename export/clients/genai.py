"""python genai.py FOLDER < CASES > ANSWERS: onnxruntime-genai on a folder that `export-onnx --layout genai` wrote.

By that library alone, with Pillow and NumPy for pictures, as a program of somebody else's would. One JSON object goes
in, {"image_tokens": P, "cases": [...]}, and one comes out. A case is {"picture": path, "prompt": text}, or for models
without a tokenizer {"pixels": [...], "size": [height, width], "ids": [...], "count": n}.
"""

import json
import sys
import time

import numpy as np
import onnxruntime_genai as og
from PIL import Image


def main(folder, cases, image_tokens, tokens=64, threads=0):
    settings = og.Config(folder)
    if threads:
        settings.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(settings)
    tokenizer = og.Tokenizer(model) if any("prompt" in case for case in cases) else None
    found = [answer(model, tokenizer, case, image_tokens, tokens) for case in cases]
    return {"version": og.__version__, "answers": found}


def answer(model, tokenizer, case, image_tokens, tokens):
    """The greedy answer to a case: ids, the one that ends it among them, and text where there is a tokenizer."""
    if "prompt" in case:
        started = time.perf_counter()
        ids = tokenizer.encode("<image>" * image_tokens + f"<bos>{case['prompt']}\n")
        picture = np.asarray(Image.open(case["picture"]).convert("RGB"), np.float32).transpose(2, 0, 1)
    else:
        started, ids, tokens = time.perf_counter(), case["ids"], case["count"]
        picture = np.reshape(np.array(case["pixels"], np.float32), (3, *case["size"]))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + tokens, do_sample=False)
    generator, inputs = og.Generator(model, params), og.NamedTensors()
    inputs["input_ids"] = np.array([ids], np.int32)
    inputs["pixel_values"] = np.ascontiguousarray(picture[None])  # of any size, 0 … 255: the graph resizes
    inputs["num_image_tokens"] = np.array([image_tokens], np.int64)
    times = [started]
    generator.set_inputs(inputs)
    new = []
    while not generator.is_done():
        generator.generate_next_token()
        new.append(int(generator.get_next_tokens()[0]))
        times.append(time.perf_counter())
    first, *steps = np.diff(times).tolist()
    found = {
        "tokens": new,
        "prompt": [int(id) for id in ids],
        "first_s": first,
        "step_s": float(np.mean(steps)) if steps else None,
    }
    return {**found, "text": tokenizer.decode(new)} if tokenizer else found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], **json.load(sys.stdin))))
