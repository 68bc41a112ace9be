"""`serve-onnx`: a bundle as an HTTP service in OpenAI's shape, which answers many requests at once.

slots.py      the cache: a fixed number of rows, of which the first are in use
scheduler.py  continuous batching: which requests are prefilled when, and the decode steps of all that run
text.py       the text of a growing answer, and where a stop string ends it
pictures.py   recent pictures, by their contents
worker.py     an engine with a scheduler in a thread of its own, from a request to its events
backend.py    workers as the application sees them: in this process, or in processes that are watched
shapes.py     requests and responses in OpenAI's shape, and the OpenAPI document
limits.py     what a request may ask for, and how many may wait
metrics.py    counters, and the log line of a request
app.py        the routes
command.py    the command
ray_serve.py  the same application on Ray Serve
"""
