// SPDX-License-Identifier: BSD-3-Clause
#include "distributed/cuda_module.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <sstream>

#include "reshard/core/error.h"

namespace reshard {
namespace {

std::vector<std::string> module_candidates() {
  constexpr const char* kName = "libreshard_cuda.so";
  std::vector<std::string> paths;
  if (const char* named = std::getenv("RESHARD_CUDA_MODULE")) paths.emplace_back(named);
  std::error_code ignored;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path();
  for (const char* beside : {"", "../lib"}) paths.push_back((program / beside / kName).string());
  std::stringstream built(RESHARD_CUDA_MODULE_DIRS);
  for (std::string dir; std::getline(built, dir, ':');) paths.push_back(dir + "/" + kName);
  paths.emplace_back(kName);
  return paths;
}

MakeNcclBackendFn open_module() {
  std::string tried;
  for (const std::string& path : module_candidates()) {
    // Never closed: torch_cuda registers itself process-wide.
    if (void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) {
      if (void* symbol = dlsym(handle, kMakeNcclBackendSymbol)) return reinterpret_cast<MakeNcclBackendFn>(symbol);
    }
    const char* why = dlerror();
    tried += "\n  " + path + ": " + (why ? why : "no such symbol");
  }
  throw Error(ErrorCode::kUnavailable,
              "the CUDA part of reshard cannot be loaded (is LibTorch a CUDA build?); tried:" + tried);
}

MakeNcclBackendFn module_entry() {
  static const MakeNcclBackendFn entry = open_module();
  return entry;
}

}  // namespace

void load_cuda_module() { module_entry(); }

c10::intrusive_ptr<c10d::Backend> make_nccl_backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                                    std::chrono::milliseconds timeout) {
  c10::intrusive_ptr<c10d::Backend> backend;
  module_entry()(store, rank, size, timeout, &backend);
  return backend;
}

}  // namespace reshard
