// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Where checkpoints are kept. Names follow torch.distributed.checkpoint.storage. An implementation is used by one save
// or load at a time.
//
// Save, in call order:
//   1. coordinator    begin_save(save_id): looks at what is there; decides names that the committed checkpoint does not
//   use
//   2. coordinator    prepare_global_plan(plans): fills SavePlan::storage: the place of every item
//   3. all ranks      write_data(plan, planner, context): when it returns, this rank's data is durable
//   4. coordinator    finish(metadata, context): commits: atomically and durably
//   5. all ranks      abandon(): instead of 4, when any rank failed before the commit
// Load:
//   1. coordinator    read_metadata()
//   2. all ranks      set_up_storage_reader(metadata)
//   3. all ranks      read_data(plan, planner, context)

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "reshard/core/hooks.h"
#include "reshard/metadata/metadata.h"
#include "reshard/planner/planner.h"

namespace reshard {

/// Which save or load this is, and who takes part.
struct StorageContext {
  std::string save_id;  // of the save; empty when loading
  int rank = 0;
  int world_size = 1;
  /// Called from time to time while bytes move, from any thread; also tells the other ranks that this one is alive.
  ProgressFn progress;
};

/// Receipt for one written item.
struct WriteResult {
  MetadataIndex index;
  StorageInfo storage;
  friend bool operator==(const WriteResult&, const WriteResult&) = default;
};

class StorageWriter {
 public:
  virtual ~StorageWriter() = default;
  /// Checkpoint id as it goes into the catalogue (a path, a URL).
  virtual std::string checkpoint_id() const = 0;
  virtual void begin_save(const std::string& save_id) = 0;
  /// False if offsets and lengths are known only once the items are written (stream transforms). Those of the plan are
  /// guesses then, and the receipts' ones go into the catalogue. Asked of every rank.
  virtual bool places_are_final() const { return true; }
  /// Fills `storage` of every plan. Offsets and lengths must be exact, unless places_are_final() says otherwise: the
  /// commit trusts them.
  virtual std::vector<SavePlan> prepare_global_plan(std::vector<SavePlan> plans) = 0;
  /// Writes plan.items to plan.storage. Receipts come in the order of the items.
  virtual std::vector<WriteResult> write_data(const SavePlan& plan, const SavePlanner& planner,
                                              const StorageContext& context) = 0;
  /// After write_data: the digest of the sidecar that it wrote, which goes into the catalogue. Nothing from a storage
  /// without sidecars.
  virtual std::optional<SidecarDigest> sidecar_digest() const { return std::nullopt; }
  /// Makes the save the one that readers find. `committed` tells how far it came, also when it throws: kNo until the
  /// point of no return, kUnknown while that is not known to be durable, kYes after it. Clean-up of the older
  /// checkpoint's files comes last and only warns.
  virtual void finish(const Metadata& metadata, const StorageContext& context, Committed& committed) = 0;
  /// Removes what this rank wrote since write_data began. Does not throw.
  virtual void abandon() noexcept = 0;
};

class StorageReader {
 public:
  virtual ~StorageReader() = default;
  /// Throws kNotFound where there is no checkpoint, kCorruptData naming the file where it is broken.
  virtual Metadata read_metadata() = 0;
  virtual void set_up_storage_reader(const Metadata& metadata) = 0;
  virtual void read_data(const LoadPlan& plan, LoadPlanner& planner, const StorageContext& context) = 0;
};

}  // namespace reshard
