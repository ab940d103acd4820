// Who computes what, and in which order: decided by shapes alone, so that results have the same
// bits for any number of threads.
//
// A molecule of moderate size is one item. A large one is cut into R chunks of atoms, and an item
// is a chunk of its rows i against a chunk of its keys j. In step s row chunk r meets key chunk
// (r + s) mod R: within a step no two items write to the same atom, and over the steps each atom's
// sum has a fixed order. Items of a job run one after the other in one thread; all jobs of a step
// may run at once. A slot is the jobs that share one partial sum of the radial function's gradient.
#pragma once

#include <cstdint>

namespace geot::cpu {

constexpr int64_t kRows = 32;  // query atoms of a tile, key atoms of a block
constexpr int64_t kAll = -1;   // of an item: all keys

struct Molecule {
  int64_t batch;         // the first index of q
  const int64_t* atoms;  // [count]: its second index
  int64_t count;
  int64_t first_row;  // added to an atom: the row of [num_rows, ...]
  int64_t chunks;     // R
  int64_t large;      // number among those with R > 1, else -1

  int64_t chunk_begin(int64_t r) const {  // a multiple of the tile
    const int64_t tiles = (count + kRows - 1) / kRows;
    const int64_t begin = tiles * r / chunks * kRows;
    return begin < count ? begin : count;
  }
};

struct Item {
  int64_t molecule, rows, keys;  // the molecule's number; numbers of chunks, or kAll
};

struct Job {
  int64_t slot, group, first_item, last_item;
};

struct Schedule {
  const Molecule* molecules;
  int64_t num_molecules;
  const Item* items;
  const Job* jobs;       // of all steps
  const int64_t* steps;  // [num_steps + 1]: step s is jobs[steps[s] : steps[s + 1]]
  int64_t num_steps;
  const int64_t* padding;  // rows of [num_rows, ...] that are no atom
  const int64_t* padding_batch;
  const int64_t* padding_atom;
  int64_t num_padding;
  int64_t num_slots, num_groups, heads_per_group;
  int64_t num_large, largest_small;  // atoms of the largest molecule that is one item
  bool is_small;                     // not worth more than one thread
  bool one_job_a_part;  // each slot and group has one job in all, which sets its part of a sum
};

}  // namespace geot::cpu
