"""Weights in the order of this machine's kernels: what a bundle with them holds, and that it is what runs."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest

from export import bundle, verify
from export.bundle import prepack, weights
from export.session import Session, allocator, open_session
from numpy_ref import checkpoint
from numpy_ref.errors import PaliGemmaError

from .fuzz import corpus

GRAPHS = ("prefill", "decode", "extend")


@pytest.fixture(scope="module", params=["float32", "int8", "int4"])
def exported(request, tmp_path_factory):
    """The shipped model as a plain bundle and as one with repacked weights."""
    folder, loaded = tmp_path_factory.mktemp(request.param), checkpoint.load()
    for name, prepacked in (("plain", False), ("prepacked", True)):
        bundle.write(loaded, folder / name, request.param, prepacked=prepacked)
    return folder


def entries(folder) -> dict[str, dict[str, str]]:
    """By graph: weight -> where its repacked bytes are."""
    found = {}
    for name in GRAPHS:
        tensors = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph.initializer
        pairs = [(t.name, pair) for t in tensors for pair in t.external_data if pair.key.startswith(prepack.ENTRY)]
        found[name] = {name: pair.value for name, pair in pairs}
    return found


def answers(session):
    """Logits of a prefill and of a decode step."""
    example = verify.example(session.config)
    logits, cache = session.prefill(*example.prefill(np.float32))
    return logits, session.decode(example.steps[0], example.lengths, cache)[0]


def test_nothing_else_changes(exported):
    """The plain weights come first, the graphs have the same nodes, the numbers are the same to the bit."""
    plain, prepacked = exported / "plain", exported / "prepacked"
    before, after = ((folder / weights.FILE).read_bytes() for folder in (plain, prepacked))
    assert after.startswith(before)
    assert len(after) > 1.5 * len(before)
    for name in GRAPHS:
        graphs = [onnx.load(folder / f"{name}.onnx", load_external_data=False).graph for folder in (plain, prepacked)]
        assert graphs[0].node == graphs[1].node
    opened = [bundle.load(folder) for folder in (plain, prepacked)]
    assert [each.is_prepacked for each in opened] == [False, True]
    for a, b in zip(*(answers(Session(each, "cpu")) for each in opened), strict=True):
        assert np.array_equal(a, b)
    assert not list(prepacked.glob("tmp*"))


def test_a_weight_of_two_graphs_is_there_once(exported):
    found = entries(exported / "prepacked")
    shared = found["prefill"].keys() & found["decode"].keys()
    assert shared >= ({"text.embedding.int4"} if "text.embedding.int4" in found["decode"] else set())
    assert all(found["prefill"][name] == found["decode"][name] for name in shared)
    places = {value for each in found.values() for value in each.values()}
    regions = sorted(tuple(int(n) for n in value.split("|")[1].split(";")[:2]) for value in places)
    assert len(regions) == len({start for start, _ in regions}) > 20
    assert all(start % prepack.PAGE == 0 for start, _ in regions)
    assert all(a + length <= b for (a, length), (b, _) in itertools.pairwise(regions))


def test_large_pieces_begin_on_huge_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(prepack, "PIECE", 2**16)
    bundle.write(checkpoint.load(), tmp_path / "out", "int4", prepacked=True)
    places = {value for each in entries(tmp_path / "out").values() for value in each.values()}
    regions = [tuple(int(n) for n in value.split("|")[1].split(";")[:2]) for value in places]
    large = [start for start, length in regions if length >= 2**16]
    assert 0 < len(large) < len(regions)
    assert all(start % prepack.HUGE_PAGE == 0 for start in large)
    assert answers(Session(bundle.load(tmp_path / "out"), "cpu"))[0].any()


def test_the_repacked_bytes_are_what_runs(exported, tmp_path):
    """Other bytes there, other numbers: the runtime does not use a copy of its own."""
    folder = tmp_path / "changed"
    shutil.copytree(exported / "prepacked", folder)
    expected = answers(Session(bundle.load(folder), "cpu"))
    start, length, _ = (int(n) for n in next(iter(entries(folder)["decode"].values())).split("|")[1].split(";"))
    with open(folder / weights.FILE, "r+b") as file:
        file.seek(start)
        file.write(bytes(length))
    found = answers(Session(bundle.load_but_weights(folder), "cpu"))
    assert not np.array_equal(expected[1], found[1])
    with pytest.raises(PaliGemmaError, match=r"weights\.bin: contents differ from their SHA-256"):
        open_session(bundle.load_but_weights(folder), "cpu")


def change_entries(folder, change) -> None:
    """Change what the graphs say of repacked weights, with the right checksums."""
    for name in GRAPHS:
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for pair in tensor.external_data:
                if pair.key.startswith(prepack.ENTRY):
                    pair.value = change(pair.value)
        corpus.sealed(folder, f"{name}.onnx", model.SerializeToString())


@pytest.fixture
def elsewhere(exported, tmp_path, monkeypatch):
    """A copy of the repacked bundle on a machine that has never seen it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(exported / "prepacked", tmp_path / "copy")


@pytest.mark.parametrize(
    "pieces", ["|{end};16;0", "|0;1;0", "", "|0", "|0;;", "|{end};-1;0", "|x;y;z", "|0;16;0|0;16;0"]
)
def test_pieces_of_another_length_are_refused(elsewhere, pieces):
    """The kernels would read beyond them, and beyond the file."""
    end = (elsewhere / weights.FILE).stat().st_size - 16
    change_entries(elsewhere, lambda value: value.split("|")[0] + pieces.format(end=end))
    with pytest.raises(PaliGemmaError, match="repacked weights have other lengths than this processor reads"):
        open_session(bundle.load(elsewhere), "cpu")


@pytest.mark.parametrize("shift", [1, 4, 16, -1, 2048])
def test_pieces_that_lie_askew_are_refused(elsewhere, shift):
    """Kernels load whole registers from places that divide by their size; from others the process would crash."""

    def shifted(value):
        identity, piece = value.split("|")
        offset, rest = piece.split(";", 1)
        return f"{identity}|{int(offset) + shift};{rest}"

    change_entries(elsewhere, shifted)
    with pytest.raises(PaliGemmaError, match="not on pages of the file"):
        open_session(bundle.load(elsewhere), "cpu")


def test_pieces_under_another_weights_name_are_refused(elsewhere):
    """What a weight is repacked into is found by its hash, whichever tensor names it."""
    found = [value for each in entries(elsewhere).values() for value in each.values()]
    shortest = min(found, key=lambda value: int(value.split(";")[1]))
    _, place = shortest.split("|", 1)
    change_entries(elsewhere, lambda value: value.split("|")[0] + "|" + place)
    with pytest.raises(PaliGemmaError, match="other lengths"):
        open_session(bundle.load(elsewhere), "cpu")


def test_pieces_that_are_unknown_here_are_not_used(exported, elsewhere):
    """As of another processor; also where some are known."""
    expected = answers(Session(bundle.load(exported / "plain"), "cpu"))
    end = (elsewhere / weights.FILE).stat().st_size - 16
    count = itertools.count()
    change_entries(elsewhere, lambda value: f"Odd+1|{end};16;0" if next(count) % 2 else value)
    for a, b in zip(expected, answers(Session(bundle.load(elsewhere), "cpu")), strict=True):
        assert np.array_equal(a, b)


def test_entries_within_an_inner_graph_are_refused(elsewhere):
    model = onnx.load(elsewhere / "masks.onnx", load_external_data=False)
    inner = onnx.helper.make_graph([], "inner", [], [], [onnx.numpy_helper.from_array(np.zeros(1), "w")])
    inner.initializer[0].external_data.add(key="prepacked_0", value="MatMul+1|0;16;0")
    model.graph.node.add(op_type="If").attribute.append(onnx.helper.make_attribute("then_branch", inner))
    corpus.sealed(elsewhere, "masks.onnx", model.SerializeToString())
    with pytest.raises(PaliGemmaError, match=r"masks\.onnx: repacked weights where export-onnx puts none"):
        open_session(bundle.load(elsewhere), "cpu").masks(np.zeros((1, 16), np.int64))


def test_a_copy_is_compared_once(elsewhere, monkeypatch):
    saved, save = [], prepack._save
    monkeypatch.setattr(prepack, "_save", lambda *arguments: saved.append(1) or save(*arguments))
    for count in (2, 2):
        open_session(bundle.load(elsewhere), "cpu")
        assert len(saved) == count


def test_another_processor(exported, tmp_path):
    """Its kernels want another order: the runtime does not find it, and makes its own."""
    folder = tmp_path / "moved"
    shutil.copytree(exported / "prepacked", folder)
    description = replace(bundle.load(folder).description, prepacked="another")
    (folder / "bundle.json").write_text(json.dumps(description.to_json()))
    for name in GRAPHS:
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for pair in tensor.external_data:
                if pair.key.startswith(prepack.ENTRY):
                    pair.value = pair.value.replace("+", "+1")  # another hash
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    expected = answers(Session(bundle.load(exported / "plain"), "cpu"))
    moved = bundle.Bundle(folder, description)
    assert not moved.is_prepacked
    for a, b in zip(expected, answers(Session(moved, "cpu")), strict=True):
        assert np.array_equal(a, b)


def test_the_allocator_is_as_before_after_a_bundle_was_opened(monkeypatch):
    """What it keeps while one is opened it gives back again, whatever happens."""
    called = []

    class Library:
        def mallopt(self, parameter, value):
            called.append((parameter, value))

        def malloc_trim(self, padding):
            called.append("trim")

    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Library())
    with pytest.raises(ZeroDivisionError), allocator.freed_memory_kept():
        raise ZeroDivisionError
    assert {parameter for parameter, _ in called[:3]} == {-1, -4, -8}
    assert called[-1] == "trim"
    assert dict(called[:-1]) == {-1: 2**26, -3: 2**25, -4: 2**16, -8: 0}


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("asked for"))
    with allocator.freed_memory_kept():
        pass


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int4-float16"])
def test_it_is_for_the_cpu(tmp_path, precision):
    with pytest.raises(PaliGemmaError, match=f"--prepack: it is for kernels of the CPU, and {precision} is for CUDA"):
        bundle.write(checkpoint.load(), tmp_path / "out", precision, prepacked=True)
    assert not list(tmp_path.iterdir())


def test_another_runtime_has_other_kernels(monkeypatch):
    """What it repacked for one version is not taken by the next."""
    before = prepack.processor()
    monkeypatch.setattr(prepack.onnxruntime, "__version__", "0.0.1")
    assert prepack.processor() != before


def test_a_plan_counts_the_second_copy():
    loaded = checkpoint.load()
    once, twice = (bundle.plan(loaded, "int4", prepacked=prepacked) for prepacked in (False, True))
    assert twice["files"]["weights.bin"] == 2 * once["files"]["weights.bin"]
    with pytest.raises(PaliGemmaError, match="--prepack: it is for kernels of the CPU"):
        bundle.plan(loaded, "float16", prepacked=True)
