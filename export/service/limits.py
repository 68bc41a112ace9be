"""What a request may ask for, and how many may wait."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

TEXT_POSITIONS = 512  # of a row of the cache, beside those of a picture


@dataclass(frozen=True)
class Limits:
    """Of one request, and of all together."""

    queued: int = 64  # answers that may wait for a slot
    body_bytes: int = 32 * 2**20  # of a request
    all_bytes: int = 512 * 2**20  # of the requests that are here at a time
    pictures: int = 16
    prompt_letters: int = 32_768
    choices: int = 8
    request_s: float = 120.0  # until it is answered
    body_s: float = 30.0  # until its body is here
    fetched_hosts: tuple[str, ...] = ()  # whose pictures may be fetched


class Refusal(Exception):  # noqa: N818
    """Why a request is not answered: the status, and what OpenAI's error object has."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, retry_after_s: int | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after_s = retry_after_s

    def as_json(self) -> dict:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class Admission:
    """Counts what is here: no more than the slots and the queue hold."""

    def __init__(self, limits: Limits, slots: int):
        self.limits, self.slots, self.answers, self.bytes, self.seconds = limits, slots, 0, 0, 1.0

    @contextmanager
    def request(self) -> Iterator["Entry"]:
        """Around all that is done for a request. Raises Refusal if there is no room for one."""
        entry = Entry(self)
        entry.take_answers(1)
        try:
            yield entry
        finally:
            self.answers -= entry.answers
            self.bytes -= entry.bytes

    def note_seconds(self, seconds: float) -> None:
        """Take in how long a request took, for how long others should wait."""
        self.seconds += (seconds - self.seconds) / 8

    def retry_after_s(self) -> int:
        """In how many seconds there may be room, from how long the last requests took."""
        rounds = max(1.0, self.answers / max(1, self.slots))
        return min(60, max(1, math.ceil(self.seconds * rounds / 2)))


class Entry:
    """What one request takes."""

    def __init__(self, admission: Admission):
        self.admission, self.answers, self.bytes = admission, 0, 0

    def take_answers(self, count: int) -> None:
        """Have so many answers in the making. Raises Refusal (429) if that is too many at the moment."""
        all_, limits = self.admission, self.admission.limits
        more = count - self.answers
        if all_.answers + more > all_.slots + limits.queued:
            raise self._busy()
        all_.answers += more
        self.answers = count

    def take_bytes(self, count: int) -> None:
        """Hold so many bytes more. Raises Refusal (413 or 429) if that is too many."""
        all_, limits = self.admission, self.admission.limits
        if self.bytes + count > limits.body_bytes:
            raise Refusal(413, f"the request has more than {limits.body_bytes} bytes", code="request_too_large")
        if all_.bytes + count > limits.all_bytes:
            raise self._busy()
        all_.bytes += count
        self.bytes += count

    def _busy(self):
        seconds = self.admission.retry_after_s()
        message = f"too many requests are waiting; ask again in {seconds} s"
        return Refusal(429, message, "rate_limit_error", code="rate_limit_exceeded", retry_after_s=seconds)
