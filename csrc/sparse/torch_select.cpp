// The binding of selection, and of what turns bitmaps into patterns.
#include "common/convert.h"
#include "sparse/select.h"

namespace peftkern::sparse {
namespace {

constexpr int64_t kStep = 1 << 16;  // elements of a job

struct Score {
  const void* data;
  ScalarType dtype;
  int64_t rows, columns;
  int64_t position;  // of its first element among those of all

  int64_t count() const { return rows * columns; }
  int64_t words() const { return rows * words_of(columns); }
};

// A range of one of the scores, or of its words.
struct Job {
  size_t score;
  int64_t begin, end;
};

std::vector<Score> scores_of(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "scores must hold a tensor at least");
  std::vector<Score> scores;
  int64_t position = 0;
  for (const Tensor& tensor : tensors) {
    check_dense(tensor, "a score");
    STD_TORCH_CHECK(tensor.dim() == 2, "a score must be a matrix");
    size_of(tensor.scalar_type());  // refuses what is not float
    scores.push_back(
        {tensor.const_data_ptr(), tensor.scalar_type(), tensor.size(0), tensor.size(1), position});
    position += scores.back().count();
  }
  return scores;
}

Keys keys_of(const std::vector<Score>& scores, bool largest) {
  bool wide = false;
  for (const Score& score : scores) wide |= score.dtype == ScalarType::Double;
  return {wide, largest};
}

template <typename Size>
std::vector<Job> jobs_of(const std::vector<Score>& scores, int64_t step, const Size& size) {
  std::vector<Job> jobs;
  for (size_t s = 0; s < scores.size(); ++s) {
    for (int64_t begin = 0; begin < size(scores[s]); begin += step) {
      jobs.push_back({s, begin, std::min(begin + step, size(scores[s]))});
    }
  }
  return jobs;
}

// Calls f(kernels, the score's elements) in its dtype.
template <typename Function>
void with_score(const Score& score, const Function& f) {
  with_kernels(select_kernels(), score.dtype, [&](const auto& typed, auto* type) {
    f(typed, static_cast<const std::remove_pointer_t<decltype(type)>*>(score.data));
  });
}

void check_key(const Keys& keys, int64_t key, const char* name) {
  STD_TORCH_CHECK(key >= 0 && static_cast<uint64_t>(key) <= keys.infinity() + 1, name,
                  " must be a key, got ", key);
}

Tensor histogram(std::vector<Tensor> tensors, bool largest, int64_t low, int64_t shift,
                 int64_t bins) {
  const std::vector<Score> scores = scores_of(tensors);
  const Keys keys = keys_of(scores, largest);
  check_key(keys, low, "low");
  STD_TORCH_CHECK(shift >= 0 && shift < (keys.wide ? 64 : 32), "shift must be bits of a key, got ",
                  shift);
  STD_TORCH_CHECK(bins > 0 && bins <= kBins, "bins must be 1 to ", kBins, ", got ", bins);
  Tensor counts = empty({bins + 2}, ScalarType::Long);
  int64_t* to = counts.mutable_data_ptr<int64_t>();
  std::fill(to, to + bins + 2, 0);
  const Bins by{keys, static_cast<uint64_t>(low), static_cast<int>(shift), bins};
  const std::vector<Job> jobs = jobs_of(scores, kStep, [](const Score& s) { return s.count(); });
  parallel(static_cast<int64_t>(jobs.size()), kStep, [&](int64_t begin, int64_t end) {
    int64_t own[kBins + 2] = {};
    for (int64_t j = begin; j < end; ++j) {
      const Job& job = jobs[static_cast<size_t>(j)];
      with_score(scores[job.score], [&](const auto& typed, const auto* data) {
        typed.histogram(data + job.begin, job.end - job.begin, by, own);
      });
    }
    for (int64_t i = 0; i < bins + 2; ++i) {
      if (own[i]) __atomic_fetch_add(to + i, own[i], __ATOMIC_RELAXED);
    }
  });
  return counts;
}

struct Pick {
  const std::vector<Score>& scores;
  Picking by;
  std::vector<uint32_t*> bits;
  Candidates* candidates;

  // With the first `take` of the band.
  Picked run(const Job& job, int64_t take) const {
    const Score& score = scores[job.score];
    Picking own = by;
    own.columns = score.columns;
    Picked found{0, 0};
    with_score(score, [&](const auto& typed, const auto* data) {
      found = typed.pick(data, own, job.begin, job.end, take, candidates, score.position,
                         bits[job.score]);
    });
    return found;
  }
};

// The first `count` of the band, in the scores' order; only jobs that have some run once more.
void take_first(const Pick& pick, const std::vector<Job>& jobs, const std::vector<Picked>& found,
                int64_t count, int64_t* counts) {
  std::vector<int64_t> take;
  for (size_t j = 0; j < jobs.size() && count; ++j) {
    take.push_back(std::min(count, found[j].inside));
    count -= take.back();
    counts[jobs[j].score] += take.back();
  }
  parallel(static_cast<int64_t>(take.size()), kStep, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const auto i = static_cast<size_t>(j);
      if (take[i]) pick.run(jobs[i], take[i]);
    }
  });
}

// The `count` smallest of the band, equal ones in the scores' order.
void take_smallest(const Pick& pick, int64_t count, int64_t* counts) {
  Candidate *begin = pick.candidates->list, *end = begin + pick.candidates->count;
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.key < b.key || (a.key == b.key && a.position < b.position);
  };
  std::sort(begin, end, before);
  for (const Candidate* c = begin; c < std::min(end, begin + count); ++c) {
    size_t s = pick.scores.size() - 1;
    while (pick.scores[s].position > c->position) --s;
    const Score& score = pick.scores[s];
    const int64_t at = c->position - score.position, column = at % score.columns;
    pick.bits[s][at / score.columns * words_of(score.columns) + column / kWord] |=
        uint32_t{1} << column % kWord;
    ++counts[s];
  }
}

std::tuple<std::vector<Tensor>, Tensor> pick(std::vector<Tensor> tensors, bool largest, int64_t low,
                                             int64_t high, int64_t count) {
  const std::vector<Score> scores = scores_of(tensors);
  const Keys keys = keys_of(scores, largest);
  check_key(keys, low, "low");
  STD_TORCH_CHECK(high > low && count >= 0, "high must be above low, and count at least 0");
  high = std::min(high, static_cast<int64_t>(keys.infinity()) + 1);
  std::vector<Tensor> out;
  Pick pick{
      scores, {keys, static_cast<uint64_t>(low), static_cast<uint64_t>(high), 0}, {}, nullptr};
  for (const Score& score : scores) {
    out.push_back(empty({score.rows, words_of(score.columns)}, ScalarType::Int));
    pick.bits.push_back(reinterpret_cast<uint32_t*>(out.back().mutable_data_ptr<int32_t>()));
  }
  Tensor counted = empty({static_cast<int64_t>(scores.size())}, ScalarType::Long);
  int64_t* counts = counted.mutable_data_ptr<int64_t>();
  std::fill(counts, counts + scores.size(), 0);
  const bool among_many = count && high > low + 1;
  Scratch scratch;
  Candidates candidates{among_many ? scratch.take<Candidate>(kBand) : nullptr, 0};
  if (among_many) pick.candidates = &candidates;
  const std::vector<Job> jobs =
      jobs_of(scores, kStep / kWord, [](const Score& s) { return s.words(); });
  std::vector<Picked> found(jobs.size());
  parallel(static_cast<int64_t>(jobs.size()), kStep, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      found[static_cast<size_t>(j)] = pick.run(jobs[static_cast<size_t>(j)], 0);
    }
  });
  for (size_t j = 0; j < jobs.size(); ++j) counts[jobs[j].score] += found[j].below;
  if (!among_many) {
    take_first(pick, jobs, found, count, counts);
  } else {
    STD_TORCH_CHECK(candidates.count <= kBand, "[low, high) must hold one key or at most ", kBand,
                    " scores, got ", candidates.count);
    take_smallest(pick, count, counts);
  }
  return {out, counted};
}

}  // namespace

PEFTKERN_OPS(CPU, m) {
  m.impl("sparse_histogram", TORCH_BOX(&histogram));
  m.impl("sparse_pick", TORCH_BOX(&pick));
}

}  // namespace peftkern::sparse
