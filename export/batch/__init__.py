"""run-onnx-batch: a prompt over a data set, an answer a line in the order of its rows.

A batch is consecutive rows from a multiple of its size on; one worker answers it, and its lines are written at once,
after those of the batch before. So the work file always holds the first rows, and to go on is to cut off an unfinished
end and begin behind it. A row draws from a generator of its own, seeded with [seed, row]; so its answer is the same in
any batch, by any worker, whenever (but for rounding, where two tokens are equally likely to the last bit or so).
"""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from numpy_ref import answer as answering
from numpy_ref import files
from numpy_ref.answer import Album, Picture, Question
from numpy_ref.errors import PaliGemmaError, explained, plural
from numpy_ref.model.sampling import Sampling
from numpy_ref.tokenizer import Tokenizer, prompt_warning

from .. import bundle as bundles
from .. import stopping
from ..bundle import Bundle
from ..session import CPU, make, place
from .dataset import Folder, JsonLines, Parquet, Row

PROG = "run-onnx-batch"
#: From the first rows of batches, and their size, to the answers of each batch in order.
Answers = Callable[[range, int], Iterator[list[dict]]]
Item = TypeVar("Item")
Made = TypeVar("Made")
_BAR = {
    "unit": " pictures", "bar_format": "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]",
    "disable": None,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What to do, as every worker gets it."""

    rows: Folder | JsonLines | Parquet
    bundle: Bundle
    prompt: str | None = None  # of rows without one
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    boxes: str = "big_vision"
    provider: str = "auto"
    provider_options: dict[str, str] = field(default_factory=dict)
    transparency: str = "white"  # one of image.TRANSPARENCIES
    masks: bool = False  # whether answers have them

    def settings(self) -> dict:
        """All that an answer depends on, as plain values: it must be the same to go on."""
        described = bundles.sha256(self.bundle.path / bundles.DESCRIPTION)  # it holds the checksums of the rest
        options = {"prompt": self.prompt, "max_new_tokens": self.max_new_tokens, **asdict(self.sampling)}
        options |= {"boxes": self.boxes, "provider": self.provider, "provider_option": self.provider_options}
        options |= {"transparency": self.transparency, "masks": self.masks}
        return {"input": self.rows.digest, "bundle": described, **options}


def run(
    job: Job, output: Path, batch_size: int, start_workers: Callable[[Job], AbstractContextManager[Answers]]
) -> tuple[int, int]:
    """Answer every row into the new file `output`; how many rows, and how many of them errors.

    `start_workers(job)` is a context in which there is a function from the first rows of batches, and their size, to
    the answers of each batch in order: `workers` below, or `ray_workers.workers`. Raises PaliGemmaError; what was
    written by then stays in the work file.
    """
    count = len(job.rows)
    with work_file(output, job.settings()) as work:
        first = work.keep(count, batch_size)
        if first:
            print(f"{PROG}: going on from row {first} of {count}", file=sys.stderr)
        warned = False
        with start_workers(job) as answer, tqdm(total=count, initial=first, **_BAR) as bar:
            for answers in answer(range(first, count, batch_size), batch_size):
                work.write(answers)
                bar.update(len(answers))
                warned = warned or _warn_of_prompts(answers, bar)
        work.finish(count)
    return work.rows, work.errors


def _warn_of_prompts(answers, bar) -> bool:
    """Say what is odd about the first prompt of these answers that is; whether there was one."""
    for answer in answers:
        if warning := prompt_warning(answer["prompt"] or ""):
            bar.write(f"{PROG}: warning: row {answer['row']}: {warning} (said once)", file=sys.stderr)
            return True
    return False


# --- a worker ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A row that can be asked, and its question."""

    row: Row
    prompt: str
    question: Question


class Worker:
    """A session that answers batches."""

    def __init__(self, job: Job, threads: int):
        self.job, self.engine = job, make(job.bundle, job.provider, threads, provider_options=job.provider_options)
        self.tokenizer, self.album = Tokenizer.load(job.bundle.path, job.bundle.config), Album(self.engine)

    def answers(self, begins: range, size: int) -> Iterator[list[dict]]:
        """Yield the answers of each batch, a list of dict. The next one's pictures are read meanwhile."""
        for prepared in one_ahead(lambda begin: self.prepare(begin, size), begins):
            yield self.answer(prepared)

    def prepare(self, begin: int, size: int) -> list[Asked | dict]:
        """The questions of a batch; in place of one that cannot be asked, the answer that says why."""
        return [self._prepare(row) for row in self.job.rows.read(begin, begin + size)]

    def answer(self, prepared: list[Asked | dict]) -> list[dict]:
        """The answers of a batch that was prepared."""
        by_pictures: dict[int, list[Asked]] = {}  # those with equally many go through the model together
        for each in prepared:
            if isinstance(each, Asked):
                by_pictures.setdefault(len(each.question.pictures), []).append(each)
        answers = {count: iter(self._answer(asked)) for count, asked in by_pictures.items()}
        return [
            _head(each.row, each.prompt) | next(answers[len(each.question.pictures)])
            if isinstance(each, Asked)
            else each
            for each in prepared
        ]

    def _prepare(self, row: Row) -> Asked | dict:
        try:
            prompt = row.question(self.job.prompt)
            most = self.job.max_new_tokens
            ids, new_tokens = answering.fit(self.engine, self.tokenizer, prompt, most, pictures=row.count)
            pictures = [self.album.get(row.key(image), partial(self._look, row, image)) for image in row.images]
            return Asked(row, prompt, Question(ids, new_tokens, pictures))
        except Exception as error:  # of any kind: one row must not stop the others
            text = self.job.prompt if row.prompt is None else row.prompt
            return _head(row, text if isinstance(text, str) else None) | {"error": str(explained(error))}

    def _look(self, row: Row, image: Any) -> Picture:
        return answering.look(self.engine, row.open(image, self.job.transparency))

    def _answer(self, asked: list[Asked]) -> list[dict]:
        """What was answered to each, or {"error"}: rows that fail together are asked one by one.

        Raises PaliGemmaError if it is not the rows: a model that answers nothing any more.
        """
        questions, rows = [each.question for each in asked], [each.row.number for each in asked]
        sampling, seeds = self.job.sampling, [[self.job.sampling.seed, row] for row in rows]
        try:
            answers = answering.answer_all(
                self.engine, self.tokenizer, questions, sampling=sampling, boxes=self.job.boxes, seeds=seeds
            )
            return [answer.as_json(masks=self.job.masks) for answer in answers]
        except Exception as error:  # the runtime's exceptions have no common class
            if not self._works():
                reason = f"rows {rows[0]} to {rows[-1]}: the model failed ({error})"
                raise PaliGemmaError(f"{reason}; if memory is short, a smaller --batch-size takes less") from error
            if len(asked) > 1:
                return [fields for each in asked for fields in self._answer([each])]
            return [{"error": str(explained(error))}]

    def _works(self) -> bool:
        """Whether the model answers the plainest question: no prompt about a grey picture."""
        size = self.engine.config.vision.image_size
        grey = Picture(np.zeros((1, 3, size, size), np.float32), size, size)
        question = Question(self.tokenizer.prompt(""), 1, [grey])
        try:
            answering.answer_all(self.engine, self.tokenizer, [question])
        except Exception:
            return False
        return True


def _head(row: Row, prompt) -> dict:
    return {"row": row.number, "image": row.image_name, "prompt": prompt}


def one_ahead(function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Yield function(item) for each item, in order, while a thread is at work on the next."""
    with ThreadPoolExecutor(1) as thread:
        before = None
        for item in items:
            coming = thread.submit(function, item)
            if before:
                yield before.result()
            before = coming
        if before:
            yield before.result()


# --- workers on this machine -------------------------------------------------------------------------------


@contextmanager
def workers(job: Job, count: int = 1, threads: int = 0) -> Iterator[Answers]:
    """One worker in this process, or `count` in a process each that share `threads` (0: all cores) evenly."""
    # Chosen here, so that what there is to say about it is printed once and not by every worker.
    job = replace(job, provider="cpu" if place(job.bundle, job.provider, job.provider_options) == CPU else "cuda")
    if count == 1:
        yield Worker(job, threads).answers
        return
    share = max(1, (threads or os.cpu_count() or 1) // count)
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(job, share)) for _ in range(count)]
        for process in processes:
            process.receive()
        yield partial(in_turn, processes)


def in_turn(processes: Sequence["Process"], begins: range, size: int) -> Iterator[list[dict]]:
    """Yield the answers of each batch; of n workers the first has batches 0, n, 2n, …

    A worker that is ahead of its turn is stopped by its pipe when that is full, so nothing piles up.
    """
    for i, process in enumerate(processes):
        process.send(begins[i :: len(processes)], size)
    for i in range(len(begins)):
        yield processes[i % len(processes)].receive()


class Process:
    """A worker in a process of its own."""

    def __init__(self, job: Job, threads: int):
        context = multiprocessing.get_context("spawn")  # a fork would copy the runtime's locks
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=_work, args=(other_end, job, threads), daemon=True)
        self.process.start()
        self.kill = self.process.kill
        stopping.on_stop(self.kill)
        other_end.close()

    def send(self, begins: range, size: int) -> None:
        """Which batches to answer."""
        with self._alive():
            self.connection.send((begins, size))

    def receive(self) -> Any:
        """What it sends next: None once it is ready, then the answers of its batches. Raises its PaliGemmaError."""
        with self._alive():
            received = self.connection.recv()
        if isinstance(received, PaliGemmaError):
            raise received
        return received

    @contextmanager
    def _alive(self):
        try:
            yield
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            raise PaliGemmaError(f"a worker stopped (exit code {code}); the same command again goes on") from None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        stopping.no_more(self.kill)
        self.connection.close()
        self.process.terminate()
        self.process.join()
        self.process.close()


def _work(connection, job, threads):
    """What the process of a worker does until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one answers it
    with suppress(EOFError, ConnectionError):  # the first process is gone
        try:
            worker = Worker(job, threads)
            connection.send(None)
            while True:
                for answers in worker.answers(*connection.recv()):
                    connection.send(answers)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            connection.send(explained(error))


# --- the work file -----------------------------------------------------------------------------------------


@contextmanager
def work_file(output: Path, settings: dict) -> Iterator["Work"]:
    """A Work to write `output` with. What another run with these settings left behind is taken over.

    Raises PaliGemmaError, and touches nothing, if there is an output, other settings or another process at work.
    """
    files.absent(output, "file")
    part = output.with_name(f"{output.name}.part")
    notes = output.with_name(f"{output.name}.part.json")
    for path in (part, notes):
        if os.path.lexists(path) and not path.is_file():
            raise PaliGemmaError(f"{path}: not a file; remove it, or give another --output")
    with _written(output):
        file = part.open("a+b", buffering=0)  # what a full disk does not take must not wait for close
    try:
        with _written(output):
            _lock(file, part)
    except PaliGemmaError:
        file.close()
        raise
    try:
        with _written(output):
            if part.stat().st_size:
                _check_settings(part, notes, settings)
            else:
                notes.write_text(json.dumps(settings) + "\n")
        yield Work(output, part, notes, file)
    finally:
        with suppress(OSError):  # the folder is gone
            if not file.closed and not os.fstat(file.fileno()).st_size:
                part.unlink()
                notes.unlink(missing_ok=True)
        with suppress(OSError):  # of what counts, every byte was seen to be written
            file.close()


class Work:
    """The answers so far, in OUT.part; the settings they were given with are in OUT.part.json."""

    def __init__(self, output: Path, part: Path, notes: Path, file):
        self.output, self.part, self.notes, self.file = output, part, notes, file
        self.rows = self.errors = self.end = 0

    def keep(self, count: int, batch_size: int) -> int:
        """Keep the answers of whole batches from row 0 on, cut off what follows; how many rows are kept."""
        rows = errors = place = 0
        with _written(self.part), self.part.open("rb") as lines:
            for line in lines:
                answer = _answer(line)
                if answer is None or answer.get("row") != rows or rows == count:
                    break
                rows, errors, place = rows + 1, errors + ("error" in answer), place + len(line)
                if rows % batch_size == 0 or rows == count:
                    self.rows, self.errors, self.end = rows, errors, place
            self.file.truncate(self.end)
        return self.rows

    def write(self, answers: list[dict]) -> None:
        """Add the answers of a batch: all of them, or none."""
        lines = "".join(f"{json.dumps(answer)}\n" for answer in answers).encode()
        with _written(self.part):
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[self.file.write(rest) :]
            except OSError:
                with suppress(OSError):
                    self.file.truncate(self.end)
                raise
        self.end += len(lines)
        self.rows += len(answers)
        self.errors += sum("error" in answer for answer in answers)

    def finish(self, count: int) -> None:
        """Give the file its name, once it holds an answer to each of `count` rows."""
        if self.rows != count:
            raise PaliGemmaError(
                f"{self.part}: {plural(self.rows, 'answer')} to {plural(count, 'row')}; a worker lost some"
            )
        files.absent(self.output, "file")
        with _written(self.output):
            os.fsync(self.file.fileno())
            self.file.close()
            self.part.rename(self.output)
            self.notes.unlink()


def _answer(line: bytes) -> dict | None:
    """The answer of a whole line; None where the line was cut off, or is something else."""
    try:
        answer = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _check_settings(part, notes, settings) -> None:
    try:
        before = files.read_json(notes)
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{part}: {error}, so it cannot go on; remove it to begin anew") from None
    changed = [name for name, value in settings.items() if not isinstance(before, dict) or before.get(name) != value]
    if changed:
        names = ", ".join(name.replace("_", "-") for name in changed)
        raise PaliGemmaError(f"{part} was begun with another {names}; go on with the same, or remove it to begin anew")


def _lock(file, part) -> None:
    """Keep a second process away from a work file; the lock goes with this process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows, where nobody is kept away
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PaliGemmaError(f"{part}: another process is at work on it") from None


@contextmanager
def _written(output):
    try:
        yield
    except OSError as error:
        raise PaliGemmaError(f"{output}: cannot be written ({error.strerror or error})") from None
