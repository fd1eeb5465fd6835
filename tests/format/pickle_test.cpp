// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/pickle.h"

#include <gtest/gtest.h>

#include <limits>

#include "format/utf8.h"
#include "reshard/format/sha256.h"
#include "support/expect_error.h"

namespace reshard::pickle {
namespace {

Bytes from_hex(std::string_view hex) {
  Bytes bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes.push_back(static_cast<std::byte>(std::stoi(std::string(hex.substr(i, 2)), nullptr, 16)));
  return bytes;
}
std::string hex_of(ByteSpan bytes) {
  std::string text;
  char pair[3];
  for (const std::byte b : bytes) {
    std::snprintf(pair, sizeof pair, "%02x", std::to_integer<unsigned>(b));
    text += pair;
  }
  return text;
}
// A stream written as text, with \x escapes.
template <size_t n>
ByteSpan stream(const char (&text)[n]) {
  return as_bytes({text, n - 1});
}

// --- what CPython's pickler (protocol 2) writes ----------------------------------------------------------------------

TEST(PickleWriteTest, IntegersAsCPythonWritesThem) {
  Tree tree;
  std::vector<Value> items;
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  for (const int64_t v : {int64_t{0}, int64_t{255}, int64_t{256}, int64_t{65535}, int64_t{65536}, int64_t{-1},
                          int64_t{2147483647}, int64_t{2147483648}, int64_t{-2147483648}, int64_t{-2147483649}, kMax,
                          -kMax - 1, int64_t{127}, int64_t{128}, int64_t{-128}}) {
    items.push_back(Tree::integer(v));
  }
  const Bytes bytes = write(tree.list(items));
  EXPECT_EQ(hex_of(bytes),
            "80025d7100284b004bff4d00014dffff4a000001004affffffff4affffff7f8a0500000080004a000000808a05ffffff7fff8a08ff"
            "ffffffffffff7f8a0800000000"
            "000000804b7f4b804a80ffffff652e");
  const Tree back = parse(bytes);
  for (size_t i = 0; i < items.size(); ++i) EXPECT_EQ(back.root().items()[i].as_int(), items[i].as_int());
}

TEST(PickleWriteTest, LongIntegersTakeTheFewestBytes) {
  Tree tree;
  for (size_t bytes = 5; bytes <= 7; ++bytes) {
    const int64_t most = (int64_t{1} << (8 * bytes - 1)) - 1;
    for (const auto& [v, wanted] :
         {std::pair{most, bytes}, {most + 1, bytes + 1}, {-most - 1, bytes}, {-most - 2, bytes + 1}}) {
      const Bytes stream_of = write(Tree::integer(v));
      EXPECT_EQ(stream_of.size(), 2 + 2 + wanted + 1) << v;  // PROTO, LONG1, digits, STOP
      EXPECT_EQ(parse(stream_of).root().as_int(), v);
    }
  }
}

TEST(PickleWriteTest, ScalarsTextAndTuplesAsCPythonWritesThem) {
  Tree tree;
  const double infinity = std::numeric_limits<double>::infinity();
  EXPECT_EQ(hex_of(write(tree.list(
                {Tree::none(), Tree::boolean(true), Tree::boolean(false), Tree::real(1.5), Tree::real(-infinity)}))),
            "80025d7100284e8889473ff800000000000047fff0000000000000652e");
  EXPECT_EQ(hex_of(write(tree.list({tree.str(""), tree.str("x"), tree.str("h\u00e9\u4e16")}))),
            "80025d710028580000000071015801000000787102580600000068c3a9e4b8967103652e");
  const auto n = [](int64_t v) { return Tree::integer(v); };
  EXPECT_EQ(hex_of(write(tree.list({tree.tuple({}), tree.tuple({n(1)}), tree.tuple({n(1), n(2)}),
                                    tree.tuple({n(1), n(2), n(3)}), tree.tuple({n(1), n(2), n(3), n(4)})}))),
            "80025d710028294b018571014b014b028671024b014b024b03877103284b014b024b034b04747104652e");
}

TEST(PickleWriteTest, BytesDictsAndSetsAsCPythonWritesThem) {
  Tree tree;
  const auto n = [](int64_t v) { return Tree::integer(v); };
  EXPECT_EQ(hex_of(write(tree.list({tree.bytes(as_bytes({"\0\xff\x61", 3})), tree.bytes(as_bytes("zz")), tree.bytes({}),
                                    tree.byte_array(as_bytes("q")), tree.byte_array({})}))),
            "80025d710028635f636f646563730a656e636f64650a7101580400000000c3bf61710258060000006c6174696e3171038671045271"
            "05680158020000007a7a7106680386"
            "7107527108635f5f6275696c74696e5f5f0a62797465730a71092952710a635f5f6275696c74696e5f5f0a6279746561727261790a"
            "710b6801580100000071710c68038671"
            "0d52710e85710f527110680b29527111652e");
  EXPECT_EQ(hex_of(write(tree.list({tree.dict({}), tree.dict({{tree.str("a"), n(1)}}),
                                    tree.dict({{tree.str("b"), n(1)}, {n(2), n(3)}})}))),
            "80025d7100287d71017d710258010000006171034b01737d71042858010000006271054b014b024b0375652e");
}

TEST(PickleWriteTest, SetsFromAProtocol4StreamBecomeCalls) {
  // [{7}, frozenset({8}), set()]
  const Tree tree =
      parse(stream("\x80\x04](\x8f(K\x07\x90(K\x08\x91\x8f"
                   "e."));
  EXPECT_EQ(hex_of(write(tree.root())),
            "80025d710028635f5f6275696c74696e5f5f0a7365740a71015d71024b0761857103527104635f5f6275696c74696e5f5f0a66726f"
            "7a656e7365740a71055d71064b0861"
            "85710752710868015d710985710a52710b652e");
}

TEST(PickleWriteTest, SharedValuesAreWrittenOnce) {
  Tree tree;
  const Value s = tree.str("shared");
  const Value l = tree.list({s});
  EXPECT_EQ(hex_of(write(tree.list({s, l, l, s}))), "80025d710028580600000073686172656471015d710268016168026801652e");
}

TEST(PickleWriteTest, BatchesAndLongMemosAsCPython) {
  Tree tree;
  std::vector<Value> numbers, texts;
  std::vector<Entry> entries;
  for (int i = 0; i < 2001; ++i) numbers.push_back(Tree::integer(i));
  for (int i = 0; i < 1001; ++i) entries.push_back({Tree::integer(i), Tree::integer(i)});
  for (int i = 0; i < 300; ++i) texts.push_back(tree.str(std::to_string(i)));
  const auto digest = [](const Bytes& bytes) { return to_hex(Sha256::of(bytes)); };
  EXPECT_EQ(digest(write(tree.list(numbers))), "d401755777127c2204ef4bb8b7c230b2b027e9b1cb89df619e5b106c5685a107");
  EXPECT_EQ(digest(write(tree.dict(entries))), "1c3b98559369f71069dff3b29c37c6cea84e713cb39828aed22cc55c5404c009");
  EXPECT_EQ(digest(write(tree.list(texts))), "390d63770d8be95e5e412ca3abcffa64525328a440ef30a04c5acd1906737f4b");
  // collections.OrderedDict with the same items: CPython walks an iterator and ends with a lone SETITEM.
  Object::Extras extras;
  extras.dict_items = tree.dict(entries);
  Object ordered;
  ordered.callable = tree.global("collections", "OrderedDict");
  ordered.args = tree.tuple({});
  ordered.extras = &extras;
  EXPECT_EQ(digest(write(tree.object(ordered))), "eb8fcfc93fc6bba759389d4e4b614052eef0ca7f28edb06a2e6866643686e665");
}

TEST(PickleWriteTest, BigIntegersKeepTheirDigits) {
  for (const char* hex : {"80028a090000000000000000402e", "80028a090000000000000000c02e"}) {  // 2^70, -2^70
    const Tree tree = parse(from_hex(hex));
    EXPECT_EQ(tree.root().kind(), Kind::kBigInt);
    EXPECT_EQ(tree.root().as_bytes().size(), 9u);
    EXPECT_EQ(hex_of(write(tree.root())), hex);
  }
}

TEST(PickleWriteTest, WhatCouldNotBeReadBackIsRefused) {
  Tree tree;
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "no UTF-8", tree.str("\xff\xfe"));
  // As text a line break would end the name, and what follows would be opcodes.
  const Tree named = parse(stream("\x80\x04\x8c\x01m\x8c\x07n\ncos.x\x93."));
  EXPECT_ERROR(ErrorCode::kUnsupported, "line break", write(named.root()));
}

TEST(PickleWriteTest, CyclesAndDeepTreesAreRefused) {
  const Tree cycle = parse(stream("\x80\x02]q\0h\0a."));
  EXPECT_ERROR(ErrorCode::kUnsupported, "cycle", write(cycle.root()));
  Tree tree;
  Value v = Tree::none();
  for (int i = 0; i < 600; ++i) v = tree.list({v});
  EXPECT_ERROR(ErrorCode::kUnsupported, "nested too deep", write(v));
  EXPECT_EQ(parse(write(v, 1000)).root().items().size(), 1u);
}

// --- opcodes ---------------------------------------------------------------------------------------------------------

TEST(PickleParseTest, NumbersOfEveryWidth) {
  const Tree tree =
      parse(stream("(K\xffM\xff\xffJ\xff\xff\xff\xff\x8a\x00\x8a\x02\x00\x80\x8a\x09\xff\xff\xff\xff\xff\xff\xff\x7f"
                   "\x00\x8b\x01\x00\x00\x00\xffNt."));
  const auto items = tree.root().items();
  ASSERT_EQ(items.size(), 8u);
  EXPECT_EQ(items[0].as_int(), 255);
  EXPECT_EQ(items[1].as_int(), 65535);
  EXPECT_EQ(items[2].as_int(), -1);
  EXPECT_EQ(items[3].as_int(), 0);
  EXPECT_EQ(items[4].as_int(), -32768);
  EXPECT_EQ(items[5].as_int(), std::numeric_limits<int64_t>::max());
  EXPECT_EQ(items[6].as_int(), -1);
  EXPECT_TRUE(items[7].is_none());
  EXPECT_EQ(parse(stream("\x8b\0\0\0\0.")).root().as_int(), 0);
}

TEST(PickleParseTest, TextAndBytesOfEverySpelling) {
  const Tree tree =
      parse(stream("(\x8c\x01"
                   "aX\x01\0\0\0b\x8d\x01\0\0\0\0\0\0\0cC\x01"
                   "dB\x01\0\0\0e\x8e\x01\0\0\0\0\0\0\0fU\x01gT\x01\0\0\0h\x96\x01\0\0\0\0\0\0\0it."));
  const auto items = tree.root().items();
  ASSERT_EQ(items.size(), 9u);
  std::string all;
  for (size_t i = 0; i < 3; ++i) all += items[i].as_str();
  for (size_t i = 3; i < 9; ++i) all += as_text(items[i].as_bytes());
  EXPECT_EQ(all, "abcdefghi");
  EXPECT_EQ(items[7].kind(), Kind::kBytes);
  EXPECT_EQ(items[8].kind(), Kind::kByteArray);
}

TEST(PickleParseTest, ContainersAndStackOpcodes) {
  // [1, {2: 3}, {4}, frozenset({5}), (6,), (7, 8), (9, 9, 9)], with POP, POP_MARK and DUP on the way
  const Tree tree =
      parse(stream("\x80\x05\x95\x30\0\0\0\0\0\0\0]K\x01"
                   "aK\0"
                   "0(NN1(0(}K\x02K\x03s\x8f(K\x04\x90(K\x05\x91K\x06\x85K\x07K\x08\x86K\x09"
                   "22\x87"
                   "e. padding after stop: frames count it"));
  const auto items = tree.root().items();
  ASSERT_EQ(items.size(), 7u);
  EXPECT_EQ(items[0].as_int(), 1);
  EXPECT_EQ(items[1].entries()[0].value.as_int(), 3);
  EXPECT_EQ(items[2].kind(), Kind::kSet);
  EXPECT_EQ(items[2].items()[0].as_int(), 4);
  EXPECT_EQ(items[3].kind(), Kind::kFrozenSet);
  EXPECT_EQ(items[4].items().size(), 1u);
  EXPECT_EQ(items[5].items()[1].as_int(), 8);
  EXPECT_EQ(items[6].items().size(), 3u);
}

TEST(PickleParseTest, ObjectsAreNotMade) {
  // their.factory("true") as a reduction, with state, list items and dict items put into it
  const Tree tree =
      parse(stream("\x80\x02"
                   "ctheir\nfactory\nX\x04\0\0\0true\x85R"
                   "K\x01"
                   "a(K\x02K\x03"
                   "eK\x04K\x05s}b."));
  const Object& object = tree.root().as_object();
  EXPECT_EQ(object.made, Object::Made::kReduce);
  EXPECT_TRUE(object.callable.is_global("their", "factory"));
  EXPECT_EQ(object.args.items()[0].as_str(), "true");
  EXPECT_TRUE(object.has_state);
  EXPECT_EQ(object.list_items().size(), 3u);
  EXPECT_EQ(object.dict_items()[0].value.as_int(), 5);
}

TEST(PickleParseTest, NewObjectsAndPersistentIds) {
  const Tree tree = parse(stream("\x80\x04(\x8c\x01m\x8c\x01n\x93)\x81\x8c\x01m\x8c\x01n\x93)}\x92K\x07Qt."));
  const auto items = tree.root().items();
  EXPECT_EQ(items[0].as_object().made, Object::Made::kNewObj);
  EXPECT_FALSE(items[0].as_object().has_state);
  EXPECT_EQ(items[1].as_object().made, Object::Made::kNewObjEx);
  EXPECT_EQ(items[1].as_object().extras->kwargs.kind(), Kind::kDict);
  EXPECT_EQ(items[2].persistent_id().as_int(), 7);
}

TEST(PickleParseTest, AMemoIndexIsAtMostThePlaceInTheStream) {
  EXPECT_TRUE(parse(stream("Nr\x06\0\0\0.")).root().is_none());
}

TEST(PickleParseTest, MemoizeCountsTheEntriesWhoeverMadeThem) {
  const Tree tree = parse(stream("(K\x05q\0K\x06q\0K\x07\x94h\0h\1t."));  // 0 is put twice
  const auto items = tree.root().items();
  ASSERT_EQ(items.size(), 5u);
  EXPECT_EQ(items[3].as_int(), 6);
  EXPECT_EQ(items[4].as_int(), 7);
}

TEST(PickleParseTest, MemoEntriesAreTheSameNode) {
  const Tree tree = parse(stream("\x80\x04(]\x94\x8c\x01s\x94h\x01j\x01\0\0\0t."));
  const auto items = tree.root().items();
  ASSERT_EQ(items.size(), 4u);
  EXPECT_TRUE(items[1].is_same(items[2]));
  EXPECT_TRUE(items[1].is_same(items[3]));
  EXPECT_FALSE(items[0].is_same(items[1]));
}

TEST(PickleParseTest, ValuesOutliveAMoveOfTheirTree) {
  Tree first =
      parse(stream("\x80\x02]K\x2a"
                   "a."));
  const Value root = first.root();
  const Tree second = std::move(first);
  EXPECT_EQ(root.items()[0].as_int(), 42);
}

// --- refusals --------------------------------------------------------------------------------------------------------

struct BadStream {
  const char* name;
  ByteSpan bytes;
  ErrorCode code;
  const char* text;
};
void PrintTo(const BadStream& bad, std::ostream* out) { *out << bad.text; }
constexpr auto kCorrupt = ErrorCode::kCorruptData;
constexpr auto kUnsupported = ErrorCode::kUnsupported;

class PickleRefusalTest : public ::testing::TestWithParam<BadStream> {};

TEST_P(PickleRefusalTest, IsNamed) { EXPECT_ERROR(GetParam().code, GetParam().text, parse(GetParam().bytes)); }

INSTANTIATE_TEST_SUITE_P(
    Streams, PickleRefusalTest,
    ::testing::Values(BadStream{"Empty", {}, kCorrupt, "ends too early"},
                      BadStream{"NoStop", stream("N"), kCorrupt, "ends too early"},
                      BadStream{"StopWithoutValue", stream("."), kCorrupt, "stack underflow"},
                      BadStream{"TwoValues", stream("NN."), kCorrupt, "values left"},
                      BadStream{"OpenMark", stream("(N."), kCorrupt, "values left"},
                      BadStream{"Protocol6", stream("\x80\x06N."), kUnsupported, "protocol 6"},
                      BadStream{"FramePastTheEnd", stream("\x80\x04\x95\xff\0\0\0\0\0\0\0N."), kCorrupt, "frame"},
                      BadStream{"TextPastTheEnd",
                                stream("X\xff\xff\xff\x7f"
                                       "ab."),
                                kCorrupt, "wanted 2147483647 bytes"},
                      BadStream{"HugeText",
                                stream("\x8d\xff\xff\xff\xff\xff\xff\xff\xff"
                                       "ab."),
                                kCorrupt, "wanted 18446744073709551615 bytes"},
                      BadStream{"HugeBytes",
                                stream("\x8e\0\0\0\0\0\0\0\x80"
                                       "ab."),
                                kCorrupt, "ends too early"},
                      BadStream{"NegativeLength", stream("\x8b\xff\xff\xff\xff."), kCorrupt, "negative length"},
                      BadStream{"LongPastTheEnd", stream("\x8b\xff\xff\xff\x7f\x01."), kCorrupt, "ends too early"},
                      BadStream{"BadUtf8", stream("X\x01\0\0\0\xff."), kCorrupt, "UTF-8"},
                      BadStream{"OverlongUtf8", stream("X\x02\0\0\0\xc0\x80."), kCorrupt, "UTF-8"},
                      BadStream{"EndlessName", stream("cmodule without end"), kCorrupt, "name without end"},
                      BadStream{"NameIsNoText", stream("K\x01K\x02\x93."), kCorrupt, "no str"},
                      BadStream{"TupleWithoutMark", stream("Nt."), kCorrupt, "no MARK"},
                      BadStream{"AppendsWithoutMark", stream("]e."), kCorrupt, "no MARK"},
                      BadStream{"SetItemsWithoutMark", stream("}u."), kCorrupt, "no MARK"},
                      BadStream{"AddItemsWithoutMark", stream("\x8f\x90."), kCorrupt, "no MARK"},
                      BadStream{"FrozenSetWithoutMark", stream("\x91."), kCorrupt, "no MARK"},
                      BadStream{"PopMarkWithoutMark", stream("N1."), kCorrupt, "no MARK"},
                      BadStream{"PopOfNothing", stream("0."), kCorrupt, "stack underflow"},
                      BadStream{"DupOfNothing", stream("2."), kCorrupt, "stack underflow"},
                      BadStream{"BuildOfNothing", stream("Nb."), kCorrupt, "stack underflow"},
                      BadStream{"SetItemOfNothing", stream("NNs."), kCorrupt, "stack underflow"},
                      BadStream{"CallOfNothing", stream(")R."), kCorrupt, "stack underflow"},
                      BadStream{"NameOfNothing", stream("X\x01\0\0\0a\x93."), kCorrupt, "stack underflow"},
                      BadStream{"PersistentIdOfNothing", stream("Q."), kCorrupt, "stack underflow"},
                      BadStream{"NameIsNoUtf8", stream("c\xff\nn\n."), kCorrupt, "UTF-8"},
                      BadStream{"ItemsBelowTheMark", stream("N(\x85."), kCorrupt, "stack underflow"},
                      BadStream{"AppendToNone", stream("NNa."), kCorrupt, "no list"},
                      BadStream{"AppendAcrossAMark", stream("](Na."), kCorrupt, "stack underflow"},
                      BadStream{"AppendsWithoutList", stream("(Ne."), kCorrupt, "stack underflow"},
                      BadStream{"SetItemsOfList", stream("](NNu."), kCorrupt, "no dict"},
                      BadStream{"KeyWithoutValue", stream("}(Nu."), kCorrupt, "key without value"},
                      BadStream{"AddToList", stream("](N\x90."), kCorrupt, "no set"},
                      BadStream{"BuildOfList", stream("]}b."), kCorrupt, "no object"},
                      BadStream{"CallOfText", stream("X\x01\0\0\0f)R."), kCorrupt, "no class or function"},
                      BadStream{"ArgumentsAreAList", stream("cm\nf\n]R."), kCorrupt, "no tuple"},
                      BadStream{"KeywordsAreATuple", stream("cm\nf\n))\x92."), kCorrupt, "no dict"},
                      BadStream{"MissingMemo", stream("h\x05."), kCorrupt, "memo entry 5"},
                      BadStream{"GapInTheMemo", stream("Nq\x03h\x01."), kCorrupt, "memo entry 1"},
                      BadStream{"HugeMemoIndex", stream("Nr\xff\xff\xff\xff."), kCorrupt, "memo index 4294967295"},
                      BadStream{"MemoIndexPastItsPlace", stream("Nr\x07\0\0\0."), kCorrupt, "memo index 7"},
                      BadStream{"MemoOfNothing", stream("q\0."), kCorrupt, "stack underflow"},
                      BadStream{"UnknownOpcode", stream("\xf0."), kCorrupt, "unknown opcode 240"},
                      BadStream{"Inst", stream("(ios\nsystem\n."), kUnsupported, "INST"},
                      BadStream{"Obj", stream("(cos\nsystem\no."), kUnsupported, "OBJ"},
                      BadStream{"Extension1", stream("\x82\x01."), kUnsupported, "EXT1"},
                      BadStream{"Extension2", stream("\x83\x01\0."), kUnsupported, "EXT2"},
                      BadStream{"Extension4", stream("\x84\x01\0\0\0."), kUnsupported, "EXT4"},
                      BadStream{"TextPersistentId", stream("Pid\n."), kUnsupported, "PERSID"},
                      BadStream{"TextInt", stream("I1\n."), kUnsupported, "INT"},
                      BadStream{"TextString", stream("S'a'\n."), kUnsupported, "STRING"},
                      BadStream{"TextFloat", stream("F1\n."), kUnsupported, "FLOAT"},
                      BadStream{"TextLong", stream("L1L\n."), kUnsupported, "LONG"},
                      BadStream{"NextBuffer", stream("\x97."), kUnsupported, "NEXT_BUFFER"},
                      BadStream{"ReadonlyBuffer", stream("N\x98."), kUnsupported, "READONLY_BUFFER"}),
    [](const auto& test) { return std::string(test.param.name); });

TEST(PickleRefusalTest, WrongAccessNamesBothKinds) {
  Tree tree;
  EXPECT_ERROR(kCorrupt, "wanted int, found bool", Tree::boolean(true).as_int());
  EXPECT_ERROR(kCorrupt, "wanted bool, found int", Tree::integer(1).as_bool());
  EXPECT_ERROR(kCorrupt, "wanted dict, found list", tree.list({}).entries());
  EXPECT_FALSE(Tree::integer(1).is_global("torch", "Size"));
  EXPECT_ERROR(kCorrupt, "wanted float, found int", Tree::integer(1).as_float());
  EXPECT_ERROR(kCorrupt, "wanted str, found int", Tree::integer(1).as_str());
  EXPECT_ERROR(kCorrupt, "wanted bytes, found str", tree.str("a").as_bytes());
  EXPECT_ERROR(kCorrupt, "wanted list, tuple or set, found dict", tree.dict({}).items());
  EXPECT_ERROR(kCorrupt, "wanted global, found int", Tree::integer(1).as_global());
  EXPECT_ERROR(kCorrupt, "wanted object, found int", Tree::integer(1).as_object());
  EXPECT_ERROR(kCorrupt, "wanted persistent id, found int", Tree::integer(1).persistent_id());
}

// --- hostile shapes --------------------------------------------------------------------------------------------------

TEST(PickleBombTest, AMillionNestedListsComeAndGoWithoutRecursion) {
  std::string text(1'000'000, ']');
  text.append(999'999, 'a').append(".");
  const Tree tree = parse(as_bytes(text));
  EXPECT_EQ(tree.root().items().size(), 1u);
  EXPECT_ERROR(kUnsupported, "nested too deep", check_tree(tree.root()));
}

TEST(PickleBombTest, DoublingByReferenceStaysSmallAndIsNoticed) {
  // x = (x, x), 64 times: 2^64 values when copied
  std::string text = "]q";
  text += '\0';
  for (int i = 1; i <= 64; ++i) {
    text += "h";
    text += static_cast<char>(i - 1);
    text += "h";
    text += static_cast<char>(i - 1);
    text += "\x86q";
    text += static_cast<char>(i);
    text += "0";
  }
  text += "h\x40\x86.";
  const Tree tree = parse(as_bytes("(" + text.substr(0, text.size() - 2) + "t."));
  EXPECT_ERROR(kUnsupported, "too large", check_tree(tree.root()));
}

TEST(PickleBombTest, ALongTextSharedOftenIsNoticed) {
  Tree tree;
  const std::vector<Value> shared(10'000, tree.str(std::string(200'000, 'x')));  // 2 GB when copied
  EXPECT_ERROR(kUnsupported, "too large", check_tree(tree.list(shared)));
  EXPECT_ERROR(kUnsupported, "too large",
               check_tree(tree.list(std::vector<Value>(10'000, tree.bytes(Bytes(200'000))))));
  check_tree(tree.str(std::string(100'000'000, 'x')));
}

TEST(PickleBombTest, SharedPartsCountEachTimeUpToTheLimit) {
  Tree tree;
  const Value pair = tree.tuple({Tree::integer(1), Tree::integer(2)});
  const Value text = tree.str(std::string(128, 'x'));  // counts as three values
  const std::pair<Value, uint64_t> cases[] = {{tree.list({Tree::integer(1)}), 2},
                                              {tree.list({pair, pair}), 7},
                                              {tree.list({text, text}), 7},
                                              {tree.dict({{tree.str("k"), pair}}), 5}};
  for (const auto& [value, count] : cases) {
    check_tree(value, {.max_expanded = count});
    EXPECT_ERROR(kUnsupported, "too large", check_tree(value, {.max_expanded = count - 1}));
  }
}

TEST(PickleBombTest, CyclesThroughEveryKindOfNodeAreNoticed) {
  for (const ByteSpan bytes :
       {stream("]q\0h\0a."), stream("}q\0Nh\0s."), stream("cm\nf\n)Rq\0h\0b."), stream("cm\nf\n)Rq\0h\0a."),
        stream("]q\0(h\0ta."), stream("\x8fq\0(h\0\x90."), stream("]q\0h\0Qa.")}) {
    EXPECT_ERROR(kUnsupported, "cycle", check_tree(parse(bytes).root()));
  }
}

TEST(PickleBombTest, HonestTreesPassTheCheck) {
  Tree tree;
  const Value shared = tree.list({Tree::integer(1)});
  check_tree(tree.tuple({shared, shared, tree.dict({{tree.str("k"), shared}})}));
  check_tree(Tree::none());
  Value v = Tree::none();
  for (int i = 0; i < 499; ++i) v = tree.list({v});
  check_tree(v);
  EXPECT_ERROR(kUnsupported, "nested too deep", check_tree(tree.list({v})));
}

// --- bytes -----------------------------------------------------------------------------------------------------------

TEST(PickleBytesTest, EverySpellingOfBytesIsPlain) {
  Tree tree;
  const std::string all = [] {
    std::string s;
    for (int i = 0; i < 256; ++i) s += static_cast<char>(i);
    return s;
  }();
  for (const Value& v : {tree.bytes(as_bytes(all)), tree.byte_array(as_bytes(all))}) {
    EXPECT_EQ(plain_bytes(v), all);
    const Tree back = parse(write(v));
    EXPECT_EQ(back.root().kind(), Kind::kObject);
    EXPECT_EQ(plain_bytes(back.root()), all);
  }
  EXPECT_EQ(plain_bytes(parse(write(tree.bytes({}))).root()), "");
  EXPECT_EQ(plain_bytes(parse(write(tree.byte_array({}))).root()), "");
}

TEST(PickleBytesTest, OtherValuesAreNot) {
  EXPECT_FALSE(plain_bytes(Tree::none()));
  EXPECT_FALSE(plain_bytes(parse(stream("ctheir\nfactory\nX\x01\0\0\0a\x85R.")).root()));
  EXPECT_FALSE(plain_bytes(parse(stream("c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0rot13\x86R.")).root()));
  EXPECT_FALSE(plain_bytes(parse(stream("c_codecs\nencode\nX\x03\0\0\0\xe4\xb8\x96X\x06\0\0\0latin1\x86R.")).root()));
  EXPECT_FALSE(plain_bytes(parse(stream("c__builtin__\nbytearray\nc__builtin__\nbytearray\n)R\x85R.")).root()));
  // With a state, or with items: something else that such a call made.
  EXPECT_TRUE(plain_bytes(parse(stream("c_codecs\nencode\nX\x01\0\0\0aX\x06\0\0\0latin1\x86R.")).root()));
  EXPECT_FALSE(plain_bytes(parse(stream("c_codecs\nencode\nX\x01\0\0\0aX\x06\0\0\0latin1\x86R}b.")).root()));
  EXPECT_FALSE(plain_bytes(parse(stream("c_codecs\nencode\nX\x01\0\0\0aX\x06\0\0\0latin1\x86R(K\te.")).root()));
}

TEST(Utf8Test, KnowsTheEdges) {
  for (const char* good :
       {"", "abcdefghijk", "\x7f", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\xa0\x80" /* surrogate */,
        "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf", "abcdefgh\xc3\xa9"}) {
    EXPECT_TRUE(is_utf8(good)) << good;
  }
  for (const char* bad : {"\x80", "\xc1\xbf", "\xc2", "\xe0\x9f\xbf", "\xe0\xa0", "\xf0\x8f\xbf\xbf",
                          "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff", "abcdefgh\xc3(", "abcdefg\xe4\xb8"}) {
    EXPECT_FALSE(is_utf8(bad)) << bad;
  }
}

TEST(Utf8Test, Latin1IsReadBackAndNothingElse) {
  for (const char* good : {"", "a", "\xc2\x80", "a\xc3\xbfz"}) {
    const auto data = utf8_to_latin1(good);
    ASSERT_TRUE(data) << good;
    EXPECT_EQ(latin1_to_utf8(as_bytes(*data)), good);
  }
  EXPECT_EQ(utf8_to_latin1("\xc3\xa9"), "\xe9");
  for (const char* bad : {"\xc4\x80", "\xe4\xb8\x96", "a\xc1\x80"}) EXPECT_FALSE(utf8_to_latin1(bad)) << bad;
  for (const std::string_view cut : {"ab\xc3\xa9", "\xc2\x80"}) {
    EXPECT_FALSE(utf8_to_latin1(cut.substr(0, cut.size() - 1))) << cut;
  }
}

}  // namespace
}  // namespace reshard::pickle
