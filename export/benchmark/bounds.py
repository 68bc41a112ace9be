"""What the machine allows: how fast it multiplies and reads, and what a first token and a further one take at least.

A first token takes the products of its kernels, all of them with as many rows as there are patches or positions, at the
rate that ONNX Runtime's kernel for them reaches; a further one takes the reading of the weights. Attention, norms, soft
caps and what one layer waits for another are what an engine adds.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter, sleep

import numpy as np

from numpy_ref.checkpoint import parameters
from numpy_ref.config import PaliGemmaConfig

READ = 2**30  # bytes that are read to measure the bandwidth
REPEATS = 4  # the best of so many is taken
SPINNING_S = 0.1  # how long threads of a session may spin on


def operations(config: PaliGemmaConfig, positions: int) -> int:
    """Multiplications and additions of the kernels in a prefill of so many positions.

    Of the last block every position needs keys and values alone, and the rest, as the head, a single one.
    """
    rows = {"vision": config.vision.patches, "projector": config.vision.patches, "text": positions}
    last = f"text.blocks.{config.text.depth - 1}."
    total = 0
    for parameter in parameters(config):
        path = parameter.path
        if path.endswith(".kernel"):
            of_one = path.startswith(last) and not path.endswith(("key.kernel", "value.kernel"))
            total += 2 * math.prod(parameter.shape) * (1 if of_one else rows[path.partition(".")[0]])
    return total


def multiplier(config: PaliGemmaConfig, precision: str, positions: int, threads: int) -> Callable[[], float]:
    """A function that measures operations/s of the decoder's up and down kernels, in int8 if a bundle's prefill is."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model, given = _products(config, precision in ("int8", "int4", "int2"), positions)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    count = 4 * positions * config.text.width * config.text.mlp

    def rate():
        sleep(SPINNING_S)
        return max(count / seconds_of(lambda: session.run([], given)) for _ in range(REPEATS))

    return rate


def seconds_of(work: Callable[[], object]) -> float:
    """How long a piece of work takes."""
    started = perf_counter()
    work()
    return perf_counter() - started


def _products(config: PaliGemmaConfig, in_int8: bool, positions: int) -> tuple[bytes, dict[str, np.ndarray]]:
    """A model of two products [positions, in] [in, out], and what goes in; the largest of what comes out."""
    from onnx import TensorProto, helper, numpy_helper

    rng, kind = np.random.default_rng(0), TensorProto.UINT8 if in_int8 else TensorProto.FLOAT
    nodes, constants, inputs, outputs, given = [], [], [], [], {}
    for name, wide, out in (("up", config.text.width, config.text.mlp), ("down", config.text.mlp, config.text.width)):
        x, kernel, y = f"{name}.x", f"{name}.kernel", f"{name}.y"
        if in_int8:
            given[x] = rng.integers(0, 256, (positions, wide), np.uint8)
            weights = {
                kernel: rng.integers(-127, 128, (wide, out), np.int8), f"{name}.step": np.array(1, np.float32),
                f"{name}.scales": np.full(out, 1e-4, np.float32), f"{name}.zero": np.array(128, np.uint8),
            }  # fmt: skip
            operator, domain = "MatMulIntegerToFloat", "com.microsoft"
        else:
            given[x] = rng.standard_normal((positions, wide), np.float32)
            weights = {kernel: rng.standard_normal((wide, out), np.float32)}
            operator, domain = "MatMul", ""
        constants += [numpy_helper.from_array(value, key) for key, value in weights.items()]
        nodes.append(helper.make_node(operator, [x, *weights], [y], domain=domain))
        nodes.append(helper.make_node("ReduceMax", [y], [f"{name}.largest"], keepdims=0))  # so that little comes out
        inputs.append(helper.make_tensor_value_info(x, kind, [positions, wide]))
        outputs.append(helper.make_tensor_value_info(f"{name}.largest", TensorProto.FLOAT, []))
    graph = helper.make_graph(nodes, "products", inputs, outputs, constants)
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString(), given


def reader(threads: int) -> Callable[[], float]:
    """A function that measures the read bandwidth in GB/s, over arrays that no cache holds."""
    arrays = [np.ones(READ // 4 // threads, np.float32) for _ in range(threads)]
    return lambda: read_bandwidth(arrays)


def read_bandwidth(arrays: Sequence[np.ndarray]) -> float:
    """GB/s of dot products side by side over arrays; the best of several."""
    total = sum(array.nbytes for array in arrays) / 1e9
    with ThreadPoolExecutor(len(arrays)) as pool:
        read = partial(pool.map, lambda array: np.dot(array, array), arrays)
        return max(total / seconds_of(lambda: list(read())) for _ in range(REPEATS))


def weight_bytes(bundle: Path, *names: str) -> int:
    """Bytes that the graphs of these names refer to in the weights file, each place once."""
    import onnx

    places = {}
    for name in names:
        for tensor in onnx.load(bundle / f"{name}.onnx", load_external_data=False).graph.initializer:
            entry = {pair.key: pair.value for pair in tensor.external_data}
            if entry:
                places[entry["offset"]] = int(entry["length"])
    return sum(places.values())
