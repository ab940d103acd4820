// Schedules, for batches and passes of all kinds: what the kernels rely on.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "cpu/plan.h"

namespace geot::test {
namespace {

using cpu::Inputs;
using cpu::Pass;
using cpu::Plan;

// A schedule visits every pair of atoms once, and no two jobs that may run at once share a sum.
void test_plan(const std::vector<int64_t>& sizes, int64_t heads, bool is_filter, Pass pass,
               bool sums_radial) {
  std::vector<int64_t> ptr{0};
  for (const int64_t n : sizes) ptr.push_back(ptr.back() + n);
  Inputs<float> in{};
  in.num_molecules = sizes.size();
  in.num_rows = ptr.back();
  in.num_heads = heads;
  in.head_dim = 24;
  in.is_filter = is_filter;
  in.radial.num_knots = 64;
  in.ptr = ptr.data();
  const Plan plan(in, pass, sums_radial);
  const cpu::Schedule& schedule = plan.schedule();
  CHECK(schedule.num_groups * schedule.heads_per_group >= heads);
  CHECK((schedule.num_groups - 1) * schedule.heads_per_group < heads);

  std::vector<std::vector<int>> visits;  // of each molecule and group: [row chunk, key chunk]
  for (int64_t b = 0; b < schedule.num_molecules; ++b) {
    const cpu::Molecule& m = schedule.molecules[b];
    CHECK(m.chunk_begin(0) == 0 && m.chunk_begin(m.chunks) == m.count);
    for (int64_t r = 0; r < m.chunks; ++r) {
      CHECK(m.chunk_begin(r) < m.chunk_begin(r + 1) && m.chunk_begin(r) % cpu::kRows == 0);
    }
    CHECK((m.large >= 0) == (m.chunks > 1) && m.large < schedule.num_large);
    CHECK(m.large >= 0 || m.count <= schedule.largest_small);
    visits.resize(visits.size() + schedule.num_groups, std::vector<int>(m.chunks * m.chunks));
  }
  for (int64_t s = 0; s < schedule.num_steps; ++s) {
    std::vector<int64_t> parts, rows, keys;  // that a job of this step writes to
    const int64_t last = schedule.steps[s + 1];
    for (int64_t n = schedule.steps[s]; n < last; ++n) {
      const cpu::Job& job = schedule.jobs[n];
      CHECK(job.group >= 0 && job.group < schedule.num_groups);
      if (schedule.num_slots) {
        CHECK(job.slot >= 0 && job.slot < schedule.num_slots);
        parts.push_back(job.slot * schedule.num_groups + job.group);
      }
      for (int64_t at = job.first_item; at < job.last_item; ++at) {
        const cpu::Item& item = schedule.items[at];
        const int64_t chunks = schedule.molecules[item.molecule].chunks;
        const int64_t owner = item.molecule * schedule.num_groups + job.group;
        for (int64_t r = 0; r < chunks; ++r) {
          for (int64_t k = 0; k < chunks; ++k) {
            const bool has_rows = item.rows == cpu::kAll || item.rows == r;
            const bool has_keys = item.keys == cpu::kAll || item.keys == k;
            visits[owner][r * chunks + k] += has_rows && has_keys;
          }
        }
        rows.push_back(owner * 64 + item.rows);
        if (pass != Pass::kForward) keys.push_back(owner * 64 + item.keys);
      }
    }
    for (std::vector<int64_t>* written : {&parts, &rows, &keys}) {
      std::sort(written->begin(), written->end());
      CHECK(std::adjacent_find(written->begin(), written->end()) == written->end());
    }
  }
  for (const std::vector<int>& of_molecule : visits) {
    for (const int count : of_molecule) CHECK(count == 1);
  }
}

void test_plans() {
  const std::vector<std::vector<int64_t>> batches = {
      {},     {0, 0},    {1},         {64},
      {65},   {256},     {257},       {300, 130, 70},
      {2049}, {5000, 3}, {9, 300, 1}, {300, 257, 256, 3, 3, 0, 3, 3, 3, 280}};
  for (const auto& sizes : batches) {
    for (const int64_t heads : {1, 8, 9, 20}) {
      for (const Pass pass : {Pass::kForward, Pass::kBackward, Pass::kSecondBackward}) {
        for (const bool is_filter : {false, true}) {
          for (const bool sums : {false, true}) test_plan(sizes, heads, is_filter, pass, sums);
        }
      }
    }
  }
  test_plan(std::vector<int64_t>(500, 18), 9, true, Pass::kBackward, true);
}

}  // namespace
}  // namespace geot::test

int main() {
  geot::test::test_plans();
  return summary();
}
