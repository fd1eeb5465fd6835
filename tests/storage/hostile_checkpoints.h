// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Checkpoints that lie: each a good one with one defect, and the error that says so. storage_test puts them before the reader and verify,
// cli_test before the command.

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "format/catalogue_builder.h"
#include "format/zip_builder.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/format/sidecar.h"
#include "storage/checkpoint_runs.h"
#include "support/oracle.h"
#include "support/temporary_directory.h"

namespace reshard {

/// A checkpoint of two ranks: "weight" [6, 4] in two halves, "bias" [5], the value "step".
class GoodCheckpoint {
 public:
  GoodCheckpoint() {
    std::filesystem::create_directory(path());
    std::vector<MemorySaveState> ranks;
    for (const auto& mine : split({6, 4}, 0, 2)) {
      ranks.push_back(MemorySaveState({tensor_entry("weight", {6, 4}, mine), replica_entry("bias", {5})}));
      ranks.back().add_value("step", value_archive("seven"));
    }
    save_id_ = save_checkpoint(path(), ranks).save_id;
  }
  /// In a directory of its own, so that a file beside it is outside.
  std::string path() const { return parent_ / "checkpoint"; }
  std::string operator/(const std::string& name) const { return path() + "/" + name; }
  std::string outside(const std::string& name) const { return parent_ / name; }
  std::string sidecar(int rank) const { return *this / sidecar_name(save_id_, rank); }
  static std::vector<StateEntry> entries() {
    return {replica_entry("weight", {6, 4}), replica_entry("bias", {5}), bytes_entry("step", 0)};
  }

  static void write(const std::string& path, ByteSpan bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc)
        .write(as_text(bytes).data(), static_cast<std::streamsize>(bytes.size()));
  }
  void edit(const std::function<void(Metadata&)>& change) const {
    Metadata metadata = decode_metadata(read_test_file(*this / ".metadata"));
    change(metadata);
    write(*this / ".metadata", encode_metadata(metadata));
  }
  /// An item in a file of its own that holds `archive`, in a checkpoint that has no sidecars, as PyTorch's have none.
  void replace_item(const MetadataIndex& index, ByteSpan archive) const {
    write(*this / "evil.distcp", archive);
    edit([&](Metadata& m) {
      *m.storage_data.find(index) = {"evil.distcp", 0, archive.size(), {}};
      m.sidecars.reset();
    });
  }

 private:
  TemporaryDirectory parent_;
  std::string save_id_;
};

/// Who sees it. What the catalogue's reader sees, everything sees.
enum class SeenBy : uint8_t {
  kCatalogue,  // read_metadata throws
  kLoad,       // a load throws, verify reports
  kVerify,     // verify reports
};

struct HostileCheckpoint {
  const char* name;
  SeenBy seen_by;
  ErrorCode code;
  const char* text;  // in the error
  std::function<void(const GoodCheckpoint&)> damage;
};
inline void PrintTo(const HostileCheckpoint& hostile, std::ostream* out) { *out << hostile.name; }

namespace hostile {

inline const MetadataIndex kBias{"bias", Dims{0}, {}};
inline const MetadataIndex kStep{"step", {}, {}};
inline const MetadataIndex kSecondHalf{"weight", Dims{3, 0}, {}};

using Damage = std::function<void(const GoodCheckpoint&)>;

inline void make_socket(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  ASSERT_LT(path.size(), sizeof address.sun_path);
  std::ranges::copy(path, address.sun_path);
  const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
  ASSERT_EQ(::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ::close(fd);
}

/// Something else than a regular file in place of the file that `path` gives.
inline Damage directory_at(std::function<std::string(const GoodCheckpoint&)> path) {
  return [=](const GoodCheckpoint& c) {
    std::filesystem::remove(path(c));
    std::filesystem::create_directory(path(c));
  };
}
inline Damage fifo_at(std::function<std::string(const GoodCheckpoint&)> path) {
  return [=](const GoodCheckpoint& c) {
    std::filesystem::remove(path(c));
    ASSERT_EQ(::mkfifo(path(c).c_str(), 0600), 0);
  };
}
inline Damage socket_at(std::function<std::string(const GoodCheckpoint&)> path) {
  return [=](const GoodCheckpoint& c) {
    std::filesystem::remove(path(c));
    make_socket(path(c));
  };
}
/// The whole, right file, but outside.
inline Damage link_at(std::function<std::string(const GoodCheckpoint&)> path) {
  return [=](const GoodCheckpoint& c) {
    std::filesystem::rename(path(c), c.outside("elsewhere"));
    std::filesystem::create_symlink(c.outside("elsewhere"), path(c));
  };
}
inline std::string catalogue_of(const GoodCheckpoint& c) { return c / ".metadata"; }
inline std::string data_of(const GoodCheckpoint& c) { return c / "__1_0.distcp"; }
inline std::string sidecar_of(const GoodCheckpoint& c) { return c.sidecar(1); }

inline Damage edit(std::function<void(Metadata&)> change) {
  return [=](const GoodCheckpoint& c) { c.edit(change); };
}
inline Damage edit_weight(std::function<void(TensorStorageMetadata&)> change) {
  return edit([=](Metadata& m) { change(std::get<TensorStorageMetadata>(*m.state_dict_metadata.find("weight"))); });
}
inline Damage edit_place(const MetadataIndex& index, std::function<void(StorageInfo&)> change) {
  return edit([=](Metadata& m) { change(*m.storage_data.find(index)); });
}
inline Damage path_of_data(std::string path) {
  return edit_place(kSecondHalf, [=](StorageInfo& place) { place.relative_path = path; });
}
/// The second half of the weight under other offsets.
inline Damage move_second_half(const Dims& to) {
  return edit([=](Metadata& m) {
    std::get<TensorStorageMetadata>(*m.state_dict_metadata.find("weight")).chunks.at(1).offsets = to;
    decltype(m.storage_data) items;
    for (const auto& [index, info] : m.storage_data)
      items.insert(index == kSecondHalf ? MetadataIndex{"weight", to, 1} : index, info);
    m.storage_data = items;
  });
}
inline Damage without_second_half() {
  return edit([](Metadata& m) {
    std::get<TensorStorageMetadata>(*m.state_dict_metadata.find("weight")).chunks.pop_back();
    decltype(m.storage_data) items;
    for (const auto& [index, info] : m.storage_data) {
      if (!(index == kSecondHalf)) items.insert(index, info);
    }
    m.storage_data = items;
  });
}
inline Damage catalogue(std::string_view stream) {
  const std::string text(stream);
  return [=](const GoodCheckpoint& c) { c.write(c / ".metadata", as_bytes(text)); };
}
inline Damage built_catalogue(std::function<void(CatalogueBuilder&)> change) {
  return [=](const GoodCheckpoint& c) {
    CatalogueBuilder b;
    change(b);
    c.write(c / ".metadata", b.encode());
  };
}
/// "step" is the archive of this pickle.
inline Damage value_of(std::string_view stream) {
  const std::string text(stream);
  return [=](const GoodCheckpoint& c) {
    c.replace_item(kStep, build_zip({{"a/data.pkl", bytes_of(text)}, {"a/version", bytes_of("3\n")}}));
  };
}
/// "bias" is an archive whose records were changed.
inline Damage bias_archive(std::function<void(std::vector<ZipRecord>&)> change,
                           std::function<void(Bytes&)> edit_end = nullptr) {
  return [=](const GoodCheckpoint& c) {
    pickle::Tree tree;
    std::vector<ZipRecord> records = {{"a/data.pkl", pickle::write(make_tensor_value(tree, DType::kFloat32, {5}, 0))},
                                      {"a/data/0", Bytes(20)},
                                      {"a/version", bytes_of("3\n")}};
    change(records);
    c.replace_item(kBias, build_zip(records, edit_end));
  };
}
inline Damage bias_pickle(std::function<pickle::Value(pickle::Tree&)> make) {
  return bias_archive([=](std::vector<ZipRecord>& records) {
    pickle::Tree tree;
    records[0].content = pickle::write(make(tree));
  });
}
template <class T>
std::function<void(Bytes&)> set(size_t at, T value) {
  return [=](Bytes& bytes) { poke<T>(bytes, at, value); };
}
inline Damage edit_sidecar(std::function<void(Sidecar&)> change) {
  return [=](const GoodCheckpoint& c) {
    Sidecar sidecar = decode_sidecar(read_test_file(c.sidecar(1)));
    change(sidecar);
    const Bytes file = encode_sidecar(sidecar);
    c.write(c.sidecar(1), file);
    c.edit([&](Metadata& m) { m.sidecars->at(1) = sidecar_digest(file); });
  };
}

}  // namespace hostile

inline std::vector<HostileCheckpoint> hostile_checkpoints() {
  using namespace hostile;
  constexpr auto kCorrupt = ErrorCode::kCorruptData;
  constexpr auto kUnsupported = ErrorCode::kUnsupported;
  constexpr auto kNotFound = ErrorCode::kNotFound;
  constexpr auto kMax = std::numeric_limits<int64_t>::max();
  using enum SeenBy;
  return {
      // .metadata is no file, or none of ours
      {"CatalogueIsADirectory", kCatalogue, kCorrupt, "found a directory", directory_at(catalogue_of)},
      {"CatalogueIsAFifo", kCatalogue, kCorrupt, "found a FIFO", fifo_at(catalogue_of)},
      {"CatalogueIsASocket", kCatalogue, kCorrupt, "found a socket", socket_at(catalogue_of)},
      {"CatalogueIsALink", kCatalogue, kCorrupt, "found a symbolic link", link_at(catalogue_of)},
      {"CatalogueIsEmpty", kCatalogue, kCorrupt, "ends too early", catalogue("")},
      {"CatalogueIsTooLong", kCatalogue, kCorrupt, "the file is too long",
       [](const GoodCheckpoint& c) { std::filesystem::resize_file(c / ".metadata", kMaxMetadataBytes + 1); }},
      {"CatalogueIsCutOff", kCatalogue, kCorrupt, "pickle: frame is longer than the stream",
       [](const GoodCheckpoint& c) {
         std::filesystem::resize_file(c / ".metadata", std::filesystem::file_size(c / ".metadata") / 2);
       }},
      {"CatalogueIsAnArchive", kCatalogue, kUnsupported, "opcode PERSID", catalogue("PK\3\4 and more")},
      {"CatalogueIsAnotherValue", kCatalogue, kCorrupt, "wanted Metadata, found dict", catalogue("\x80\x02}.")},
      {"CatalogueNestsAMillionDeep", kCatalogue, kCorrupt, "wanted Metadata, found list",
       catalogue(std::string(1'000'000, ']') + std::string(999'999, 'a') + ".")},
      // code
      {"CatalogueRunsACommand", kCatalogue, kUnsupported, "calls posix.system",
       catalogue("\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.")},
      {"CatalogueEvaluates", kCatalogue, kUnsupported, "calls builtins.eval",
       catalogue("\x80\x04\x8c\x08"
                 "builtins\x8c\x04"
                 "eval\x93\x8c\x03"
                 "1+1\x85R.")},
      {"CatalogueRunsACommandOnTheSide", kCatalogue, kUnsupported, "calls os.system", built_catalogue([](auto& b) {
         b.more_attributes = {{b.tree.str("more"), b.call("os", "system", {b.tree.str("true")})}};
       })},
      {"CatalogueCallsAnything", kCatalogue, kCorrupt, "wanted Metadata, found their.function",
       catalogue("ctheir\nfunction\n)R.")},
      {"ValueRunsACommand", kVerify, kUnsupported, "calls posix.system",
       value_of("cposix\nsystem\n\x8c\x04true\x85R.")},
      {"TensorRunsACommand", kLoad, kUnsupported, "calls posix.system",
       bias_archive([](auto& records) { records[0].content = bytes_of("cposix\nsystem\n\x8c\x04true\x85R."); })},
      {"TensorCallsAnything", kLoad, kCorrupt, "wanted a tensor, found their.function",
       bias_archive([](auto& records) { records[0].content = bytes_of("ctheir\nfunction\n)R."); })},
      // values that unfold
      {"ValueIsACycle", kVerify, kUnsupported, "a cycle", value_of({"]q\0h\0a.", 7})},
      {"ValueNestsTooDeep", kVerify, kUnsupported, "nested too deep",
       value_of(std::string(100'000, ']') + std::string(99'999, 'a') + ".")},
      {"ValueDoublesWithoutEnd", kVerify, kUnsupported, "too large when shared parts are copied", value_of([] {
         std::string text = "N";  // x = (x, x), sixty times
         for (int i = 0; i < 60; ++i) text += "2\x86";
         return text + ".";
       }())},
      // numbers of the catalogue
      {"SizeIsNegative", kCatalogue, kCorrupt, "key weight", edit_weight([](auto& w) { w.size[0] = -6; })},
      {"SizeOverflows", kCatalogue, kCorrupt, "overflows; key weight", edit_weight([](auto& w) {
         w.size = {kMax, kMax};
       })},
      {"BytesOverflow", kCatalogue, kCorrupt, "overflows; key weight", edit_weight([](auto& w) {
         w.size = {kMax / 2, 1};
       })},
      {"SizeIsNotANumber", kCatalogue, kCorrupt, "wanted int, found float", built_catalogue([](auto& b) {
         b.size = b.tree.tuple({pickle::Tree::real(std::numeric_limits<double>::quiet_NaN())});
       })},
      {"TooManyDimensions", kCatalogue, kCorrupt, "too many dimensions",
       edit_weight([](auto& w) { w.size = Dims(65, 1); })},
      {"ChunkHasOtherDimensions", kCatalogue, kCorrupt, "lies outside its tensor",
       edit_weight([](auto& w) { w.chunks[1].sizes = {3}; })},
      {"ChunkOffsetIsNegative", kCatalogue, kCorrupt, "lies outside its tensor", move_second_half({-3, 0})},
      {"ChunkLeavesItsTensor", kCatalogue, kCorrupt, "lies outside its tensor", move_second_half({4, 0})},
      {"ChunkSizeOverflows", kCatalogue, kCorrupt, "lies outside its tensor", edit_weight([](auto& w) {
         w.chunks[1].sizes = {kMax, 4};
       })},
      {"SidecarDigestIsCutOff", kCatalogue, kCorrupt, "digests of the sidecars", built_catalogue([](auto& b) {
         b.more_attributes = {{b.tree.str("reshard_sidecars"), b.tree.bytes(Bytes(31))}};
       })},
      {"KeyIsThereTwice", kCatalogue, kCorrupt, "key is there twice; key w", built_catalogue([](auto& b) {
         b.more_entries = {{b.tree.str("w"), b.tensor()}};
       })},
      {"ItemIsThereTwice", kCatalogue, kCorrupt, "item is there twice; key w", built_catalogue([](auto& b) {
         b.more_storage = {{b.index("w", {{2}}), b.info("f", 0)}};
       })},
      {"ChunkIsStoredNowhere", kCatalogue, kCorrupt, "nothing is stored for weight [3, 0]", edit([](Metadata& m) {
         decltype(m.storage_data) items;
         for (const auto& [index, info] : m.storage_data) {
           if (!(index == kSecondHalf)) items.insert(index, info);
         }
         m.storage_data = items;
       })},
      {"ItemOfNoKey", kCatalogue, kCorrupt, "an item that is not in the catalogue", edit([](Metadata& m) {
         m.storage_data.insert({"ghost", {}, {}}, {"__0_0.distcp", 0, 1, {}});
       })},
      // chunks that do not make the tensor
      {"ChunkIsMissing", kLoad, kCorrupt, "key weight", without_second_half()},
      {"ChunksOverlap", kLoad, kCorrupt, "key weight", move_second_half({2, 0})},
      {"ChunkIsThereTwice", kLoad, kCorrupt, "key weight",
       edit_weight([](auto& w) { w.chunks.push_back(w.chunks.back()); })},
      // paths
      {"PathIsAbsolute", kCatalogue, kCorrupt, "is absolute; key weight", path_of_data("/etc/passwd")},
      {"PathLeavesTheDirectory", kCatalogue, kCorrupt, "leaves the checkpoint's directory; key weight",
       path_of_data("../elsewhere")},
      {"PathLeavesTheDirectoryLater", kCatalogue, kCorrupt, "leaves the checkpoint's directory",
       path_of_data("a/../../b")},
      {"PathIsEmpty", kCatalogue, kCorrupt, "path of a data file is empty", path_of_data("")},
      {"PathIsADot", kCatalogue, kCorrupt, "has the component '.'", path_of_data("./__1_0.distcp")},
      {"PathHasANul", kCatalogue, kCorrupt, "holds a NUL byte", path_of_data({"__1_0.distcp\0x", 14})},
      {"PathHasABackslash", kCatalogue, kCorrupt, "holds a backslash", path_of_data("..\\elsewhere")},
      {"PathGoesThroughALink", kLoad, kCorrupt, "sub",
       [](const GoodCheckpoint& c) {
         std::filesystem::create_directory(c.outside("dir"));
         std::filesystem::rename(c / "__1_0.distcp", c.outside("dir") + "/__1_0.distcp");
         std::filesystem::create_directory_symlink(c.outside("dir"), c / "sub");
         c.edit([](Metadata& m) {
           for (auto& [index, place] : m.storage_data) {
             if (place.relative_path == "__1_0.distcp") place.relative_path = "sub/__1_0.distcp";
           }
         });
       }},
      {"PathIsTooLong", kLoad, ErrorCode::kIo, "File name too long", path_of_data(std::string(300, 'x'))},
      // data files
      {"DataIsMissing", kLoad, kNotFound, "__1_0.distcp",
       [](const GoodCheckpoint& c) { std::filesystem::remove(data_of(c)); }},
      {"DataIsEmpty", kLoad, kCorrupt, "the file's size is not the one of its sidecar",
       [](const GoodCheckpoint& c) { std::filesystem::resize_file(data_of(c), 0); }},
      {"DataIsShort", kLoad, kCorrupt, "the file's size is not the one of its sidecar",
       [](const GoodCheckpoint& c) {
         std::filesystem::resize_file(data_of(c), std::filesystem::file_size(data_of(c)) - 1);
       }},
      {"DataWithoutSidecarIsShort", kLoad, kCorrupt, "ends before the item",
       [](const GoodCheckpoint& c) {
         std::filesystem::resize_file(data_of(c), std::filesystem::file_size(data_of(c)) - 1);
         c.edit([](Metadata& m) { m.sidecars.reset(); });
       }},
      {"DataIsADirectory", kLoad, kCorrupt, "found a directory", directory_at(data_of)},
      {"DataIsAFifo", kLoad, kCorrupt, "found a FIFO", fifo_at(data_of)},
      {"DataIsASocket", kLoad, kCorrupt, "found a socket", socket_at(data_of)},
      {"DataIsALink", kLoad, kCorrupt, "found a symbolic link", link_at(data_of)},
      // places
      {"PlaceOverflows", kCatalogue, kCorrupt, "byte range of",
       edit_place(kBias,
                  [](StorageInfo& place) {
                    place.offset = static_cast<uint64_t>(kMax);
                    place.length = 1;
                  })},
      {"PlaceIsPastTheEnd", kLoad, kCorrupt, "ends before the item",
       edit_place(kBias, [](StorageInfo& place) { place.offset = uint64_t{1} << 40; })},
      {"PlaceIsTooLong", kLoad, kCorrupt, "ends before the item",
       edit_place(kBias, [](StorageInfo& place) { place.length = uint64_t{1} << 40; })},
      {"PlaceIsEmpty", kLoad, kCorrupt, "too short for a zip archive",
       edit_place(kBias, [](StorageInfo& place) { place.length = 0; })},
      {"PlaceIsAnotherTensors", kLoad, kCorrupt, "not the one of the catalogue",
       edit([](Metadata& m) { *m.storage_data.find(kBias) = *m.storage_data.find(kSecondHalf); })},
      {"PlacesOverlap", kVerify, kCorrupt, "overlaps the one before", edit([](Metadata& m) {
         StorageInfo& place = *m.storage_data.find(kBias);
         place = *m.storage_data.find(kSecondHalf);
         place.offset += 8;
       })},
      {"TransformIsUnknown", kLoad, kUnsupported, "found stream.rot13/1",
       edit_place(kBias, [](StorageInfo& place) { place.transform_descriptors = {"stream.rot13/1"}; })},
      {"TransformIsALie", kLoad, kCorrupt, "no zstd frame",
       edit_place(kBias, [](StorageInfo& place) { place.transform_descriptors = {"stream.zstd/1"}; })},
      // archives
      {"ArchiveHasNoEnd", kLoad, kCorrupt, "no end record", bias_archive([](auto&) {}, set<uint32_t>(0, 0))},
      {"ArchiveCountsTooMany", kLoad, kCorrupt, "more records than",
       bias_archive([](auto&) {}, [](Bytes& end) { poke<uint16_t>(end, 8, 999), poke<uint16_t>(end, 10, 999); })},
      {"ArchiveIsEncrypted", kLoad, kUnsupported, "is encrypted",
       bias_archive([](auto& records) { records[1].edit_directory = set<uint16_t>(8, 1); })},
      {"ArchiveIsCompressed", kLoad, kUnsupported, "is compressed",
       bias_archive([](auto& records) { records[1].edit_directory = set<uint16_t>(10, 8); })},
      {"RecordsOverlap", kLoad, kCorrupt, "overlaps",
       bias_archive([](auto& records) { records[1].edit_directory = set<uint32_t>(42, 0); })},
      {"RecordsShareAName", kLoad, kCorrupt, "two records are named", bias_archive([](auto& records) {
         records.push_back({"a/DATA/0", Bytes(20)});
       })},
      {"RecordHasAnotherLocalName", kLoad, kCorrupt, "another name",
       bias_archive([](auto& records) { records[1].local_name = "a/data/1"; })},
      {"RecordIsMissing", kLoad, kCorrupt, "no record data/0",
       bias_archive([](auto& records) { records.erase(records.begin() + 1); })},
      {"RecordIsShort", kLoad, kCorrupt, "another size than its tensor",
       bias_archive([](auto& records) { records[1].content.resize(19); })},
      {"RecordDiffersFromItsSum", kLoad, kCorrupt, "CRC-32",
       bias_archive([](auto& records) { records[1].edit_directory = set<uint32_t>(16, 12345); })},
      // tensors
      {"TensorHasAnotherShape", kLoad, kCorrupt, "not the one of the catalogue", bias_pickle([](auto& tree) {
         return make_tensor_value(tree, DType::kFloat32, {1, 5}, 0);
       })},
      {"TensorHasAnotherType", kLoad, kCorrupt, "not the one of the catalogue",
       bias_pickle([](auto& tree) { return make_tensor_value(tree, DType::kInt32, {5}, 0); })},
      {"TensorIsLargerThanItsStorage", kLoad, kCorrupt, "another size than its tensor",
       bias_pickle([](auto& tree) { return make_tensor_value(tree, DType::kFloat32, {1'000'000}, 0); })},
      {"TensorIsAnotherValue", kLoad, kCorrupt, "wanted a tensor, found int",
       bias_pickle([](auto&) { return pickle::Tree::integer(5); })},
      // sidecars
      {"SidecarIsMissing", kLoad, kNotFound, "of rank 1 is missing",
       [](const GoodCheckpoint& c) { std::filesystem::remove(c.sidecar(1)); }},
      {"SidecarIsADirectory", kLoad, kCorrupt, "found a directory", directory_at(sidecar_of)},
      {"SidecarIsAFifo", kLoad, kCorrupt, "found a FIFO", fifo_at(sidecar_of)},
      {"SidecarIsALink", kLoad, kCorrupt, "found a symbolic link", link_at(sidecar_of)},
      {"SidecarIsEmpty", kLoad, kCorrupt, "sidecar: too short",
       [](const GoodCheckpoint& c) { std::filesystem::resize_file(c.sidecar(1), 0); }},
      {"SidecarIsTooLong", kLoad, kCorrupt, "the file is too long",
       [](const GoodCheckpoint& c) { std::filesystem::resize_file(c.sidecar(1), uint64_t{1} << 40); }},
      {"SidecarIsOfAnotherSave", kLoad, kCorrupt, "of another save or rank",
       edit_sidecar([](Sidecar& s) { s.save_id = "another"; })},
      {"SidecarLeavesTheDirectory", kLoad, kCorrupt, "leaves the checkpoint's directory",
       edit_sidecar([](Sidecar& s) { s.files.at(0).relative_path = "../elsewhere"; })},
  };
}

}  // namespace reshard
