// How a pass runs: workers take jobs, the partial sums of slots and groups are added up in a fixed
// order, padded rows become 0.
#pragma once

#include <atomic>

#include "molecule.h"

namespace geot::cpu::GEOT_ISA {

// Calls body(i) for 0 <= i < count, each in whatever thread is free.
template <class Body>
void in_parallel(RunThreads run_threads, int64_t count, bool is_small, Body&& body) {
  struct Shared {
    Body& body;
    int64_t count;
    std::atomic<int64_t> next{0};
  } shared{body, count};
  const auto run = [](void* p) {
    Shared& s = *static_cast<Shared*>(p);
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) s.body(i);
  };
  if (is_small || count <= 1) {
    run(&shared);
  } else {
    run_threads(count, run, &shared);
  }
}

// The next molecule of a job, where it is worth asking for its rows in advance.
inline const Molecule* next_small(const Schedule& schedule, const Job& job, int64_t item) {
  constexpr int64_t kSmall = 64;
  if (item + 1 >= job.last_item) return nullptr;
  const Molecule& m = schedule.molecules[schedule.items[item + 1].molecule];
  return m.large < 0 && m.count <= kSmall ? &m : nullptr;
}

// Step by step, Worker(args...) in each thread, worker.run(job) for each job of the step.
template <class Worker, class Call, class Shared>
void run_jobs(const Call& call, const Schedule& schedule, Shared& data) {
  for (int64_t s = 0; s < schedule.num_steps; ++s) {
    const Job* jobs = schedule.jobs + schedule.steps[s];
    const int64_t count = schedule.steps[s + 1] - schedule.steps[s];
    struct Context {
      const Call& call;
      const Schedule& schedule;
      Shared& data;
      const Job* jobs;
      int64_t count;
      std::atomic<int64_t> next{0};
    } context{call, schedule, data, jobs, count};
    const auto body = [](void* p) {
      Context& c = *static_cast<Context*>(p);
      int64_t i = c.next.fetch_add(1, std::memory_order_relaxed);
      if (i >= c.count) return;
      Arena arena(Arena::kThread);
      Worker& worker =
          *new (arena.template take<Worker>(1)) Worker(arena, c.call, c.schedule, c.data);
      for (; i < c.count; i = c.next.fetch_add(1, std::memory_order_relaxed)) worker.run(c.jobs[i]);
    };
    if (schedule.is_small || count <= 1) {
      body(&context);
    } else {
      call.run_threads(count, body, &context);
    }
  }
}

// body(molecule, group, place in [large, group]) for the molecules that several jobs share.
template <class Body>
void for_each_large(const Schedule& schedule, Body body) {
  for (int64_t b = 0; b < schedule.num_molecules; ++b) {
    const Molecule& m = schedule.molecules[b];
    for (int64_t g = 0; m.large >= 0 && g < schedule.num_groups; ++g) {
      body(m, g, m.large * schedule.num_groups + g);
    }
  }
}
// The same, each in whatever thread is free.
template <class Body>
void for_each_large(RunThreads run_threads, const Schedule& schedule, Body body) {
  if (schedule.num_large == 0) return;
  in_parallel(run_threads, schedule.num_molecules * schedule.num_groups, false, [&](int64_t n) {
    const Molecule& m = schedule.molecules[n / schedule.num_groups];
    const int64_t g = n % schedule.num_groups;
    if (m.large >= 0) body(m, g, m.large * schedule.num_groups + g);
  });
}

template <class T>
void zero_padding(const Rows<T>& rows, const Schedule& schedule, int64_t heads, int64_t head_dim) {
  if (!rows) return;
  for (int64_t i = 0; i < schedule.num_padding; ++i) {
    for (int64_t h = 0; h < heads; ++h) {
      T* p = rows.at(schedule.padding_batch[i], schedule.padding_atom[i], h);
      for (int64_t d = 0; d < head_dim; ++d) p[d] = 0;
    }
  }
}
template <class T>
void zero_padding(T* rows, const Schedule& schedule, int64_t width) {
  if (rows == nullptr) return;
  for (int64_t i = 0; i < schedule.num_padding; ++i) {
    for (int64_t d = 0; d < width; ++d) rows[schedule.padding[i] * width + d] = 0;
  }
}

// A sum that several jobs contribute to: a part for each, or for `sharing` of them that write to
// different places; added up in a fixed order at the end. A single part is the result itself.
template <class T>
class Parts {
 public:
  Parts(Arena& arena, T* result, int64_t size, int64_t count, int64_t sharing = 1,
        bool needs_zeros = true)
      : result_(result), size_(size), count_(count), sharing_(sharing) {
    if (result == nullptr) return;
    parts_ = count == 1 ? result : arena.take<T>(size * count);
    if (needs_zeros) std::memset(static_cast<void*>(parts_), 0, size * count * sizeof(T));
  }
  T* part(int64_t i) const { return parts_ == nullptr ? nullptr : parts_ + i / sharing_ * size_; }
  void add_up(RunThreads run_threads) const {
    if (result_ == nullptr || count_ == 1) return;
    constexpr int64_t kPiece = 4096;
    in_parallel(run_threads, (size_ + kPiece - 1) / kPiece, size_ * count_ < 65536, [&](int64_t n) {
      const int64_t begin = n * kPiece, end = begin + kPiece < size_ ? begin + kPiece : size_;
      for (int64_t e = begin; e < end; ++e) result_[e] = parts_[e];
      for (int64_t p = 1; p < count_; ++p) {
        for (int64_t e = begin; e < end; ++e) result_[e] += parts_[p * size_ + e];
      }
    });
  }

 private:
  T *result_, *parts_ = nullptr;
  int64_t size_, count_, sharing_;
};

// A part for each slot; Gaussians' centers and widths belong to all groups: one for each of them.
template <class T>
Parts<T> affine_parts(Arena& arena, const Inputs<T>& inputs, const Schedule& schedule, T* result) {
  return {arena, result, 2 * inputs.num_affine, schedule.num_slots * schedule.num_groups};
}
template <class T>
Parts<T> radial_parts(Arena& arena, const Inputs<T>& inputs, const Schedule& schedule, T* result) {
  const Radial<T>& r = inputs.radial;
  if (!inputs.is_table()) {
    return {arena, result, (2 + inputs.num_channels()) * r.num_gaussians,
            schedule.num_slots * schedule.num_groups};
  }
  return {arena, result, r.num_tables * r.num_knots * 2 * inputs.num_channels(), schedule.num_slots,
          schedule.num_groups};
}

}  // namespace geot::cpu::GEOT_ISA
