"""Stage 2: on which provider each node of the shipped model's bundles runs, and where decode's values live."""

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime

from ..runtime import session_options
from ..session import CPU, CUDA
from . import models
from .stage import LABEL, Found, NotHere, Settings

LIMIT, PART_LIMIT = 120, 30
GRAPHS = ("prefill", "decode", "sample_device")


def parts(settings: Settings) -> list[str]:
    return models.shipped_names()


def run(part: str, settings: Settings, found: Found) -> None:
    bundle = models.shipped(settings, part)
    if models.form(part.split()[0])[0].endswith("bfloat16") and not settings.on_device:
        raise NotHere("the CPU has no bfloat16 kernels")
    graphs = {}
    for name in GRAPHS:
        graphs[name] = placed(bundle.graph_file(name), settings.on_device)
        found.add(graphs=graphs)
    found.add(wholly=wholly(graphs, settings.on_device))
    try:
        models.opened(bundle, settings)
        found.add(opens=True)
    except NotHere as reason:
        found.add(opens=False, refused=str(reason))


def placed(file: Path, on_device: bool) -> dict:
    """Nodes by provider, those on the CPU by operator, Memcpy nodes, and where inputs and outputs live."""
    options = session_options({"session.record_ep_graph_assignment_info": "1"})
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "optimized.onnx"  # the copies between providers are in it alone
        options.optimized_model_filepath = str(dump)
        providers = [CUDA, CPU] if on_device else [CPU]
        session = onnxruntime.InferenceSession(file, options, providers=providers)
        memcpy = sum(node.op_type.startswith("Memcpy") for node in onnx.load(dump, load_external_data=False).graph.node)
    if on_device and CUDA not in session.get_providers():
        raise RuntimeError("CUDA's libraries do not load")
    nodes, on_cpu = Counter(), Counter()
    for subgraph in session.get_provider_graph_assignment_info():
        for node in subgraph.get_nodes():
            nodes[subgraph.ep_name] += 1
            if subgraph.ep_name == CPU:
                on_cpu[node.op_type] += 1
    inputs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    outputs = zip(session.get_outputs(), session.get_output_memory_infos(), strict=True)
    return {
        "nodes": dict(nodes), "on_cpu": dict(on_cpu) if on_device else {}, "memcpy": memcpy,
        "inputs": {value.name: info.name for value, info in inputs},
        "outputs": {value.name: info.name for value, info in outputs},
    }  # fmt: skip


def wholly(graphs: dict[str, dict], on_device: bool) -> bool:
    """Whether nothing is copied within prefill and decode, and what decode is given and gives stays on the device.

    Sizes are computed on the host, for kernels that want them there: nodes on the CPU are no fault of their own.
    """
    decode = graphs["decode"]
    places = {*decode["inputs"].values(), *decode["outputs"].values()}
    copies = graphs["prefill"]["memcpy"] + decode["memcpy"]
    return not copies and places == {"Cuda" if on_device else "Cpu"}


def lines(part: str, found: dict) -> list[str]:
    lines = []
    for name, graph in found["graphs"].items():
        short = {provider.removesuffix("ExecutionProvider"): count for provider, count in graph["nodes"].items()}
        nodes = ", ".join(f"{count} {provider}" for provider, count in sorted(short.items(), reverse=True))
        places = Counter([*graph["inputs"].values(), *graph["outputs"].values()])
        values = ", ".join(f"{count} {place}" for place, count in places.items())
        on_cpu = ", ".join(f"{operator} {count}" for operator, count in graph["on_cpu"].items())
        label = part if name == GRAPHS[0] else ""
        lines.append(f"{label:<{LABEL}}{name:<8} nodes {nodes}; Memcpy {graph['memcpy']}; values {values}")
        if on_cpu:
            lines.append(f"{'':<{LABEL}} on the CPU: {on_cpu}")
    if not found["wholly"]:
        lines.append(f"{'':<{LABEL}}not wholly on one device")
    if not found["opens"]:
        lines.append(f"{'':<{LABEL}}refused: {found['refused']}")
    return lines
