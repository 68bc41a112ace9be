"""python -m export.clients.genai FOLDER < CASES: onnxruntime-genai on a folder of export-onnx --layout genai.

By that library, with Pillow and NumPy for pictures, as a program of somebody else's would run it. One JSON object goes
in, {"image_tokens": P, "cases": [...]}, and one comes out. A case is {"picture": path, "prompt": text}, or for models
without a tokenizer {"pixels": [...], "size": [height, width], "ids": [...], "count": n}.
"""

import importlib
import importlib.util
import json
import sys
import time
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from numpy_ref import cli
from numpy_ref.errors import PaliGemmaError

PROG = "python -m export.clients.genai"


def answers(folder: str, cases: list[dict], image_tokens: int, tokens: int = 64, threads: int = 0) -> list[dict]:
    """Greedy answers to cases: ids, the one that ends it among them, text where there is a tokenizer, and seconds."""
    library = importlib.import_module("onnxruntime_genai")
    settings = library.Config(folder)
    if threads:
        settings.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = library.Model(settings)
    tokenizer = library.Tokenizer(model) if any("prompt" in case for case in cases) else None
    return [answer(library, model, tokenizer, case, image_tokens, tokens) for case in cases]


def answer(library: ModuleType, model: Any, tokenizer: Any, case: dict, image_tokens: int, tokens: int) -> dict:
    """The answer to a case."""
    times = [time.perf_counter()]
    if "prompt" in case:
        ids = tokenizer.encode("<image>" * image_tokens + f"<bos>{case['prompt']}\n")
        picture = np.asarray(Image.open(case["picture"]).convert("RGB"), np.float32).transpose(2, 0, 1)
    else:
        ids, tokens = case["ids"], case["count"]
        picture = np.reshape(np.array(case["pixels"], np.float32), (3, *case["size"]))
    settings = library.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + tokens, do_sample=False)
    generator, inputs = library.Generator(model, settings), library.NamedTensors()
    inputs["input_ids"] = np.array([ids], np.int32)
    inputs["pixel_values"] = np.ascontiguousarray(picture[None])  # of any size, 0 … 255: the graph resizes
    inputs["num_image_tokens"] = np.array([image_tokens], np.int64)
    generator.set_inputs(inputs)
    new: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        new.append(int(generator.get_next_tokens()[0]))
        times.append(time.perf_counter())
    first, *steps = np.diff(times).tolist()
    timings = {"first_s": first, "step_s": float(np.mean(steps)) if steps else None}
    text = {"text": tokenizer.decode(new)} if tokenizer else {}
    return {"tokens": new, "prompt": [int(each) for each in ids], **timings, **text}


def main(argv=None):
    options = cli.Parser(prog=PROG, description=__doc__.splitlines()[0])
    options.add_argument("folder", metavar="FOLDER", help="of export-onnx --layout genai")
    arguments = options.parse_args(argv)
    if not importlib.util.find_spec("onnxruntime_genai"):
        raise PaliGemmaError("onnxruntime-genai cannot be imported; export/README.md says how it is installed")
    print(json.dumps({"answers": answers(arguments.folder, **json.load(sys.stdin))}))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
