"""python -m export: the command `run-onnx`."""

from .cli import run_main

if __name__ == "__main__":
    run_main()
