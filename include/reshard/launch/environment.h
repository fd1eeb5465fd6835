// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The environment contract between a launcher and its ranks: the variables that torchrun sets, and one of our own.
//
//   RANK, WORLD_SIZE               this process's number and the number of processes; required
//   MASTER_ADDR, MASTER_PORT       where rank 0 (or the launcher) serves the store; required
//   LOCAL_WORLD_SIZE, LOCAL_RANK   the same on this host; default: every rank is on this host
//   TORCHELASTIC_USE_AGENT_STORE   "True" when the launcher itself serves the store, so that rank 0 must not
//   RESHARD_MASTER_LISTEN_FD       rank 0 only: a listening socket bound to MASTER_PORT, opened by the launcher, for
//                                  rank 0's store to serve on: no port is chosen twice, none is taken meanwhile
//
// Where RANK and WORLD_SIZE are not set, those that started the processes are asked:
//
//   mpirun (Open MPI)              OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE. MASTER_ADDR must be set if the ranks are on several
//                                  hosts; MASTER_PORT must be set
//   srun (Slurm)                   SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE, SLURM_NODEID. MASTER_ADDR, if not
//                                  set, is the first host of SLURM_STEP_NODELIST; MASTER_PORT follows from the numbers of job and step

#include <cstdint>
#include <optional>
#include <string>

namespace reshard {

inline constexpr const char* kMasterListenFdVariable = "RESHARD_MASTER_LISTEN_FD";

/// What a launcher told this process.
struct RankEnvironment {
  int rank = 0;
  int world_size = 1;
  int local_rank = 0;
  int local_world_size = 1;
  std::string master_addr;
  uint16_t master_port = 0;
  bool agent_store = false;             // the launcher serves the store: connect as a client, also on rank 0
  std::optional<int> master_listen_fd;  // serve the store on this socket; owned by the caller from now on
};

/// Reads the contract from the process environment. Nothing of it set, and started by neither mpirun nor srun: nullopt, the process runs
/// alone. Partly set, not a number, out of range, or a listening socket that is none: throws kInvalidArgument naming the variable and its
/// value.
std::optional<RankEnvironment> read_rank_environment();

}  // namespace reshard
