// The log, in the file that CUDA_STUB_LOG names.
#include <cstdio>
#include <cstdlib>

#include "runtime.h"

namespace stub {

std::recursive_mutex& mutex() {
  static auto* made = new std::recursive_mutex;  // never destroyed: programs call CUDA until the very end
  return *made;
}

static std::FILE* file() {
  static std::FILE* opened = [] {
    const char* name = std::getenv("CUDA_STUB_LOG");
    std::FILE* made = name ? std::fopen(name, "a") : nullptr;
    if (made) std::setvbuf(made, nullptr, _IOLBF, 0);  // a crash then loses nothing
    return made;
  }();
  return opened;
}

Line& Line::with(const char* key, const std::string& value) {
  text_.append("\t").append(key).append("=").append(value);
  return *this;
}

Line::~Line() {
  Lock lock(mutex());
  if (file()) std::fprintf(file(), "%s\n", text_.c_str());
}

}  // namespace stub

EXPORT void stub_mark(const char* name) { stub::Line("mark").with("name", std::string(name)); }
