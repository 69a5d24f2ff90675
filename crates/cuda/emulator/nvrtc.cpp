// A stand-in for libnvrtc.so.13: its machine code names the file and the architecture, which the stand-in driver reads.
//
// With PHALANX_EMULATED_FAULT=compile it refuses every source.
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
enum Result : int { SUCCESS = 0, INVALID_INPUT = 3, INVALID_PROGRAM = 4, COMPILATION = 6 };

struct Program {
  std::string name, log, code;
  int headers;
};

bool refuses() {
  const char* fault = std::getenv("PHALANX_EMULATED_FAULT");
  return fault && std::strcmp(fault, "compile") == 0;
}

int size(const std::string& text, size_t* bytes) {
  *bytes = text.size() + 1;
  return SUCCESS;
}
int read(const std::string& text, char* to) {
  std::memcpy(to, text.c_str(), text.size() + 1);
  return SUCCESS;
}
}  // namespace

EXPORT int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return SUCCESS;
}

EXPORT int nvrtcGetNumSupportedArchs(int* count) {
  *count = 3;
  return SUCCESS;
}
EXPORT int nvrtcGetSupportedArchs(int* archs) {
  archs[0] = 80;
  archs[1] = 90;
  archs[2] = 100;
  return SUCCESS;
}

EXPORT const char* nvrtcGetErrorString(int result) {
  switch (result) {
    case SUCCESS: return "NVRTC_SUCCESS";
    case INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
    case INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
    case COMPILATION: return "NVRTC_ERROR_COMPILATION";
    default: return "NVRTC_ERROR unknown";
  }
}

EXPORT int nvrtcCreateProgram(Program** out, const char* source, const char* name, int headers, const char* const* texts,
                              const char* const* names) {
  if (!source || !out || (headers > 0 && (!texts || !names))) return INVALID_INPUT;
  std::string file = name ? name : "default_program";
  *out = new Program{file.substr(0, file.rfind('.')), "", "", headers};
  return SUCCESS;
}

EXPORT int nvrtcDestroyProgram(Program** program) {
  if (!program || !*program) return INVALID_PROGRAM;
  delete *program;
  *program = nullptr;
  return SUCCESS;
}

EXPORT int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
  if (!program) return INVALID_PROGRAM;
  if (refuses()) {
    program->log = program->name + ".cu(1): error: refused, as the test asked";
    return COMPILATION;
  }
  program->code = "phalanx emulated code\nname " + program->name + "\n";
  for (int i = 0; i < count; ++i) {
    for (const char* key : {"--gpu-architecture=", "-arch="}) {
      if (std::strncmp(options[i], key, std::strlen(key)) == 0) {
        program->code += std::string("arch ") + (options[i] + std::strlen(key)) + "\n";
      }
    }
  }
  return SUCCESS;
}

EXPORT int nvrtcGetProgramLogSize(Program* p, size_t* bytes) { return p ? size(p->log, bytes) : int(INVALID_PROGRAM); }
EXPORT int nvrtcGetProgramLog(Program* p, char* to) { return p ? read(p->log, to) : int(INVALID_PROGRAM); }
EXPORT int nvrtcGetCUBINSize(Program* p, size_t* bytes) { return p ? size(p->code, bytes) : int(INVALID_PROGRAM); }
EXPORT int nvrtcGetCUBIN(Program* p, char* to) { return p ? read(p->code, to) : int(INVALID_PROGRAM); }
EXPORT int nvrtcGetPTXSize(Program* p, size_t* bytes) { return p ? size(p->code, bytes) : int(INVALID_PROGRAM); }
EXPORT int nvrtcGetPTX(Program* p, char* to) { return p ? read(p->code, to) : int(INVALID_PROGRAM); }
EXPORT int nvrtcAddNameExpression(Program*, const char*) { return SUCCESS; }
