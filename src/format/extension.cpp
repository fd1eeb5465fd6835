// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/extension.h"

#include <zstd.h>

#include <utility>

namespace reshard {
namespace {

struct FreeZstd {
  void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
  void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
};

template <class Context>
std::unique_ptr<Context, FreeZstd> owned(Context* context) {
  if (context == nullptr) throw std::bad_alloc();
  return std::unique_ptr<Context, FreeZstd>(context);
}

class ZstdOutputStream final : public ByteOutputStream {
 public:
  ZstdOutputStream(ByteOutputStream& output, int level)
      : output_(output), context_(owned(ZSTD_createCCtx())), buffer_(ZSTD_CStreamOutSize()) {
    ZSTD_CCtx_setParameter(context_.get(), ZSTD_c_compressionLevel, level);
  }
  void write(ByteSpan bytes) override {
    ZSTD_inBuffer in{bytes.data(), bytes.size(), 0};
    while (in.pos < in.size) compress(in, ZSTD_e_continue);
  }
  void finish() override {
    ZSTD_inBuffer nothing{nullptr, 0, 0};
    while (compress(nothing, ZSTD_e_end) != 0) {
    }
  }

 private:
  size_t compress(ZSTD_inBuffer& in, ZSTD_EndDirective end) {
    ZSTD_outBuffer out{buffer_.data(), buffer_.size(), 0};
    const size_t left = ZSTD_compressStream2(context_.get(), &out, &in, end);
    if (ZSTD_isError(left) != 0) {
      throw Error(ErrorCode::kUnavailable, "zstd cannot compress", {.found = ZSTD_getErrorName(left)});
    }
    if (out.pos > 0) output_.write(ByteSpan(buffer_).first(out.pos));
    return left;
  }

  ByteOutputStream& output_;
  std::unique_ptr<ZSTD_CCtx, FreeZstd> context_;
  Bytes buffer_;
};

class ZstdInputStream final : public ByteInputStream {
 public:
  explicit ZstdInputStream(ByteInputStream& input) : input_(input), context_(owned(ZSTD_createDCtx())) {}

  size_t read(MutableByteSpan out) override {
    if (out.empty()) return 0;
    ZSTD_outBuffer to{out.data(), out.size(), 0};
    while (to.pos == 0) {
      if (in_.pos == in_.size) refill();
      if (at_end_ && !in_frame_) break;
      const size_t taken = in_.pos;
      const size_t left = ZSTD_decompressStream(context_.get(), &to, &in_);
      if (ZSTD_isError(left) != 0) fail("the stream is no zstd frame, or a damaged one", ZSTD_getErrorName(left));
      in_frame_ = left != 0;
      if (in_frame_ && at_end_ && to.pos == 0) fail("the zstd frame is cut off", "the end");
      consumed_ += in_.pos - taken;
    }
    return to.pos;
  }

 private:
  void refill() {
    if (at_end_) return;
    if (buffer_.empty()) buffer_.resize(kInputBytes);
    const size_t size = input_.read(buffer_);
    in_ = {buffer_.data(), size, 0};
    at_end_ = size == 0;
  }
  [[noreturn]] void fail(const char* what, const char* found) const {
    throw Error(ErrorCode::kCorruptData, what,
                {.found = std::string(found) + " after " + std::to_string(consumed_) + " bytes of it"});
  }

  static constexpr size_t kInputBytes = 256 << 10;  // two of the largest blocks
  ByteInputStream& input_;
  std::unique_ptr<ZSTD_DCtx, FreeZstd> context_;
  Bytes buffer_;
  ZSTD_inBuffer in_{nullptr, 0, 0};
  uint64_t consumed_ = 0;
  bool at_end_ = false;
  bool in_frame_ = false;
};

}  // namespace

ZStandard::ZStandard(int level) : level_(level) {
  if (level >= ZSTD_minCLevel() && level <= ZSTD_maxCLevel()) return;
  throw Error(ErrorCode::kInvalidArgument, "level of ZStandard",
              {.wanted = std::to_string(ZSTD_minCLevel()) + " to " + std::to_string(ZSTD_maxCLevel()),
               .found = std::to_string(level)});
}

std::unique_ptr<ByteOutputStream> ZStandard::transform_to(ByteOutputStream& output) const {
  return std::make_unique<ZstdOutputStream>(output, level_);
}

std::unique_ptr<ByteInputStream> ZStandard::transform_from(ByteInputStream& input) const {
  return std::make_unique<ZstdInputStream>(input);
}

ExtensionRegistry::ExtensionRegistry() {
  register_extension(ZStandard::kName, [](std::string_view version) {
    // A later minor version is readable, as PyTorch has it.
    if (version.substr(0, version.find('.')) != "1") {
      throw Error(ErrorCode::kUnsupported, "unknown version of a stream transform",
                  {.wanted = "stream.zstd/1", .found = "stream.zstd/" + std::string(version)});
    }
    return std::make_shared<ZStandard>();
  });
}

void ExtensionRegistry::register_extension(std::string name, FromDescriptor from_descriptor) {
  extensions_.insert_or_assign(std::move(name), std::move(from_descriptor));
}

StreamTransformExtensions ExtensionRegistry::from_descriptor_list(std::span<const std::string> descriptors) const {
  StreamTransformExtensions result;
  result.reserve(descriptors.size());
  for (const std::string& descriptor : descriptors) {
    const std::string_view text = descriptor;
    const size_t slash = text.find('/');
    const auto found = extensions_.find(text.substr(0, slash));
    if (found == extensions_.end()) {
      std::string known;
      for (const auto& [name, make] : extensions_) known += (known.empty() ? "" : ", ") + name;
      throw Error(ErrorCode::kUnsupported, "the item is stored with a stream transform that is not registered",
                  {.wanted = known, .found = descriptor});
    }
    result.push_back(found->second(slash == std::string_view::npos ? std::string_view() : text.substr(slash + 1)));
    if (result.back() == nullptr) {
      throw Error(ErrorCode::kInvalidArgument, "a registered stream transform makes nothing", {.found = descriptor});
    }
  }
  return result;
}

}  // namespace reshard
