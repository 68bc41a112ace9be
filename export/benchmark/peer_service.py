"""The service of transformers, `transformers serve`, on a checkpoint: a peer of serve-onnx."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from numpy_ref.checkpoint import SHIPPED
from numpy_ref.errors import PaliGemmaError

NEEDED = ("torch", "transformers", "fastapi", "openai", "uvicorn")
COMMAND = "from transformers.cli.transformers import main; main()"
# The pictures of a message, and then its texts; the processor makes a prompt of PaliGemma from that.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}"
)


def check_installed() -> None:
    """Raises PaliGemmaError if the service cannot be started."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise PaliGemmaError(
            f"transformers serve needs {', '.join(missing)}: pip install 'transformers[serving]' torch"
        )


def prepare(checkpoint: Path, folder: Path) -> None:
    """A folder that transformers serves: the checkpoint's weights by links, with a processor and a template for chats.

    A checkpoint without a tokenizer that transformers reads takes the shipped model's, whose id of `<image>` goes into
    the configuration: at its places the table's rows are not used.
    """
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.name.startswith("model"):
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    if not (checkpoint / "tokenizer_config.json").exists():
        checkpoint = SHIPPED
        config["image_token_index"] = json.loads((SHIPPED / "config.json").read_text())["image_token_index"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoint / name, folder / name)
    vision, processor = config["vision_config"], json.loads((SHIPPED / "preprocessor_config.json").read_text())
    side = vision["image_size"]
    processor |= {
        "size": {"height": side, "width": side},
        "image_seq_length": (side // vision["patch_size"]) ** 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@contextmanager
def serving(folder: Path, dtype: str, threads: int) -> Iterator[int]:
    """The port of the service, which runs in a process of its own. Raises PaliGemmaError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", dtype]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "serve", str(folder), *options], env=environment, stdout=log, stderr=log
        )
        try:
            while not answers(port):
                if process.poll() is not None:
                    log.seek(0)
                    raise PaliGemmaError(f"transformers serve does not start: {log.read().strip()[-1000:]}")
                time.sleep(0.2)
            yield port
        finally:
            process.kill()
            process.wait()


def answers(port: int) -> bool:
    """Whether somebody listens at a port of this machine."""
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0
