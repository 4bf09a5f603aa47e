// Launches, waits, copies and bytes, by the line of Python that asked for them.
#pragma once

#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "settings.h"

namespace fake {

struct Count {
  int64_t times = 0, bytes = 0;
};
// (site, kind, operator) -> count
std::map<std::tuple<int, std::string, std::string>, Count> counts;
std::vector<std::tuple<std::string, int, std::string>> sites{{"(elsewhere)", 0, ""},
                                                             {"(autograd)", 0, ""}};
std::map<std::pair<PyCodeObject*, int>, int> site_of;
std::unordered_map<PyCodeObject*, bool>
    in_project;                        // its keys are owned: an address stays one code
std::vector<std::string> project{""};  // prefixes of file names
bool counting = true;
bool tracing = false;  // memory of the host, by site

bool is_project(PyCodeObject* code) {
  auto found = in_project.find(code);
  if (found != in_project.end()) return found->second;
  const char* name = PyUnicode_AsUTF8(code->co_filename);
  if (name == nullptr) PyErr_Clear();
  bool inside = false;
  for (const auto& prefix : project) inside |= name && std::string(name).rfind(prefix, 0) == 0;
  Py_INCREF(code);
  return in_project[code] = inside;
}

// The innermost line of the project that led here. Call with the gate open: it takes the GIL.
int site() {
  if (!Py_IsInitialized()) return 0;
  py::gil_scoped_acquire gil;
  Lock lock(gate);
  PyFrameObject* frame = PyEval_GetFrame();
  if (frame == nullptr) return 1;
  Py_INCREF(frame);
  int found = 0;
  while (frame != nullptr) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    if (is_project(code)) {
      int line = PyFrame_GetLineNumber(frame);
      auto [at, fresh] = site_of.try_emplace({code, line}, static_cast<int>(sites.size()));
      if (fresh)
        sites.emplace_back(PyUnicode_AsUTF8(code->co_filename), line,
                           PyUnicode_AsUTF8(code->co_qualname));
      found = at->second;
    }
    Py_DECREF(code);
    PyFrameObject* back = found ? nullptr : PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = back;
  }
  return found;
}

void note(const std::string& kind, const std::string& what, int64_t bytes = 0) {
  if (!counting) return;
  int where = site();
  Lock lock(gate);
  Count& count = counts[{where, kind, what}];
  count.times += 1;
  count.bytes += bytes;
}

}  // namespace fake
