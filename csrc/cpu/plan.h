// Makes a Schedule. Compiled once, not for each instruction set.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "call.h"
#include "schedule.h"

namespace geot::cpu {

enum class Pass { kForward, kBackward, kSecondBackward };

class Plan {
 public:
  template <class T>
  Plan(const Inputs<T>& inputs, Pass pass, bool sums_radial) {
    find_molecules(inputs);
    check_types(inputs);
    schedule_.heads_per_group = kHeadsOfGroup;
    schedule_.num_groups =
        (inputs.num_heads + schedule_.heads_per_group - 1) / schedule_.heads_per_group;
    cut_molecules();
    int64_t pairs = 0;
    for (const Molecule& m : molecules_) pairs += m.count * m.count;
    schedule_.is_small = pairs * inputs.num_heads * inputs.head_dim < kSmall;

    // A slot has its own table to pack and its own gradient to add up: that many pairs pay for it.
    const bool slots = sums_radial || (pass == Pass::kForward && inputs.is_filter);
    const int64_t entries = inputs.radial.num_tables * inputs.radial.num_knots;
    const int64_t paid = entries ? pairs / ((inputs.is_filter ? 64 : 8) * entries) : pairs / 4096;
    schedule_.num_slots = slots ? std::clamp<int64_t>(paid, 1, 32) : 0;

    if (pass == Pass::kForward) {
      add_step(pairs,
               [](const Molecule& m, int64_t r) { return Item{0, m.chunks > 1 ? r : kAll, kAll}; });
    } else {
      int64_t steps = 1;
      for (const Molecule& m : molecules_) steps = std::max(steps, m.chunks);
      for (int64_t s = 0; s < steps; ++s) {
        add_step(pairs, [s](const Molecule& m, int64_t r) {
          if (m.chunks == 1) return Item{s ? -1 : 0, kAll, kAll};
          return s < m.chunks ? Item{0, r, (r + s) % m.chunks} : Item{-1, 0, 0};
        });
      }
    }
    schedule_.one_job_a_part =
        int64_t(jobs_.size()) == schedule_.num_slots * schedule_.num_groups && steps_.size() == 2;
    schedule_.molecules = molecules_.data();
    schedule_.num_molecules = molecules_.size();
    schedule_.items = items_.data();
    schedule_.jobs = jobs_.data();
    schedule_.steps = steps_.data();
    schedule_.num_steps = steps_.size() - 1;
    schedule_.padding = padding_.data();
    schedule_.padding_batch = padding_batch_.data();
    schedule_.padding_atom = padding_atom_.data();
    schedule_.num_padding = padding_.size();
  }

  Plan(const Plan&) = delete;
  const Schedule& schedule() const { return schedule_; }

 private:
  static constexpr int64_t kHeadsOfGroup = 8;
  static constexpr int64_t kSmall = 400'000;  // multiply-adds of a product: about 10 µs
  static constexpr int64_t kWhole =
      256;  // atoms of a molecule that is one item, if there are others
  static constexpr int64_t kWholeAlone = 64;  // and if there are not
  static constexpr int64_t kEnoughItems = 8;

  template <class T>
  void find_molecules(const Inputs<T>& inputs) {
    const int64_t num_molecules = inputs.num_molecules, num_atoms = inputs.num_atoms;
    atoms_.reserve(inputs.num_rows);
    molecules_.reserve(num_molecules);
    for (int64_t b = 0; b < num_molecules; ++b) {
      const int64_t first = atoms_.size();
      if (inputs.ptr != nullptr) {
        const int64_t begin = inputs.ptr[b], end = inputs.ptr[b + 1];
        if (begin != first || end < begin || end > inputs.num_rows) {
          throw std::invalid_argument(
              "ptr: expected numbers rising from 0 to T=" + std::to_string(inputs.num_rows) +
              ", got " + std::to_string(begin) + ", " + std::to_string(end));
        }
        for (int64_t n = begin; n < end; ++n) atoms_.push_back(n);
      } else {
        for (int64_t n = 0; n < num_atoms; ++n) {
          if (inputs.mask == nullptr || inputs.mask[b * num_atoms + n]) {
            atoms_.push_back(n);
          } else {
            padding_.push_back(b * num_atoms + n);
            padding_batch_.push_back(b);
            padding_atom_.push_back(n);
          }
        }
      }
      const int64_t count = int64_t(atoms_.size()) - first;
      const bool packed = inputs.ptr != nullptr;
      if (count > 0) {
        molecules_.push_back(
            {packed ? 0 : b, atoms_.data() + first, count, packed ? 0 : b * num_atoms, 1, -1});
      }
    }
    if (inputs.ptr != nullptr && int64_t(atoms_.size()) != inputs.num_rows) {
      throw std::invalid_argument("ptr: expected to end at T=" + std::to_string(inputs.num_rows) +
                                  ", got " + std::to_string(atoms_.size()));
    }
  }

  template <class T>
  void check_types(const Inputs<T>& inputs) const {
    if (inputs.pair_index == nullptr) return;
    for (const Molecule& m : molecules_) {
      for (int64_t i = 0; i < m.count; ++i) {
        const int64_t type = inputs.atom_types[m.first_row + m.atoms[i]];
        if (type < 0 || type >= inputs.num_types) {
          throw std::invalid_argument("atom_types: expected 0 to " +
                                      std::to_string(inputs.num_types - 1) + ", got " +
                                      std::to_string(type));
        }
      }
    }
    const int64_t tables = inputs.radial.num_tables, maps = inputs.num_affine;
    const int64_t pairs = std::max(tables, maps);
    for (int64_t i = 0; i < inputs.num_types * inputs.num_types; ++i) {
      const int64_t pair = inputs.pair_index[i];
      if (pair < 0 || pair >= pairs) {
        throw std::invalid_argument("pair_index: expected 0 to " + std::to_string(pairs - 1) +
                                    ", got " + std::to_string(pair));
      }
    }
  }

  void cut_molecules() {
    const int64_t items = int64_t(molecules_.size()) * schedule_.num_groups;
    const int64_t whole = items >= kEnoughItems ? kWhole : kWholeAlone;
    schedule_.num_large = schedule_.largest_small = 0;
    for (Molecule& m : molecules_) {
      if (m.count > whole) {
        m.chunks = std::clamp<int64_t>(2 * ((m.count + 2 * whole - 1) / (2 * whole)), 2, 32);
        m.large = schedule_.num_large++;
      } else {
        schedule_.largest_small = std::max(schedule_.largest_small, m.count);
      }
    }
  }

  // Deals a step's items out: to slots in turn by their number of pairs, or to a job each.
  template <class MakeItem>
  void add_step(int64_t pairs, MakeItem make_item) {
    if (steps_.empty()) steps_.push_back(0);
    const int64_t first = items_.size();
    std::vector<int64_t> slots;
    int64_t before = 0;
    for (int64_t b = 0; b < int64_t(molecules_.size()); ++b) {
      const Molecule& m = molecules_[b];
      for (int64_t r = 0; r < m.chunks; ++r) {
        Item item = make_item(m, r);
        if (item.molecule >= 0) {
          item.molecule = b;
          items_.push_back(item);
          slots.push_back(before * schedule_.num_slots / std::max<int64_t>(pairs, 1));
        }
        before += m.count * m.count / m.chunks;
      }
    }
    const int64_t last = items_.size();
    for (int64_t group = 0; group < schedule_.num_groups; ++group) {
      int64_t begin = first;
      while (begin < last) {
        int64_t end = begin + 1;
        if (schedule_.num_slots > 0) {
          while (end < last && slots[end - first] == slots[begin - first]) ++end;
        }
        jobs_.push_back({slots[begin - first], group, begin, end});
        begin = end;
      }
    }
    steps_.push_back(jobs_.size());
  }

  Schedule schedule_{};
  std::vector<int64_t> atoms_, padding_, padding_batch_, padding_atom_, steps_;
  std::vector<Molecule> molecules_;
  std::vector<Item> items_;
  std::vector<Job> jobs_;
};

}  // namespace geot::cpu
