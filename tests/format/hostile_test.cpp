// SPDX-License-Identifier: BSD-3-Clause
// Every truncation and every changed byte of small files: the answer is a value or a named error, never anything else. Worth most under
// -DRESHARD_SANITIZE=address,undefined.

#include <gtest/gtest.h>

#include <random>

#include "reshard/format/crc32.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/format/strided_copy.h"
#include "reshard/format/torch_archive.h"
#include "support/oracle.h"

namespace reshard {
namespace {

using Read = std::function<void(ByteSpan)>;

// Runs the reader on damaged copies. An exception other than Error, or an allocation out of proportion (bad_alloc, length_error), fails.
class Damage {
 public:
  explicit Damage(Read read) : read_(std::move(read)) {}

  void truncations(const Bytes& good) {
    for (size_t n = 0; n < good.size(); ++n) attempt(ByteSpan(good).first(n));
  }
  void changed_bytes(const Bytes& good, std::initializer_list<int> changes) {
    Bytes bad = good;
    for (size_t i = 0; i < bad.size(); ++i) {
      for (const int change : changes) {
        bad[i] ^= static_cast<std::byte>(change);
        attempt(bad);
        bad[i] = good[i];
      }
    }
  }
  // Several changes at once, with values that parsers stumble over, and pieces moved about.
  void random_changes(const Bytes& good, int rounds, uint32_t seed) {
    std::mt19937 random(seed);
    static constexpr uint8_t kNasty[] = {0x00, 0xFF, 0x7F, 0x80, 0x01, '(', '.', 't',
                                         'u',  'R',  'b',  0x81, 0x94, 'h', 'Q', 0x8a};
    for (int round = 0; round < rounds; ++round) {
      Bytes bad = good;
      for (auto edits = random() % 6 + 1; edits > 0; --edits) {
        const size_t at = random() % bad.size();
        switch (random() % 4) {
          case 0:
            bad[at] = static_cast<std::byte>(kNasty[random() % std::size(kNasty)]);
            break;
          case 1:
            bad[at] = static_cast<std::byte>(random());
            break;
          case 2:
            bad.erase(bad.begin() + static_cast<std::ptrdiff_t>(at));
            break;
          default: {
            const size_t from = random() % bad.size();
            const size_t n = std::min<size_t>({random() % 16 + 1, bad.size() - at, bad.size() - from});
            std::memmove(&bad[at], &bad[from], n);
          }
        }
        if (bad.empty()) bad.push_back({});
      }
      attempt(bad);
    }
  }
  size_t read() const { return passed_; }
  size_t refused() const { return refused_; }

 private:
  void attempt(ByteSpan bytes) {
    const std::vector<std::byte> exact(bytes.begin(),
                                       bytes.end());  // its end is the allocation's end: reading past it is seen
    try {
      read_(exact);
      ++passed_;
    } catch (const Error& error) {
      ++refused_;
      const bool fits = error.code() == ErrorCode::kCorruptData || error.code() == ErrorCode::kUnsupported;
      EXPECT_TRUE(fits) << error.what();
    }
  }
  Read read_;
  size_t passed_ = 0;
  size_t refused_ = 0;
};

void read_tensor(ByteSpan bytes) {
  const TensorItem item = read_tensor_item(MemorySource(bytes));
  const Box all = whole_box(item.sizes);
  const ByteRange range = payload_range(item, all);
  const int64_t size = volume(item.sizes) * element_size(item.dtype);
  if (size > 1 << 20) return;  // an expanded shape: legal, and the caller compares it with the catalogue first
  Bytes dense(static_cast<size_t>(size));
  copy_region(item, bytes.subspan(item.payload_offset + range.begin, range.end - range.begin), all, dense);
}
void read_value(ByteSpan bytes) {
  const ValueArchive archive = decode_value_archive(MemorySource(bytes));
  if (archive.root().kind() == pickle::Kind::kTuple) {
    for (const auto& item : archive.root().items()) archive.as_tensor(item);
  }
  pickle::write(archive.root());
}

Bytes small_tensor() {
  const TensorArchive archive(DType::kInt16, {2, 3});
  Bytes bytes = archive.head();
  const Bytes payload(12, std::byte{5});
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  const Bytes tail = archive.tail(crc32(payload));
  bytes.insert(bytes.end(), tail.begin(), tail.end());
  return bytes;
}
Bytes small_value() {
  pickle::Tree tree;
  const Bytes payload(4, std::byte{1});
  const std::vector<ByteSpan> storages = {payload};
  const auto value =
      tree.tuple({make_tensor_value(tree, DType::kFloat32, {1}, 0), tree.dict({{tree.str("k"), tree.bytes(payload)}}),
                  tree.list({pickle::Tree::real(1)})});
  return encode_value_archive(value, storages, 1);
}

TEST(HostileMetadataTest, OfTorch) {
  for (const char* name : {"2.1.2/fsdp_linear_2", "2.14.1/fsdp_linear_2"}) {
    const Bytes good = OracleCase(name).file(".metadata");
    Damage damage([](ByteSpan bytes) { decode_metadata(bytes); });
    damage.truncations(good);
    EXPECT_EQ(damage.read(), 0u);
    damage.changed_bytes(good, {0x01, 0x80, 0xFF, 0x20});
    damage.random_changes(good, 20000, 1);
    EXPECT_GT(damage.refused(), good.size());
  }
}

TEST(HostileMetadataTest, OfOurOwn) {
  Metadata metadata = decode_metadata(OracleCase("2.14.1/nested").file(".metadata"));
  metadata.sidecars = 1;
  const Bytes good = encode_metadata(metadata);
  Damage damage([](ByteSpan bytes) { decode_metadata(bytes); });
  damage.truncations(good);
  EXPECT_EQ(damage.read(), 0u);
  damage.changed_bytes(good, {0x01, 0xFF});
  damage.random_changes(good, 5000, 2);
}

TEST(HostileItemTest, Tensors) {
  const Bytes good = small_tensor();
  Damage damage(read_tensor);
  damage.truncations(good);
  // Only bytes behind the end record may be missing, and there are none.
  EXPECT_EQ(damage.read(), 0u);
  damage.changed_bytes(good, {0x01, 0x80, 0xFF});
  damage.random_changes(good, 20000, 3);
}

TEST(HostileItemTest, Values) {
  const Bytes good = small_value();
  Damage damage(read_value);
  damage.truncations(good);
  EXPECT_EQ(damage.read(), 0u);
  damage.changed_bytes(good, {0x01, 0x80, 0xFF});
  damage.random_changes(good, 20000, 4);
}

TEST(HostileItemTest, VerifyOfDamagedItems) {
  Damage damage([](ByteSpan bytes) { verify_archive(MemorySource(bytes)); });
  const Bytes good = small_value();
  damage.truncations(good);
  EXPECT_EQ(damage.read(), 0u);
  damage.random_changes(good, 10000, 5);
}

TEST(HostilePickleTest, RandomOpcodes) {
  // Streams of valid opcodes in random order with short arguments reach deeper into the machine than damage does.
  std::mt19937 random(6);
  static constexpr std::string_view kOps =
      "(.012BCGJKMNQRTUX]abcehjqrstu})\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96";
  Damage damage([](ByteSpan bytes) {
    const pickle::Tree tree = pickle::parse(bytes);
    pickle::check_tree(tree.root());
    const Bytes again = pickle::write(tree.root());
    EXPECT_EQ(pickle::write(pickle::parse(again).root()).size(), again.size());
  });
  Bytes bytes;
  for (int round = 0; round < 200000; ++round) {
    bytes.clear();
    for (auto n = random() % 40; n > 0; --n) {
      const char op = random() % 3 == 0 ? "N])}(cKq\x94"[random() % 9] : kOps[random() % kOps.size()];
      bytes.push_back(static_cast<std::byte>(op));
      if (op == 'c') {
        for (const char c : std::string_view("m\nn\n")) bytes.push_back(static_cast<std::byte>(c));
      } else if (random() % 4 == 0) {
        bytes.push_back(static_cast<std::byte>(random() % 4));
      }
    }
    bytes.push_back(std::byte{'.'});
    damage.random_changes(bytes, 1, static_cast<uint32_t>(round));
  }
  EXPECT_GT(damage.read(), 100u);
}

}  // namespace
}  // namespace reshard
