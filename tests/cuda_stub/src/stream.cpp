// Streams, events, capture and graphs. Work is done at once, in the order of the calls; what a capture records is done
// when its graph is launched.
#include <algorithm>
#include <map>
#include <set>

#include "runtime.h"

namespace stub {

struct Graph {
  int id;
  std::vector<Step> steps;
};

enum Mode { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };  // cudaStreamCaptureMode

struct Capture {
  Stream* origin;
  Mode mode;
  std::thread::id thread;
  Graph* graph;
  bool invalid = false;
};

struct Event {
  int device;
  int stream = -1;
  Capture* capture = nullptr;  // which recorded it last, if that was a capture
};

template <class Value>
static Value& forever() {  // one value of each type, never destroyed
  static auto* made = new Value;
  return *made;
}

static std::set<Stream*>& streams() { return forever<std::set<Stream*>>(); }
static std::set<Capture*>& captures() { return forever<std::set<Capture*>>(); }

static Stream* default_stream(int device) {
  auto& made = forever<std::map<int, Stream*>>();
  if (!made.count(device)) made[device] = new Stream{0, device, true};
  return made[device];
}

Stream* find_stream(void* handle) {
  if (reinterpret_cast<std::uintptr_t>(handle) <= 2) return default_stream(current_device());
  auto* stream = static_cast<Stream*>(handle);
  return streams().count(stream) ? stream : nullptr;
}

Line& placed(Line& line, const Stream* stream) {
  return line.with("stream", stream->id).with("device", stream->device).with("captured", stream->capture != nullptr);
}

static Error breaks(Capture* capture, const char* call, Error error, const std::string& rule) {
  capture->invalid = true;
  return broken(call, error, rule);
}

Error allowed_in_capture(const char* call) {
  for (Capture* capture : captures()) {
    const bool here = capture->thread == std::this_thread::get_id();
    if (capture->mode == kGlobal || (capture->mode == kThreadLocal && here))
      return breaks(capture, call, kCaptureUnsupported, "not while a stream is being captured");
  }
  return kSuccess;
}

// The default stream waits for every blocking stream, which a capture cannot record.
static Error allowed_on_default(const char* call, const Stream* stream) {
  if (stream->id != 0) return kSuccess;
  for (Capture* capture : captures())
    if (capture->origin->blocking && capture->origin->device == stream->device)
      return breaks(capture, call, kCaptureImplicit, "the default stream would wait for a stream being captured");
  return kSuccess;
}

Error admit(const char* call, void* handle, bool launches, Stream** stream) {
  *stream = find_stream(handle);
  if (!*stream) return broken(call, kInvalidHandle, "no such stream");
  if (launches && (*stream)->device != current_device())
    return broken(call, kInvalidHandle, "the stream is another device's than the current one");
  if ((*stream)->capture && (*stream)->capture->invalid) return failed(kCaptureInvalidated);
  return allowed_on_default(call, *stream);
}

void perform(Stream* stream, Step step) {
  if (stream->capture)
    stream->capture->graph->steps.push_back(std::move(step));
  else if (step.effect)
    step.effect();
}

static Error wait(const char* call, const char* what, int stream, int device) {
  if (Error error = allowed_in_capture(call)) return error;
  Line("wait").with("on", std::string(what)).with("stream", stream).with("device", device);
  return kSuccess;
}

static Error create(void** made, bool blocking) {
  static int count = 0;
  Lock lock(mutex());
  auto* stream = new Stream{++count, current_device(), blocking};
  streams().insert(stream);
  *made = stream;
  Line("stream").with("id", stream->id).with("device", stream->device).with("blocking", blocking);
  return kSuccess;
}

static Line& counted(Line& line, const Graph& graph) {
  line.with("graph", graph.id);
  for (const char* kind : {"kernel", "product", "copy", "fill", "host"})
    line.with(kind, std::count_if(graph.steps.begin(), graph.steps.end(),
                                  [&](const Step& step) { return std::string(step.kind) == kind; }));
  return line;
}

}  // namespace stub

using namespace stub;

EXPORT Error cudaStreamCreate(void** made) { return create(made, true); }
EXPORT Error cudaStreamCreateWithFlags(void** made, unsigned flags) { return create(made, !(flags & 1)); }
EXPORT Error cudaStreamCreateWithPriority(void** made, unsigned flags, int) { return create(made, !(flags & 1)); }
EXPORT Error cudaStreamDestroy(void* handle) {
  Lock lock(mutex());
  auto* stream = static_cast<Stream*>(handle);
  if (!streams().erase(stream)) return broken("cudaStreamDestroy", kInvalidHandle, "no such stream");
  if (stream->capture) stream->capture->invalid = true;
  return kSuccess;  // the object stays, for captures and events that know it
}

EXPORT Error cudaDeviceSynchronize() {
  Lock lock(mutex());
  return wait("cudaDeviceSynchronize", "device", -1, current_device());
}
EXPORT Error cudaStreamSynchronize(void* handle) {
  Lock lock(mutex());
  Stream* stream = find_stream(handle);
  if (!stream) return broken("cudaStreamSynchronize", kInvalidHandle, "no such stream");
  if (stream->capture)
    return breaks(stream->capture, "cudaStreamSynchronize", kCaptureUnsupported, "the stream is being captured");
  return wait("cudaStreamSynchronize", "stream", stream->id, stream->device);
}
EXPORT Error cudaStreamQuery(void* handle) {
  Lock lock(mutex());
  if (!find_stream(handle)) return broken("cudaStreamQuery", kInvalidHandle, "no such stream");
  return allowed_in_capture("cudaStreamQuery");
}

EXPORT Error cudaEventCreate(void** made) {
  *made = new Event{current_device()};
  return kSuccess;
}
EXPORT Error cudaEventCreateWithFlags(void** made, unsigned) { return cudaEventCreate(made); }
EXPORT Error cudaEventDestroy(void* event) {
  delete static_cast<Event*>(event);
  return kSuccess;
}
EXPORT Error cudaEventRecord(void* handle, void* stream_handle) {
  Lock lock(mutex());
  Stream* stream;
  if (Error error = admit("cudaEventRecord", stream_handle, false, &stream)) return error;
  auto* event = static_cast<Event*>(handle);
  if (event->device != stream->device)
    return broken("cudaEventRecord", kInvalidHandle, "event and stream are of different devices");
  event->stream = stream->id;
  event->capture = stream->capture;
  Line line("record");
  placed(line, stream);
  return kSuccess;
}
EXPORT Error cudaEventRecordWithFlags(void* event, void* stream, unsigned) { return cudaEventRecord(event, stream); }
EXPORT Error cudaStreamWaitEvent(void* stream_handle, void* handle, unsigned) {
  Lock lock(mutex());
  Stream* stream;
  if (Error error = admit("cudaStreamWaitEvent", stream_handle, false, &stream)) return error;
  auto* event = static_cast<Event*>(handle);
  if (stream->capture && event->stream >= 0 && event->capture != stream->capture)
    return breaks(stream->capture, "cudaStreamWaitEvent", kCaptureIsolation, "the event is from outside the capture");
  if (event->capture && captures().count(event->capture)) stream->capture = event->capture;  // it joins the capture
  Line line("follow");
  placed(line, stream).with("after", event->stream);
  return kSuccess;
}
EXPORT Error cudaEventSynchronize(void* handle) {
  Lock lock(mutex());
  auto* event = static_cast<Event*>(handle);
  if (event->capture) return broken("cudaEventSynchronize", kCapturedEvent, "the event was recorded in a capture");
  return wait("cudaEventSynchronize", "event", event->stream, event->device);
}
EXPORT Error cudaEventQuery(void* handle) {
  Lock lock(mutex());
  if (static_cast<Event*>(handle)->capture)
    return broken("cudaEventQuery", kCapturedEvent, "the event was recorded in a capture");
  return allowed_in_capture("cudaEventQuery");
}
EXPORT Error cudaEventElapsedTime(float* milliseconds, void*, void*) {
  *milliseconds = 1;  // nothing here takes time
  return kSuccess;
}

EXPORT Error cudaStreamBeginCapture(void* handle, int mode) {
  static int count = 0;
  Lock lock(mutex());
  Stream* stream = find_stream(handle);
  if (!stream) return broken("cudaStreamBeginCapture", kInvalidHandle, "no such stream");
  if (!stream->id) return broken("cudaStreamBeginCapture", kCaptureUnsupported, "the default stream has no captures");
  if (stream->capture) return broken("cudaStreamBeginCapture", kIllegalState, "the stream is being captured");
  stream->capture = new Capture{stream, Mode(mode), std::this_thread::get_id(), new Graph{++count, {}}};
  captures().insert(stream->capture);
  Line("capture").with("state", std::string("begin")).with("graph", count).with("stream", stream->id)
      .with("device", stream->device);
  return kSuccess;
}
EXPORT Error cudaStreamEndCapture(void* handle, void** graph) {
  Lock lock(mutex());
  *graph = nullptr;
  Stream* stream = find_stream(handle);
  if (!stream || !stream->capture) return broken("cudaStreamEndCapture", kIllegalState, "nothing is being captured");
  Capture* capture = stream->capture;
  if (capture->origin != stream) return breaks(capture, "cudaStreamEndCapture", kCaptureUnmatched, "begun elsewhere");
  for (Stream* other : streams())
    if (other->capture == capture) other->capture = nullptr;
  captures().erase(capture);  // the object stays, for the events that know it
  Line("capture").with("state", std::string(capture->invalid ? "invalid" : "end")).with("graph", capture->graph->id)
      .with("stream", stream->id).with("device", stream->device);
  if (capture->invalid) return failed(kCaptureInvalidated);
  *graph = capture->graph;
  return kSuccess;
}
EXPORT Error cudaStreamIsCapturing(void* handle, int* status) {
  Lock lock(mutex());
  Stream* stream = find_stream(handle);
  if (!stream) return broken("cudaStreamIsCapturing", kInvalidHandle, "no such stream");
  *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
  return kSuccess;
}

EXPORT Error cudaGraphInstantiate(void** made, void* handle, unsigned long long) {
  Lock lock(mutex());
  auto* graph = static_cast<Graph*>(handle);
  if (!graph) return broken("cudaGraphInstantiate", kInvalidValue, "no graph");
  *made = new Graph(*graph);
  Line line("instantiate");
  counted(line, *graph);
  return kSuccess;
}
EXPORT Error cudaGraphLaunch(void* handle, void* stream_handle) {
  Lock lock(mutex());
  Stream* stream;
  if (Error error = admit("cudaGraphLaunch", stream_handle, false, &stream)) return error;
  auto* graph = static_cast<Graph*>(handle);
  {
    Line line("replay");
    counted(placed(line, stream), *graph);
  }
  for (const Step& step : graph->steps) perform(stream, step);
  return kSuccess;
}
EXPORT Error cudaGraphDestroy(void* graph) {
  delete static_cast<Graph*>(graph);
  return kSuccess;
}
EXPORT Error cudaGraphExecDestroy(void* graph) { return cudaGraphDestroy(graph); }
