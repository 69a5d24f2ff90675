// Attention over ranks against that over whole sequences in double precision: all ranks of a ring, hop after hop, and
// heads that are dealt to ranks.
#include "../../kernels/contexts.cu"
#include <deque>

#include "attention_reference.h"
#include "rows.h"

// The positions of a rank's rows.
static std::vector<int> positions_of(int rank, int ranks, int sequence) {
  std::vector<int> all;
  int half = sequence / 2;
  for (int i = 0; i < half; ++i) all.push_back(rank * half + i);
  for (int i = 0; i < half; ++i) all.push_back((2 * ranks - 1 - rank) * half + i);
  return all;
}

// A rank's rows, `width` elements each, of those of whole sequences.
template <class V> V rows_of(const V& whole, size_t width, int sequences, int rank, int ranks, int sequence) {
  V own;
  for (int s = 0; s < sequences; ++s) {
    for (int at : positions_of(rank, ranks, sequence)) {
      auto from = whole.begin() + long((size_t(s) * ranks * sequence + size_t(at)) * width);
      own.insert(own.end(), from, from + long(width));
    }
  }
  return own;
}

// The same of [sequences, heads, sequence].
static Numbers64 stats_of(const Numbers64& whole, int sequences, int heads, int rank, int ranks, int sequence) {
  return rows_of(whole, 1, sequences * heads, rank, ranks, sequence);
}

// Whose keys rank `me` meets after `hop` hops.
static Part part_of(int me, int hop, int ranks, int sequence, int window, const uint32_t* starts, Drops drops) {
  int of = (me + ranks - hop) % ranks, half = sequence / 2, far = 2 * ranks - 1;
  return {of > me ? half : 0, of < me ? half : sequence, of == me, half, me * half, (far - me) * half,
          of * half, (far - of) * half, window, starts, drops};
}

template <class T> void ring(AttentionShape whole, int ranks, uint64_t seed) {
  Random r(seed);
  int sequence = whole.sequence / ranks, sequences = whole.sequences, rows = sequences * sequence;
  auto qkv = random_values<T>(r, whole.qkv_len(), 2.5), d_o = random_values<T>(r, whole.o_len());
  auto expected = attention_reference(whole, numbers_of(qkv), numbers_of(d_o));
  auto sinks = std::vector<T>(whole.sinks.size());
  for (size_t i = 0; i < sinks.size(); ++i) put_f32(&sinks[i], float(whole.sinks[i]));
  Heads h{whole.heads, whole.kv_heads, whole.dim, whole.values()};
  size_t row = 32 * size_t(h.dim + 1), value_row = 32 * size_t(h.value_dim + 1), kv_len = size_t(rows) * h.kv();
  unsigned blocks = unsigned(sequence + 31) / 32;
  dim3 queries(blocks, h.heads, sequences), keys(blocks, h.kv_heads, sequences), lines(rows), block(256);
  std::string is = std::string("ring ") + (sizeof(T) == 2 ? "bf16 " : "f32 ") + std::to_string(ranks) + " ranks d" +
                   std::to_string(h.dim) + "/" + std::to_string(h.value_dim) + " seed " + std::to_string(seed) + " ";
  // Of each rank: its rows, and what it packs for the others.
  std::deque<Buffer<T>> own, kv;
  std::vector<Numbers64> home(ranks, Numbers64(kv_len));
  LeftOut left_out(whole);
  for (int me = 0; me < ranks; ++me) {
    own.emplace_back(rows_of(qkv, whole.width(), sequences, me, ranks, sequence));
    kv.emplace_back(kv_len);
    RUN(T, ring_pack, lines, block, own[me].ptr(), kv[me].ptr(), h);
  }
  for (int me = 0; me < ranks; ++me) {
    Buffer<T> grads(rows_of(d_o, h.out(), sequences, me, ranks, sequence)), o(size_t(rows) * h.out()), sink(sinks);
    Buffer<uint32_t> starts(whole.starts.empty() ? whole.starts : rows_of(whole.starts, 1, sequences, me, ranks, sequence));
    Buffer<float> sums(size_t(rows) * h.out()), tops(size_t(rows) * h.heads), totals(size_t(rows) * h.heads);
    Buffer<float> maxima(size_t(rows) * h.heads), dq(size_t(rows) * h.queries()), delta(size_t(rows) * h.heads);
    auto met = [&](int hop) {
      auto documents = whole.starts.empty() ? nullptr : starts.ptr();
      return part_of(me, hop, ranks, sequence, whole.window, documents, left_out.of(whole, 0));
    };
    for (int hop = 0; hop < ranks; ++hop) {
      auto kernel = OF(T, ring_fwd);
      LAUNCH(kernel, queries, block, 4 * (2 * row + value_row + 32 * 33), own[me].ptr(), kv[(me + ranks - hop) % ranks].ptr(),
             sinks.empty() ? nullptr : sink.ptr(), sums.ptr(), tops.ptr(), totals.ptr(), sequence, h, whole.scale(), met(hop));
    }
    RUN(T, ring_end, lines, block, sums.ptr(), totals.ptr(), tops.ptr(), maxima.ptr(), o.ptr(), sequence, h);
    auto of = is + "rank " + std::to_string(me) + " ";
    check(of + "o", o.read(), rows_of(expected.o, h.out(), sequences, me, ranks, sequence), tolerance<T>());
    check(of + "lse", tops.read(), stats_of(expected.lse, sequences, h.heads, me, ranks, sequence), 1e-6);
    if (sinks.empty()) {
      check(of + "maxima", maxima.read(), stats_of(expected.maxima, sequences, h.heads, me, ranks, sequence), 1e-6);
    }
    // What comes before the derivative is another file's.
    std::vector<float> dots;
    auto o64 = rows_of(expected.o, h.out(), sequences, me, ranks, sequence), g64 = numbers_of(grads.read());
    for (int s = 0; s < sequences; ++s) {
      for (int head = 0; head < h.heads; ++head) {
        for (int t = 0; t < sequence; ++t) {
          size_t at = (size_t(s) * sequence + t) * h.out() + size_t(head) * h.value_dim;
          dots.push_back(float(dot_of(&o64[at], &g64[at], h.value_dim)));
        }
      }
    }
    delta.write(dots);
    for (int hop = 0; hop < ranks; ++hop) {
      int from = (me + ranks - hop) % ranks;
      Buffer<float> dkv(kv_len);
      size_t bytes = 4 * (2 * row + 2 * value_row + 64 * 33);
      auto of_keys = OF(T, ring_dkv), of_queries = OF(T, ring_dq);
      LAUNCH(of_keys, keys, block, bytes, own[me].ptr(), kv[from].ptr(), grads.ptr(), tops.ptr(), delta.ptr(), dkv.ptr(),
             sequence, h, whole.scale(), met(hop));
      LAUNCH(of_queries, queries, block, bytes, own[me].ptr(), kv[from].ptr(), grads.ptr(), tops.ptr(), delta.ptr(), dq.ptr(),
             sequence, h, whole.scale(), met(hop));
      auto part = numbers_of(dkv.read());
      for (size_t i = 0; i < kv_len; ++i) home[from][i] += part[i];
    }
    Buffer<float> zeros(std::vector<float>(kv_len, 0.0f));
    Buffer<T> dqkv(size_t(rows) * h.packed());
    RUN(T, ring_end_dx, lines, block, dq.ptr(), zeros.ptr(), dqkv.ptr(), whole.scale(), h);
    AttentionShape mine = whole;
    mine.sequence = sequence;
    auto theirs = rows_of(expected.dqkv, whole.width(), sequences, me, ranks, sequence);
    check(of + "dq", heads_of(mine, dqkv.read(), 0), heads_of(mine, theirs, 0), tolerance<T>());
  }
  for (int me = 0; me < ranks; ++me) {
    AttentionShape mine = whole;
    mine.sequence = sequence;
    Numbers64 theirs, all = rows_of(expected.dqkv, whole.width(), sequences, me, ranks, sequence);
    for (int i = 0; i < rows; ++i) {
      theirs.insert(theirs.end(), all.begin() + long(i * whole.width() + h.queries()), all.begin() + long((i + 1) * whole.width()));
    }
    std::vector<float> got(home[me].begin(), home[me].end());
    check(is + "dkv of rank " + std::to_string(me), got, theirs, 3e-6);
  }
}

template <class T> void deal(int sequences, int sequence, int ranks, Heads h, uint64_t seed) {
  Random r(seed);
  int copies = h.kv_heads > 0 && h.kv_heads < ranks ? ranks / h.kv_heads : 1;
  int q = h.heads / ranks, kv = h.kv_heads * copies / ranks, width = q * h.dim + kv * (h.dim + h.value_dim);
  auto rows = random_values<T>(r, size_t(sequences) * sequence * h.packed());
  auto parts = random_values<T>(r, size_t(sequences) * ranks * sequence * width);
  std::vector<T> split(parts.size());
  std::vector<float> join(rows.size(), 0.0f);
  for (int s = 0; s < sequences; ++s) {
    for (int rank = 0; rank < ranks; ++rank) {
      for (int t = 0; t < sequence; ++t) {
        size_t from = size_t(s * sequence + t) * h.packed(), to = size_t((s * ranks + rank) * sequence + t) * width;
        auto move = [&](int heads, int count, int dim) {
          for (int i = 0; i < count * dim; ++i) {
            size_t at = from + size_t(rank * heads / ranks * dim + i);
            split[to + i] = rows[at];
            join[at] += float(number(parts[to + i]));
          }
          from += size_t(heads * dim), to += size_t(count * dim);
        };
        move(h.heads, q, h.dim), move(h.kv_heads, kv, h.dim), move(h.kv_heads, kv, h.value_dim);
      }
    }
  }
  std::vector<T> joined(join.size());
  for (size_t i = 0; i < join.size(); ++i) put_f32(&joined[i], join[i]);
  Buffer<T> drows(rows), dparts(parts), to_parts(parts.size()), to_rows(rows.size());
  RUN(T, split_heads, dim3(sequences * ranks * sequence), dim3(64), drows.ptr(), to_parts.ptr(), sequence, width, ranks, h);
  RUN(T, join_heads, dim3(sequences * sequence), dim3(64), dparts.ptr(), to_rows.ptr(), sequence, width, ranks, h);
  auto is = name<T>("heads dealt", sequences * sequence, h.packed(), seed) + " to " + std::to_string(ranks);
  check_same(is, to_parts.read(), split);
  check_same(is + ", back", to_rows.read(), joined);
}

template <class T> void all() {
  ring<T>({2, 96, 2, 1, 16}, 2, 1);
  ring<T>({1, 160, 4, 2, 24}, 4, 2);
  AttentionShape latent{1, 80, 2, 2, 24};
  latent.value_dim = 16;
  ring<T>(latent, 2, 3);
  Random r(5);
  AttentionShape bounded{2, 144, 2, 1, 16};
  bounded.window = 37;
  bounded.starts = some_documents(r, 2, 144);
  bounded.sinks = {0.5, -1.25};
  ring<T>(bounded, 3, 4);
  bounded.starts.clear();
  ring<T>(bounded, 4, 5);
  bounded.leave_some_out(r);
  ring<T>(bounded, 4, 6);
  AttentionShape dropped{2, 80, 4, 2, 24};
  dropped.leave_some_out(r);
  ring<T>(dropped, 2, 7);
  deal<T>(2, 3, 2, {4, 2, 6, 4}, 1);
  deal<T>(1, 5, 4, {8, 2, 4, 4}, 2);
  deal<T>(2, 3, 3, {3, 1, 4, 8}, 3);
  deal<T>(2, 2, 2, {4, 0, 8, 0}, 4);
}

int main() {
  all<bf16>();
  all<float>();
  return finish();
}
