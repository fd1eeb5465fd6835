// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/torch_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "support/expect_error.h"
#include "support/torch_files.h"

namespace reshard {
namespace {

using pickle::Tree;
using pickle::Value;
using testing::ElementsAre;

struct Flat {
  Bytes bytes;
  ValueArchive archive;
  std::vector<StateLeaf> leaves;
  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const StateLeaf& leaf : leaves) result.push_back((leaf.tensor ? "T " : "V ") + leaf.fqn);
    return result;
  }
};
Flat flatten_bytes(Bytes bytes) {
  Flat flat{std::move(bytes), {}, {}};
  flat.archive = decode_value_archive(MemorySource(flat.bytes));
  flat.leaves = flatten_archive(flat.archive);
  return flat;
}

TEST(TorchFileTest, FlattensByTheRuleOfPyTorch) {
  TorchFile file;
  const Value t = file.tensor(DType::kFloat32, {2}, counting(2));
  const Value root = file.dict({
      {"model", file.ordered_dict({{"w", t}, {"empty", file.dict({})}})},
      {"plain", file.tree.list({Tree::integer(1), Tree::integer(2)})},
      {"mixed", file.tree.list({Tree::integer(1), t, file.dict({{"x", Tree::none()}})})},
      {"nested", file.tree.list({file.tree.list({Tree::integer(1)}), file.tree.list({t})})},
      {"tuple", file.tree.tuple({t})},
      {"step", Tree::integer(7)},
  });
  const Flat flat = flatten_bytes(file.bytes(root));
  EXPECT_THAT(flat.names(), ElementsAre("T model.w", "V plain", "V mixed.0", "T mixed.1", "V mixed.2.x", "V nested.0",
                                        "T nested.1.0", "V tuple", "V step"));
  EXPECT_EQ(flat.leaves[3].path, (ObjectPath{"mixed", int64_t{1}}));
  EXPECT_EQ(flat.leaves[4].path, (ObjectPath{"mixed", int64_t{2}, "x"}));
}

TEST(TorchFileTest, KeysBecomeTextAsInPython) {
  TorchFile file;
  const Value root = file.tree.dict({{Tree::integer(-3), Tree::none()},
                                     {Tree::boolean(true), Tree::none()},
                                     {Tree::none(), Tree::none()},
                                     {Tree::real(0.1), Tree::none()},
                                     {Tree::real(2), Tree::none()},
                                     {file.tree.str("ü"), Tree::none()}});
  EXPECT_THAT(flatten_bytes(file.bytes(root)).names(),
              ElementsAre("V -3", "V True", "V None", "V 0.1", "V 2.0", "V ü"));
}

TEST(TorchFileTest, ParametersAndBuffersAreTensors) {
  TorchFile file;
  const Value t = file.tensor(DType::kFloat32, {2}, counting(2));
  const Value hooks = file.call("collections", "OrderedDict", {});
  const Value root =
      file.dict({{"p", file.call("torch._utils", "_rebuild_parameter", {t, Tree::boolean(true), hooks})},
                 {"s", file.call("torch._utils", "_rebuild_parameter_with_state",
                                 {t, Tree::boolean(true), hooks, file.dict({})})},
                 {"b", file.call("torch._tensor", "_rebuild_from_type_v2",
                                 {t.as_object().callable, file.tree.global("torch", "Tensor"), t.as_object().args,
                                  file.dict({{"_is_buffer", Tree::boolean(true)}})})}});
  const Flat flat = flatten_bytes(file.bytes(root));
  ASSERT_THAT(flat.names(), ElementsAre("T p", "T s", "T b"));
  for (const StateLeaf& leaf : flat.leaves) EXPECT_EQ(leaf.tensor->sizes, Dims({2}));
  EXPECT_TRUE(flat.leaves[0].tensor->requires_grad);
}

TEST(TorchFileTest, RefusesByName) {
  const auto refused = [](ErrorCode code, const std::string& text, const auto& make) {
    TorchFile file;
    const Bytes bytes = file.bytes(make(file));
    EXPECT_ERROR(code, text, flatten_bytes(bytes));
  };
  refused(ErrorCode::kUnsupported, "does not hold a state dict; wanted a dict, found list",
          [](TorchFile& f) { return f.tree.list({f.tensor(DType::kFloat32, {1}, counting(1))}); });
  refused(ErrorCode::kUnsupported, "torch._utils._rebuild_sparse_tensor is not read; key a.sparse", [](TorchFile& f) {
    return f.dict({{"a", f.dict({{"sparse", f.call("torch._utils", "_rebuild_sparse_tensor", {})}})}});
  });
  refused(ErrorCode::kUnsupported, "torch._utils._rebuild_qtensor is not read; key q", [](TorchFile& f) {
    return f.dict({{"q", f.call("torch._utils", "_rebuild_qtensor", {})}});
  });
  refused(ErrorCode::kUnsupported, "a tensor of a class of its own; key d; found torchao.Float8Tensor",
          [](TorchFile& f) {
            return f.dict({{"d", f.call("torch._tensor", "_rebuild_from_type_v2",
                                        {f.tree.global("torch._utils", "_rebuild_tensor_v2"),
                                         f.tree.global("torchao", "Float8Tensor"), f.tree.tuple({}), f.dict({})})}});
          });
  refused(ErrorCode::kUnsupported, "a key of a dict has no name; key outer", [](TorchFile& f) {
    return f.dict({{"outer", f.tree.dict({{f.tree.tuple({Tree::integer(1)}), Tree::none()}})}});
  });
  refused(ErrorCode::kUnsupported, "the same flattened name; key a.b", [](TorchFile& f) {
    return f.dict({{"a", f.dict({{"b", Tree::none()}})}, {"a.b", Tree::none()}});
  });
  // 40 levels of a dict that holds the one below it twice: no leaf list is made of that.
  refused(ErrorCode::kUnsupported, "too large when shared parts are copied", [](TorchFile& f) {
    Value v = f.dict({{"leaf", Tree::none()}});
    for (int i = 0; i < 40; ++i) v = f.dict({{"a", v}, {"b", v}});
    return v;
  });
  refused(ErrorCode::kUnsupported, "the names of a state dict unfold out of proportion", [](TorchFile& f) {
    Value v = f.dict({{"leaf", Tree::none()}});
    for (int i = 0; i < 16; ++i) v = f.dict({{"a", v}, {"b", v}});
    return v;
  });
}

TEST(TorchFileTest, AValueIsExtractedWithItsStoragesAlone) {
  TorchFile file;
  const Value a = file.tensor(DType::kFloat32, {2}, counting(2));
  const Value b = file.tensor(DType::kFloat32, {3}, counting(3, 10));
  const Value both = file.tree.tuple({b, Tree::integer(1), b});
  const Flat flat = flatten_bytes(file.bytes(file.dict({{"a", a}, {"both", both}})));
  EXPECT_THAT(referenced_storages(flat.leaves[1].value), ElementsAre("1"));
  const Bytes alone = extract_value(flat.archive, flat.leaves[1].value, MemorySource(flat.bytes));
  verify_archive(MemorySource(alone));
  const ValueArchive back = decode_value_archive(MemorySource(alone));
  ASSERT_EQ(back.root().items().size(), 3u);
  const auto item = back.as_tensor(back.root().items()[2]);
  ASSERT_TRUE(item);
  const Bytes wanted = counting(3, 10);
  EXPECT_TRUE(std::ranges::equal(ByteSpan(alone).subspan(item->payload_offset, item->payload_size), wanted));
  EXPECT_FALSE(back.storage("0"));
}

TEST(TorchFileTest, NestsLeavesByTheirPaths) {
  Tree tree;
  const Value root = nest(tree, {{{"b", "x"}, Tree::integer(1)},
                                 {{"l", int64_t{2}}, Tree::integer(2)},
                                 {{"l", int64_t{0}, "y"}, Tree::integer(3)},
                                 {{"b", "z"}, Tree::integer(4)}});
  ASSERT_EQ(root.entries().size(), 2u);
  EXPECT_EQ(root.entries()[0].key.as_str(), "b");
  EXPECT_EQ(root.entries()[0].value.entries()[1].value.as_int(), 4);
  const auto list = root.entries()[1].value.items();
  ASSERT_EQ(list.size(), 3u);
  EXPECT_EQ(list[0].entries()[0].value.as_int(), 3);
  EXPECT_TRUE(list[1].is_none());
  EXPECT_EQ(list[2].as_int(), 2);
}

TEST(TorchFileTest, PathsThatContradictEachOtherAreCorrupt) {
  Tree tree;
  const Value one = Tree::integer(1);
  const auto nested = [&](std::vector<NestedLeaf> leaves) { return nest(tree, leaves); };
  EXPECT_ERROR(ErrorCode::kCorruptData, "something else is in the way of a value; key a.b",
               nested({{{"a"}, one}, {{"a", "b"}, one}}));
  EXPECT_ERROR(ErrorCode::kCorruptData, "something else is in the way of a value; key a",
               nested({{{"a", "b"}, one}, {{"a"}, one}}));
  EXPECT_ERROR(ErrorCode::kCorruptData, "in the way", nested({{{"a", "b"}, one}, {{"a", int64_t{0}}, one}}));
  EXPECT_ERROR(ErrorCode::kCorruptData, "in the way", nested({{{"a"}, one}, {{"a"}, one}}));
  EXPECT_ERROR(ErrorCode::kCorruptData, "in the way", nested({{{"a", int64_t{-1}}, one}}));
  EXPECT_ERROR(ErrorCode::kCorruptData, "an absurd list position; key a.1099511627776",
               nested({{{"a", int64_t{1} << 40}, one}}));
  EXPECT_ERROR(ErrorCode::kCorruptData, "empty or too deep", nested({{{}, one}}));
  EXPECT_ERROR(ErrorCode::kCorruptData, "empty or too deep", nested({{ObjectPath(401, "a"), one}}));
}

TEST(TorchFileTest, ArchivesAreWrittenInPieces) {
  Tree tree;
  Bytes out;
  const Bytes content = counting(1000);
  const Value root = make_tensor_value(tree, DType::kFloat32, {1000}, 0);
  TorchArchiveWriter writer(root, [&](ByteSpan bytes) { out.insert(out.end(), bytes.begin(), bytes.end()); });
  EXPECT_ERROR(ErrorCode::kInternal, "more bytes than the record has", writer.write(content));
  writer.begin_storage("0", content.size());
  EXPECT_ERROR(ErrorCode::kInternal, "record data/0 is not complete", writer.begin_storage("1", 1));
  for (size_t at = 0; at < content.size(); at += 7) {
    writer.write(ByteSpan(content).subspan(at, std::min<size_t>(7, content.size() - at)));
  }
  writer.finish();
  EXPECT_EQ(out, encode_value_archive(root, std::vector<ByteSpan>{content}));
}

/// An archive of some GiB of zeros: only what is not of its storages is kept.
class HugeArchive final : public ByteSource {
 public:
  void zeros(TorchArchiveWriter& writer, uint64_t bytes) {
    const Bytes block(16 << 20);
    in_storage_ = true;
    for (uint64_t done = 0; done < bytes; done += block.size()) {
      writer.write(ByteSpan(block).first(static_cast<size_t>(std::min<uint64_t>(block.size(), bytes - done))));
    }
    in_storage_ = false;
  }
  void add(ByteSpan bytes) {
    // The last piece of a storage is followed by its descriptor, which is smaller than any piece of a storage here.
    const bool is_content = in_storage_ && bytes.size() > 64;
    if (!is_content) kept_[size_] = Bytes(bytes.begin(), bytes.end());
    size_ += bytes.size();
  }
  uint64_t size() const override { return size_; }
  void read(uint64_t offset, MutableByteSpan out) const override {
    std::ranges::fill(out, std::byte{0});
    for (auto it = kept_.begin(); it != kept_.end() && it->first < offset + out.size(); ++it) {
      for (size_t i = 0; i < it->second.size(); ++i) {
        const uint64_t at = it->first + i;
        if (at >= offset && at - offset < out.size()) out[static_cast<size_t>(at - offset)] = it->second[i];
      }
    }
  }

 private:
  bool in_storage_ = false;
  uint64_t size_ = 0;
  std::map<uint64_t, Bytes> kept_;
};

TEST(TorchFileTest, StoragesPastFourGiBAreZip64) {
  constexpr uint64_t kHuge = (uint64_t{4} << 30) + 4096;
  TorchFile file;
  Tree& tree = file.tree;
  const Value root = file.dict({{"huge", make_tensor_value(tree, DType::kUInt8, {static_cast<int64_t>(kHuge)}, 0)},
                                {"after", make_tensor_value(tree, DType::kFloat32, {1024}, 1)}});
  HugeArchive archive;
  TorchArchiveWriter writer(root, [&](ByteSpan bytes) { archive.add(bytes); });
  writer.begin_storage("0", kHuge);
  archive.zeros(writer, kHuge);
  writer.begin_storage("1", 4096);
  writer.write(counting(1024));
  writer.finish();
  EXPECT_GT(archive.size(), kHuge + 4096);

  const ValueArchive back = decode_value_archive(archive);
  const auto leaves = flatten_archive(back);
  ASSERT_EQ(leaves.size(), 2u);
  EXPECT_EQ(leaves[0].tensor->payload_size, kHuge);
  EXPECT_GT(leaves[1].tensor->payload_offset, kHuge);
  EXPECT_EQ(leaves[1].tensor->payload_offset % 64, 0u);
  Bytes elements(4096);
  archive.read(leaves[1].tensor->payload_offset, elements);
  EXPECT_EQ(elements, counting(1024));
}

}  // namespace
}  // namespace reshard
