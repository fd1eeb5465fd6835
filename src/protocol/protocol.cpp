// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/protocol/protocol.h"

#include <malloc.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <utility>

#include "protocol/failure_wire.h"
#include "protocol/save_plan_cache.h"
#include "reshard/format/sha256.h"
#include "reshard/format/sidecar.h"
#include "reshard/planner/plan_wire.h"

namespace reshard {
namespace {

// Message: Header, then what the step sends. A message that is not ok holds the failure instead:
// one rank's to the coordinator, all ranks' from it.
constexpr uint8_t kMessageMark = 0x5A;
enum class Operation : uint8_t { kSave = 1, kLoad = 2 };
enum class Step : uint8_t { kMetadata = 1, kPlan = 2, kTransfer = 3 };

// Texts are cut so that an error of thousands of ranks stays a message of moderate size for each of them.
constexpr size_t kMaxFailureText = 16 << 10;
constexpr size_t kMinFailureText = 512;
constexpr size_t kMaxFailureTexts = 256 << 10;

// Of plans that are done with, before the system gets it back. Ordinary jobs never have as much.
constexpr uint64_t kTrimBytes = 256 << 20;

using Failures = std::map<int, RankFailure>;

const char* name_of(Operation operation) { return operation == Operation::kSave ? "save" : "load"; }

const char* name_of(Operation operation, Step step) {
  switch (step) {
    case Step::kMetadata:
      return "metadata";
    case Step::kPlan:
      return "plan";
    case Step::kTransfer:
      return operation == Operation::kSave ? "write" : "read";
  }
  return "?";
}

/// current_failure() for places that must not throw.
RankFailure caught_failure() noexcept {
  try {
    return current_failure();
  } catch (...) {
    return {ErrorCode::kUnavailable, "out of memory"};
  }
}

/// The rank that a transport's exception, which is being handled, is the loss of.
int lost_rank(int otherwise) {
  try {
    throw;
  } catch (const Error& error) {
    return error.context().rank.value_or(otherwise);
  } catch (...) {
    return otherwise;
  }
}

struct Header {
  Operation operation;
  Step step;
  bool ok;

  void write(ByteWriter& out) const {
    out.u8(kMessageMark);
    out.u8(static_cast<uint8_t>(operation));
    out.u8(static_cast<uint8_t>(step));
    out.u8(ok);
  }
  static Header read(ByteReader& in) {
    const uint8_t mark = in.u8();
    const uint8_t operation = in.u8();
    const uint8_t step = in.u8();
    const uint8_t ok = in.u8();
    if (mark != kMessageMark || operation < 1 || operation > 2 || step < 1 || step > 3 || ok > 1) {
      throw Error(ErrorCode::kCorruptData, "a message of another rank is damaged");
    }
    return {static_cast<Operation>(operation), static_cast<Step>(step), ok == 1};
  }
};

/// One operation over a transport, seen from this rank. Each step is one round trip of every rank to the coordinator.
class Star {
 public:
  Star(Transport& transport, Operation operation) : transport_(transport), operation_(operation) {}

  bool is_coordinator() const { return transport_.rank() == 0; }
  int rank() const { return transport_.rank(); }
  size_t world_size() const { return static_cast<size_t>(transport_.world_size()); }

  /// What this rank did in a step: the message that it sends, or why it failed.
  struct Part {
    Bytes message;
    std::optional<RankFailure> failure;
  };
  /// Runs this rank's work of a step; `body` returns what to send.
  template <class Body>
  Part attempt(Step step, Body&& body) {
    try {
      return {message(step, body()), std::nullopt};
    } catch (...) {
      return {{}, caught_failure()};
    }
  }

  /// What the coordinator does in a step. Both are optional.
  struct Coordination {
    /// Takes what a rank other than 0 sent, in the order in which messages come. What it throws is that rank's failure.
    std::function<void(int rank, ByteSpan payload)> take;
    /// After all parts succeeded and were taken. Returns the answers: one a rank, or one for all.
    std::function<std::vector<Bytes>()> decide;
    /// The step's name in errors of decide().
    const char* decide_name;
  };
  /// Ends a step: all ranks come together, and each gets its answer, or all throw the same CheckpointError. A rank that
  /// loses the coordinator after it sent a vote that can lead to a commit says so (`can_commit`). `committed` is read
  /// when the coordinator's decide() has thrown.
  Bytes finish(Step step, Part part, const Coordination& coordination, bool can_commit, const Committed& committed) {
    return is_coordinator() ? coordinate(step, std::move(part), coordination, committed)
                            : participate(step, std::move(part), can_commit);
  }
  Bytes finish(Step step, Part part, const Coordination& coordination) {
    return finish(step, std::move(part), coordination, false, Committed::kNo);
  }

  /// Throws if an answer could not be handed over. To be called after the last step.
  void check_all_answered(Step step, Committed committed) const {
    if (!unanswered_.empty()) throw CheckpointError(name_of(operation_, step), unanswered_, committed);
  }

 private:
  Bytes message(Step step, ByteSpan payload, bool ok = true) const {
    ByteWriter out;
    out.buffer().reserve(payload.size() + 4);
    Header{operation_, step, ok}.write(out);
    out.bytes(payload);
    return out.take();
  }

  Bytes participate(Step step, Part part, bool can_commit) {
    const Committed unless_told = can_commit && !part.failure ? Committed::kUnknown : Committed::kNo;
    try {
      if (part.failure) {
        ByteWriter out;
        put_failure(out, *part.failure, kMaxFailureText);
        part.message = message(step, out.buffer(), false);
      }
      transport_.send(0, part.message);
      const Bytes answer = transport_.receive(0);
      ByteReader in(answer, "message of the coordinator");
      const Header header = Header::read(in);
      if (!header.ok) throw_failures(in);
      if (header.operation != operation_ || header.step != step) {
        throw Error(ErrorCode::kFailedPrecondition, "the coordinator is at another step than this rank");
      }
      const ByteSpan payload = in.bytes(in.remaining());
      return Bytes(payload.begin(), payload.end());
    } catch (const CheckpointError&) {
      throw;
    } catch (...) {
      Failures failures{{lost_rank(0), caught_failure()}};
      if (part.failure) failures.emplace(rank(), std::move(*part.failure));
      throw CheckpointError(name_of(operation_, step), std::move(failures), unless_told);
    }
  }

  [[noreturn]] static void throw_failures(ByteReader& in) {
    std::string step = in.string();
    const uint8_t committed = in.u8();
    if (committed > static_cast<uint8_t>(Committed::kUnknown)) {
      throw Error(ErrorCode::kCorruptData, "message of the coordinator has an unknown outcome");
    }
    Failures failures;
    for (size_t n = in.count(3); n > 0; --n) {
      const auto rank = static_cast<int>(in.varint());
      failures.emplace(rank, get_failure(in));
    }
    if (failures.empty()) throw Error(ErrorCode::kCorruptData, "message of the coordinator names no cause");
    throw CheckpointError(std::move(step), std::move(failures), static_cast<Committed>(committed));
  }

  Bytes coordinate(Step step, Part part, const Coordination& coordination, const Committed& committed) {
    Failures failures = unanswered_;
    const char* failed_step = name_of(operation_, step);
    if (part.failure) failures.emplace(0, std::move(*part.failure));
    try {
      std::vector<int> others;
      for (int r = 1; r < transport_.world_size(); ++r) {
        if (!unreached_.contains(r)) others.push_back(r);
      }
      transport_.gather(others, [&](Transport::Arrival arrival) {
        try {
          if (auto failure = accept(step, arrival, coordination)) failures.emplace(arrival.from, std::move(*failure));
        } catch (...) {
          failures.emplace(arrival.from, caught_failure());
        }
      });
    } catch (...) {
      failures.emplace(lost_rank(0), caught_failure());
    }

    std::vector<Bytes> answers;
    if (failures.empty()) {
      try {
        answers = coordination.decide ? coordination.decide() : std::vector<Bytes>(1);
        for (Bytes& answer : answers) answer = message(step, answer);
      } catch (...) {
        failures.emplace(0, caught_failure());
        failed_step = coordination.decide_name;
      }
    }
    if (failures.empty()) {
      send_all(answers);
      return {};
    }

    const size_t limit = std::clamp(kMaxFailureTexts / failures.size(), kMinFailureText, kMaxFailureText);
    ByteWriter out;
    out.string(failed_step);
    out.u8(static_cast<uint8_t>(committed));
    out.varint(failures.size());
    for (auto& [rank, failure] : failures) {
      if (failure.message.size() > limit) failure.message.resize(limit);
      out.varint(static_cast<uint64_t>(rank));
      put_failure(out, failure, limit);
    }
    send_all({message(step, out.buffer(), false)});
    throw CheckpointError(failed_step, std::move(failures), committed);
  }

  /// What a message says that went wrong; otherwise gives its payload to take().
  std::optional<RankFailure> accept(Step step, const Transport::Arrival& arrival, const Coordination& coordination) {
    if (arrival.error) std::rethrow_exception(arrival.error);
    const std::string from = "rank " + std::to_string(arrival.from);
    ByteReader in(arrival.message, "message");
    const Header header = Header::read(in);
    if (header.operation != operation_) {
      throw Error(ErrorCode::kFailedPrecondition,
                  from + " called " + name_of(header.operation) + " while rank 0 called " + name_of(operation_));
    }
    if (header.step != step) throw Error(ErrorCode::kFailedPrecondition, from + " is at another step than rank 0");
    if (!header.ok) return get_failure(in);
    if (coordination.take) coordination.take(arrival.from, in.bytes(in.remaining()));
    return std::nullopt;
  }

  void send_all(const std::vector<Bytes>& answers) {
    for (int r = 1; r < transport_.world_size(); ++r) {
      try {
        transport_.send(r, answers[answers.size() == 1 ? 0 : static_cast<size_t>(r)]);
      } catch (...) {
        // It waits for an answer that does not come: in the next step nobody must wait for it.
        unreached_.insert(r);
        unanswered_.emplace(lost_rank(r), caught_failure());
      }
    }
  }

  Transport& transport_;
  const Operation operation_;
  std::set<int> unreached_;  // ranks that an answer could not be handed to
  Failures unanswered_;      // and why
};

std::string random_uuid() {
  std::random_device random;
  std::array<uint32_t, 4> words;
  for (uint32_t& word : words) word = random();
  words[1] = (words[1] & 0xFFFF0FFFu) | 0x00004000u;  // version 4: random
  words[2] = (words[2] & 0x3FFFFFFFu) | 0x80000000u;  // variant of RFC 4122
  std::array<char, 37> text;
  std::snprintf(text.data(), text.size(), "%08x-%04x-%04x-%04x-%04x%08x", words[0], words[1] >> 16, words[1] & 0xFFFF,
                words[2] >> 16, words[2] & 0xFFFF, words[3]);
  return text.data();
}

/// What a vote says: which plan a rank carried out, and which receipts it holds. With places that are not final, also
/// where the items lie.
struct Vote {
  struct Place {
    uint64_t offset = 0;
    uint64_t length = 0;
  };
  ShortDigest plan{};
  ShortDigest receipts{};
  std::optional<SidecarDigest> sidecar;
  std::vector<Place> places;  // of the rank's items

  Bytes encode() const {
    ByteWriter out;
    out.bytes(plan);
    out.bytes(receipts);
    out.u8(sidecar.has_value());
    if (sidecar) out.bytes(*sidecar);
    out.varint(places.size());
    for (const Place& place : places) {
      out.varint(place.offset);
      out.varint(place.length);
    }
    return out.take();
  }
  static Vote decode(ByteSpan payload) {
    ByteReader in(payload, "vote");
    Vote vote;
    std::ranges::copy(in.bytes(sizeof(ShortDigest)), vote.plan.begin());
    std::ranges::copy(in.bytes(sizeof(ShortDigest)), vote.receipts.begin());
    if (in.u8() != 0) std::ranges::copy(in.bytes(sizeof(SidecarDigest)), vote.sidecar.emplace().begin());
    for (size_t n = in.count(2); n > 0; --n) {
      const uint64_t offset = in.varint();
      vote.places.push_back({offset, in.varint()});
    }
    if (!in.at_end()) throw Error(ErrorCode::kCorruptData, "vote has bytes after its end");
    return vote;
  }
};

/// The save as the coordinator knows it between planning and commit.
struct CoordinatedSave {
  /// A rank's items in storage_data, where their places are not final; which of them lie where another one lies.
  struct Part {
    size_t first = 0;
    std::vector<bool> is_shared;
  };
  std::vector<Vote> expected;  // a rank
  std::vector<Part> parts;     // the same
  std::vector<std::optional<SidecarDigest>> sidecars;
  std::vector<std::pair<MetadataIndex, StorageInfo>> stored;  // what will be the storage_data of the catalogue
  Metadata metadata;
  SaveResult result;
};

/// Puts the places that a rank wrote to into the catalogue, and expects the receipts to say the same.
void take_places(const Vote& vote, size_t rank, CoordinatedSave& save) {
  const CoordinatedSave::Part& part = save.parts[rank];
  ReceiptsDigest receipts;
  auto item = save.metadata.storage_data.begin() + static_cast<ptrdiff_t>(part.first);
  for (size_t i = 0; i < vote.places.size(); ++i, ++item) {
    item->second.offset = vote.places[i].offset;
    item->second.length = vote.places[i].length;
    receipts.add(item->first, item->second);
    if (!part.is_shared[i]) save.result.bytes_written += item->second.length;
  }
  save.expected[rank].receipts = shorten(receipts.finish());
}

/// Takes a rank's vote. Every item that the commit will name has been written where it will say, or the rank that did
/// not is named.
void take_vote(const Vote& vote, int rank, CoordinatedSave& save) {
  if (!vote.places.empty() && vote.places.size() == save.parts[static_cast<size_t>(rank)].is_shared.size()) {
    take_places(vote, static_cast<size_t>(rank), save);
  }
  const Vote& expected = save.expected[static_cast<size_t>(rank)];
  save.sidecars[static_cast<size_t>(rank)] = vote.sidecar;
  if (vote.plan == expected.plan && vote.receipts == expected.receipts) return;
  throw Error(ErrorCode::kInternal,
              vote.plan == expected.plan ? "the receipts do not match the plan: other items, places or order"
                                         : "another plan was carried out than the coordinator sent",
              {.rank = rank});
}

/// The sidecars go into the catalogue if the storage writes such.
void name_sidecars(CoordinatedSave& save) {
  for (const auto& digest : save.sidecars) {
    if (digest.has_value() != save.sidecars[0].has_value()) {
      throw Error(ErrorCode::kInternal, "some ranks wrote a sidecar and others did not");
    }
    if (!digest) continue;
    if (!save.metadata.sidecars) save.metadata.sidecars.emplace();
    save.metadata.sidecars->push_back(*digest);
  }
}

using Kept = SavePlanCache::Kept;

/// An answer with a plan: the save's id, whether to keep the plan and the shared sets then, the plan.
Bytes encode_part(const std::string& save_id, const SavePlan& plan, const std::vector<SharedSet>* shared) {
  ByteWriter out;
  out.u8(static_cast<uint8_t>(PlanMessage::kPlan));
  out.string(save_id);
  out.u8(shared != nullptr);
  if (shared != nullptr) encode_shared_sets(*shared, out);
  out.bytes(encode_save_plan(plan));
  return out.take();
}

/// An answer to a rank that has the plan but for the names of its files.
Bytes encode_new_names(const std::string& save_id, const std::vector<SharedString>& names) {
  ByteWriter out;
  out.u8(static_cast<uint8_t>(PlanMessage::kNewNames));
  out.string(save_id);
  out.varint(names.size());
  for (const SharedString& name : names) out.string(name);
  return out.take();
}

/// Binds the answer with the new names to the one that the plan came with.
ShortDigest digest_of_reused(const ShortDigest& first_answer, ByteSpan answer) {
  return shorten(Sha256().update(first_answer).update(answer).finish());
}

/// What the coordinator has from the ranks before it plans.
struct LocalPlans {
  explicit LocalPlans(size_t world_size) : plans(world_size), structures(world_size), offers(world_size) {}

  std::vector<SavePlan> plans;
  std::vector<std::optional<ShortDigest>> structures;  // of the plans that their ranks will keep
  std::vector<PlanOffer> offers;
  size_t offered = 0;       // ranks that sent an offer and no plan
  bool only_plans = false;  // offers are no answer any more
  SavePlanDecoder decoder;

  void take(int rank, ByteSpan payload) {
    const auto r = static_cast<size_t>(rank);
    ByteReader in(payload, "plan of a rank");
    const uint8_t kind = in.u8();
    switch (static_cast<PlanMessage>(kind)) {
      case PlanMessage::kOffer:
        if (only_plans) throw Error(ErrorCode::kCorruptData, "a rank does not send the plan that it was asked for");
        offers[r] = PlanOffer::decode(in);
        ++offered;
        return;
      case PlanMessage::kPlanToKeep:
        std::ranges::copy(in.bytes(sizeof(ShortDigest)), structures[r].emplace().begin());
        [[fallthrough]];
      case PlanMessage::kPlan:
        plans[r] = decoder.decode(in.rest());
        return;
      default:
        throw Error(ErrorCode::kCorruptData, "unknown kind of plan", {.found = std::to_string(kind)});
    }
  }
};

/// Keeps what is needed to judge the vote of rank `r` and to commit what it writes.
void expect_part(size_t r, const SavePlan& plan, const ShortDigest& plan_digest, const StorageWriter& writer,
                 CoordinatedSave& save) {
  ReceiptsDigest receipts;
  CoordinatedSave::Part& part = save.parts[r];
  part = {.first = save.stored.size(), .is_shared = {}};
  for (size_t i = 0; i < plan.items.size(); ++i) {
    receipts.add(plan.items[i].index, plan.storage[i]);
    save.stored.emplace_back(plan.items[i].index, plan.storage[i]);
    const auto tied_to = plan.items[i].tied_to;
    const bool is_shared = tied_to && plan.storage[i] == plan.storage[*tied_to];
    if (!writer.places_are_final()) {
      part.is_shared.push_back(is_shared);
    } else if (!is_shared) {
      save.result.bytes_written += plan.storage[i].length;
    }
  }
  save.result.items += plan.items.size();
  save.expected[r] = {plan_digest, shorten(receipts.finish()), std::nullopt, {}};
}

/// The catalogue of the save, as yet without storage_data.
void begin_catalogue(Metadata metadata, const std::vector<SavePlan>& plans, const StorageWriter& writer,
                     CoordinatedSave& save) {
  save.metadata = std::move(metadata);
  save.metadata.storage_meta = StorageMeta{
      .checkpoint_id = writer.checkpoint_id(), .save_id = save.result.save_id, .load_id = std::nullopt, .modules = {}};
  save.metadata.version = kMetadataVersion;
  size_t items = 0;
  for (const SavePlan& plan : plans) items += plan.items.size();
  save.stored.clear();
  save.stored.reserve(items);
  save.expected.resize(plans.size());
  save.parts.resize(plans.size());
  save.sidecars.resize(plans.size());
}

/// Completes the catalogue once all parts are expected.
void end_catalogue(CoordinatedSave& save) {
  auto& items = save.metadata.storage_data;
  if (const auto twice = items.assign(std::move(save.stored))) {
    throw Error(ErrorCode::kInternal, "an item is written twice",
                {.key = to_string(items.begin()[static_cast<ptrdiff_t>(*twice)].first)});
  }
}

/// Places all items under a new save id.
std::vector<SavePlan> place(std::vector<SavePlan> plans, size_t world_size, StorageWriter& writer,
                            CoordinatedSave& save) {
  save.result = {.save_id = random_uuid()};
  writer.begin_save(save.result.save_id);
  plans = writer.prepare_global_plan(std::move(plans));
  if (plans.size() != world_size) {
    throw Error(ErrorCode::kInternal, "planner or storage writer lost plans",
                {.wanted = std::to_string(world_size), .found = std::to_string(plans.size())});
  }
  for (size_t r = 0; r < world_size; ++r) {
    if (plans[r].storage.size() == plans[r].items.size()) continue;
    throw Error(ErrorCode::kInternal, "storage writer did not place every item", {.rank = static_cast<int>(r)});
  }
  return plans;
}

/// Plans for all ranks; keeps what is needed to judge the votes and to commit, and in `kept`, unless it is null, what the
/// next save can use. Returns what each rank is told, and its own plan in `own`.
std::vector<Bytes> plan_globally(LocalPlans local, SavePlanner& planner, StorageWriter& writer, Transport& transport,
                                 CoordinatedSave& save, SavePlan& own, std::unique_ptr<Kept>& kept) {
  const size_t world_size = local.plans.size();
  std::vector<std::vector<SharedSet>> shared;
  if (kept != nullptr) shared = find_shared_sets(local.plans);
  GlobalSavePlan global = planner.create_global_plan(std::move(local.plans));
  transport.heartbeat();
  test_point("save.planned_globally");
  std::vector<SavePlan> plans = place(std::move(global.plans), world_size, writer, save);
  transport.heartbeat();
  if (kept != nullptr) {
    kept->planned_in = save.result.save_id;
    kept->metadata = global.metadata;
    kept->ranks.resize(world_size);
  }
  begin_catalogue(std::move(global.metadata), plans, writer, save);
  std::vector<Bytes> answers(world_size);
  uint64_t freed = 0;
  for (size_t r = 0; r < world_size; ++r) {
    SavePlan& plan = plans[r];
    plan.planner_data = {};  // is in the catalogue; no rank needs it to write
    answers[r] = encode_part(save.result.save_id, plan, kept != nullptr ? &shared[r] : nullptr);
    const ShortDigest digest = shorten(Sha256::of(answers[r]));
    expect_part(r, plan, digest, writer, save);
    if (kept != nullptr) {
      Kept::Rank& rank = kept->ranks[r];
      rank = {*local.structures[r], digest, {}};
      for (const SharedSet& set : shared[r]) rank.sets.push_back(set.id);
      if (r == 0) own = plan;
    } else {
      freed += plan.items.size() * (sizeof(WriteItem) + sizeof(StorageInfo));
      if (r == 0) own = std::move(plan);
      plan = {};
      // The plans of thousands of ranks would stay with the process while the catalogue grows.
      if (freed >= kTrimBytes) {
        malloc_trim(0);
        freed = 0;
      }
    }
    transport.heartbeat();
  }
  end_catalogue(save);
  if (kept != nullptr) {
    kept->structure = kept->ranks[0].structure;
    kept->shared = std::move(shared[0]);
    kept->plans = std::move(plans);
  }
  test_point("save.placed");
  return answers;
}

/// Plans a save like the last one. Nothing if the storage now places items elsewhere.
std::optional<std::vector<Bytes>> plan_again(Kept& kept, StorageWriter& writer, Transport& transport,
                                             CoordinatedSave& save, SavePlan& own) {
  const size_t world_size = kept.plans.size();
  std::vector<std::vector<StorageInfo>> before(world_size);
  for (size_t r = 0; r < world_size; ++r) before[r] = std::move(kept.plans[r].storage);
  kept.plans = place(std::move(kept.plans), world_size, writer, save);
  transport.heartbeat();
  begin_catalogue(kept.metadata, kept.plans, writer, save);
  std::vector<Bytes> answers(world_size);
  for (size_t r = 0; r < world_size; ++r) {
    const SavePlan& plan = kept.plans[r];
    const std::vector<SharedString> names = files_of(plan.storage);
    if (files_of(before[r]).size() != names.size()) return std::nullopt;
    rename_files(before[r], names);
    if (before[r] != plan.storage) return std::nullopt;
    before[r] = {};
    answers[r] = encode_new_names(save.result.save_id, names);
    expect_part(r, plan, digest_of_reused(kept.ranks[r].answer, answers[r]), writer, save);
    transport.heartbeat();
  }
  end_catalogue(save);
  own = kept.plans[0];
  test_point("save.placed");
  return answers;
}

/// What a rank has from the coordinator before it writes.
struct Assignment {
  std::string save_id;
  SavePlan plan;
  ShortDigest digest{};  // of all that it was told, for the vote
  bool is_new = true;    // not made of what was kept

  /// `kept` is brought up to date; null after an answer that is not to be kept.
  static Assignment decode(ByteSpan answer, size_t local_items, std::unique_ptr<Kept>& kept) {
    Assignment result;
    ByteReader in(answer, "plan of the coordinator");
    const auto kind = static_cast<PlanMessage>(in.u8());
    if (kind != PlanMessage::kPlan && !(kind == PlanMessage::kNewNames && kept != nullptr)) {
      throw Error(ErrorCode::kCorruptData, "the coordinator's answer is no plan");
    }
    result.save_id = in.string();
    if (kind == PlanMessage::kNewNames) {
      std::vector<SharedString> names(in.count());
      for (SharedString& name : names) name = in.text();
      if (!in.at_end()) throw Error(ErrorCode::kCorruptData, "the coordinator's answer has bytes after its end");
      rename_files(kept->part.storage, names);
      result.plan = kept->part;
      result.digest = digest_of_reused(kept->answer, answer);
      result.is_new = false;
      return result;
    }
    const bool keep = in.u8() != 0;
    std::vector<SharedSet> shared;
    if (keep) shared = decode_shared_sets(in, local_items);
    result.plan = decode_save_plan(in.rest());
    result.digest = shorten(Sha256::of(answer));
    if (!keep) kept = nullptr;
    if (kept != nullptr) {
      kept->planned_in = result.save_id;
      kept->answer = result.digest;
      kept->part = result.plan;
      kept->shared = std::move(shared);
    }
    return result;
  }
};

SaveResult save(Star& star, Transport& transport, const SaveState& state, SavePlanner& planner, StorageWriter& writer,
                const ProgressFn& progress, SavePlanCache* cache) {
  CoordinatedSave coordinated;
  Committed committed = Committed::kNo;
  SavePlan plan;
  LocalPlans local(star.is_coordinator() ? star.world_size() : 0);
  std::unique_ptr<Kept> kept = SavePlanCacheAccess::take(cache);  // a save that fails leaves nothing
  ShortDigest structure{};
  bool offers = false;

  const auto whole_plan = [&] {
    if (star.is_coordinator()) return Bytes();
    ByteWriter out;
    out.u8(static_cast<uint8_t>(cache != nullptr ? PlanMessage::kPlanToKeep : PlanMessage::kPlan));
    if (cache != nullptr) out.bytes(structure);
    out.bytes(encode_save_plan(plan));
    return out.take();
  };
  auto part = star.attempt(Step::kPlan, [&] {
    planner.set_up_planner(state, star.is_coordinator());
    plan = planner.create_local_plan();
    const Bytes without_contents = cache != nullptr ? encode_save_plan(plan) : Bytes();
    if (star.world_size() > 1) planner.add_content_digests(plan);
    if (cache != nullptr) structure = structure_of(without_contents, plan);
    test_point("save.planned");
    offers = kept != nullptr && kept->structure == structure;
    if (!offers) return whole_plan();
    const PlanOffer offer = PlanOffer::of(*kept, plan);
    if (star.is_coordinator()) {
      local.offers[0] = offer;
      ++local.offered;
    }
    ByteWriter out;
    out.u8(static_cast<uint8_t>(PlanMessage::kOffer));
    offer.encode(out);
    return out.take();
  });

  // One round, or two if only some ranks have what the others have kept.
  bool plans_are_wanted = false;
  bool is_hit = false;
  const auto decide = [&]() -> std::vector<Bytes> {
    if (local.offered == star.world_size() && is_as_kept(*kept, local.offers)) {
      auto answers = plan_again(*kept, writer, transport, coordinated, plan);
      is_hit = answers.has_value();
      if (is_hit) return std::move(*answers);
    }
    const bool others_sent_plans = local.offered == (offers ? size_t{1} : size_t{0});
    if (!others_sent_plans) {
      local.offered = 0;
      local.only_plans = plans_are_wanted = true;
      return {{static_cast<std::byte>(PlanMessage::kSendPlan)}};
    }
    local.plans[0] = std::move(plan);
    if (cache != nullptr) local.structures[0] = structure;
    const bool all_keep = std::ranges::all_of(local.structures, [](const auto& known) { return known.has_value(); });
    kept = all_keep ? std::make_unique<Kept>() : nullptr;
    return plan_globally(std::move(local), planner, writer, transport, coordinated, plan, kept);
  };
  const Star::Coordination planning = {
      .take = [&](int rank, ByteSpan payload) { local.take(rank, payload); }, .decide = decide, .decide_name = "plan"};
  Bytes answer = star.finish(Step::kPlan, std::move(part), planning);
  if (!star.is_coordinator()) {
    plans_are_wanted = !answer.empty() && answer[0] == static_cast<std::byte>(PlanMessage::kSendPlan);
  }
  if (std::exchange(plans_are_wanted, false)) {
    offers = false;
    answer = star.finish(Step::kPlan, star.attempt(Step::kPlan, whole_plan), planning);
  }

  StorageContext context{.save_id = coordinated.result.save_id,
                         .rank = star.rank(),
                         .world_size = static_cast<int>(star.world_size()),
                         .progress = [&](const Progress& done) {
                           transport.heartbeat();
                           if (progress) progress(done);
                         }};
  part = star.attempt(Step::kTransfer, [&] {
    Vote vote;
    if (star.is_coordinator()) {
      vote.plan = coordinated.expected[0].plan;
    } else {
      if (cache == nullptr) {
        kept = nullptr;
      } else if (kept == nullptr) {
        kept = std::make_unique<Kept>();
      }
      Assignment assignment = Assignment::decode(answer, plan.items.size(), kept);
      if (kept != nullptr) kept->structure = structure;
      context.save_id = std::move(assignment.save_id);
      plan = std::move(assignment.plan);
      vote.plan = assignment.digest;
      is_hit = !assignment.is_new;
    }
    plan = planner.finish_plan(std::move(plan));
    test_point("save.before_write");
    const std::vector<WriteResult> results = writer.write_data(plan, planner, context);
    test_point("save.written");
    ReceiptsDigest receipts;
    for (const WriteResult& result : results) {
      receipts.add(result.index, result.storage);
      if (!writer.places_are_final()) vote.places.push_back({result.storage.offset, result.storage.length});
    }
    vote.receipts = shorten(receipts.finish());
    vote.sidecar = writer.sidecar_digest();
    if (star.is_coordinator()) take_vote(vote, 0, coordinated);
    test_point("save.before_vote");
    return vote.encode();
  });
  const Bytes outcome =
      star.finish(Step::kTransfer, std::move(part),
                  {.take = [&](int rank, ByteSpan payload) { take_vote(Vote::decode(payload), rank, coordinated); },
                   .decide =
                       [&] {
                         name_sidecars(coordinated);
                         test_point("save.before_commit");
                         writer.finish(coordinated.metadata, context, committed);
                         committed = Committed::kYes;
                         test_point("save.after_commit");
                         ByteWriter out;
                         out.varint(coordinated.result.bytes_written);
                         out.varint(coordinated.result.items);
                         return std::vector<Bytes>{out.take()};
                       },
                   .decide_name = "commit"},
                  true, committed);
  star.check_all_answered(Step::kTransfer, committed);
  if (cache != nullptr) SavePlanCacheAccess::keep(*cache, std::move(kept), is_hit);
  if (star.is_coordinator()) return coordinated.result;
  ByteReader in(outcome, "outcome of the save");
  SaveResult result{.save_id = context.save_id};
  result.bytes_written = in.varint();
  result.items = in.varint();
  return result;
}

LoadReport load(Star& star, Transport& transport, LoadState& state, LoadPlanner& planner, StorageReader& reader,
                const ProgressFn& progress) {
  Metadata metadata;
  auto part = star.attempt(Step::kMetadata, [&] {
    test_point("load.before_metadata");
    return Bytes();
  });
  const Bytes catalogue =
      star.finish(Step::kMetadata, std::move(part),
                  {.take = {},
                   .decide =
                       [&] {
                         metadata = reader.read_metadata();
                         test_point("load.metadata_read");
                         return std::vector<Bytes>{star.world_size() == 1 ? Bytes() : encode_catalogue(metadata)};
                       },
                   .decide_name = "metadata"});

  LoadPlan plan;
  part = star.attempt(Step::kPlan, [&] {
    if (!star.is_coordinator()) metadata = decode_catalogue(catalogue);
    reader.set_up_storage_reader(metadata);
    planner.set_up_planner(state, metadata, star.is_coordinator());
    plan = planner.create_local_plan();
    test_point("load.planned");
    return Bytes();
  });
  star.finish(Step::kPlan, std::move(part), {.take = {}, .decide = {}, .decide_name = "plan"});

  part = star.attempt(Step::kTransfer, [&] {
    const StorageContext context{.save_id = {},
                                 .rank = star.rank(),
                                 .world_size = static_cast<int>(star.world_size()),
                                 .progress = [&](const Progress& done) {
                                   transport.heartbeat();
                                   if (progress) progress(done);
                                 }};
    test_point("load.before_read");
    reader.read_data(plan, planner, context);
    test_point("load.read");
    return Bytes();
  });
  star.finish(Step::kTransfer, std::move(part), {.take = {}, .decide = {}, .decide_name = "read"});
  star.check_all_answered(Step::kTransfer, Committed::kNo);
  return planner.report();
}

}  // namespace

SaveResult run_save(Transport& transport, const SaveState& state, SavePlanner& planner, StorageWriter& writer,
                    const ProgressFn& progress, SavePlanCache* cache) {
  Star star(transport, Operation::kSave);
  try {
    return save(star, transport, state, planner, writer, progress, cache);
  } catch (const CheckpointError& error) {
    if (error.committed() == Committed::kNo) writer.abandon();
    throw;
  } catch (...) {
    throw CheckpointError("save", {{star.rank(), caught_failure()}}, Committed::kUnknown);
  }
}

LoadReport run_load(Transport& transport, LoadState& state, LoadPlanner& planner, StorageReader& reader,
                    const ProgressFn& progress) {
  Star star(transport, Operation::kLoad);
  try {
    return load(star, transport, state, planner, reader, progress);
  } catch (const CheckpointError&) {
    throw;
  } catch (...) {
    throw CheckpointError("load", {{star.rank(), caught_failure()}}, Committed::kNo);
  }
}

}  // namespace reshard
