// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Stream transforms: what happens to an item's bytes between the torch.save archive and the file. Names follow
// torch.distributed.checkpoint._extension. Users choose them for a save and add their own for loads:
//
//   FileSystemWriter writer(dir, {.extensions = {std::make_shared<ZStandard>()}});       // _extensions=[ZStandard()]
//   FileSystemReader reader(dir);                                                        // knows ZStandard by itself
//   ExtensionRegistry registry;
//   registry.register_extension("stream.mine@example.org", [](std::string_view version) { ... });
//   FileSystemReader other(dir, {.extension_registry = registry});
//
// Each item is transformed by itself, and the catalogue says how: `transform_descriptors` of its place.

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "reshard/core/bytes.h"

namespace reshard {

/// Takes bytes, front to back. For one thread.
class ByteOutputStream {
 public:
  virtual ~ByteOutputStream() = default;
  /// Any number of bytes, which are borrowed for the call.
  virtual void write(ByteSpan bytes) = 0;
  /// Ends the stream: what is held back is written. Called once, last; does not finish what is written to.
  virtual void finish() = 0;
};

/// Gives bytes, front to back. For one thread.
class ByteInputStream {
 public:
  virtual ~ByteInputStream() = default;
  /// Fills the front of `out` and returns how many bytes that are: at least one, 0 only at the end of the stream.
  virtual size_t read(MutableByteSpan out) = 0;
};

/// A transform of streams: compression, encryption. Thread-safe; its streams need not be. Its memory must not grow with
/// the stream, and it must not believe what the stream says of its size.
class StreamTransformExtension {
 public:
  virtual ~StreamTransformExtension() = default;
  /// What the catalogue calls it: "name[@domain]/version". The registry finds it again by that.
  virtual std::string get_descriptor() const = 0;
  /// A stream that transforms what is written to it and writes that to `output`, which is borrowed.
  virtual std::unique_ptr<ByteOutputStream> transform_to(ByteOutputStream& output) const = 0;
  /// A stream that reads `input`, which is borrowed, and undoes transform_to(). It throws kCorruptData for input that
  /// transform_to() did not make, or that ends too early; key, file and offset are added by the caller.
  virtual std::unique_ptr<ByteInputStream> transform_from(ByteInputStream& input) const = 0;
};

/// In the order in which PyTorch takes them: what is saved passes the last one first.
using StreamTransformExtensions = std::vector<std::shared_ptr<const StreamTransformExtension>>;

/// Zstandard, "stream.zstd/1": one frame an item as PyTorch writes it, without content size and checksum. Reads any
/// number of frames one after the other, with windows of up to 128 MiB.
class ZStandard final : public StreamTransformExtension {
 public:
  static constexpr const char* kName = "stream.zstd";

  /// `level` as of the zstd library, 1 (fastest) to 22, negative ones faster still; kInvalidArgument for others.
  explicit ZStandard(int level = 3);
  int level() const { return level_; }
  std::string get_descriptor() const override { return std::string(kName) + "/1"; }
  std::unique_ptr<ByteOutputStream> transform_to(ByteOutputStream& output) const override;
  std::unique_ptr<ByteInputStream> transform_from(ByteInputStream& input) const override;

 private:
  int level_;
};

/// Which extension a descriptor of a catalogue means. Knows ZStandard from the start. Copies share nothing that changes.
class ExtensionRegistry {
 public:
  /// Makes the extension for a version: what stands behind the "/" of a descriptor, empty if there is none. Throws
  /// kUnsupported for a version that it does not read.
  using FromDescriptor = std::function<std::shared_ptr<const StreamTransformExtension>(std::string_view version)>;

  ExtensionRegistry();
  /// Adds an extension, or replaces the one of this name ("name[@domain]").
  void register_extension(std::string name, FromDescriptor from_descriptor);
  /// In the order of the descriptors. Throws kUnsupported for a name that is not registered.
  StreamTransformExtensions from_descriptor_list(std::span<const std::string> descriptors) const;

 private:
  std::map<std::string, FromDescriptor, std::less<>> extensions_;
};

}  // namespace reshard
