// Latent attention around its products, against its formulas in double precision.
#include "../../kernels/latent.cu"
#include "rows.h"

struct Shape {
  int n, sequence, queries, kv, shared;
  int cols() const { return queries + kv + shared; }
};

// Norms of both latents and the copy of the shared part, with the gradient of all.
template <class T> void norms(const Shape& s, uint64_t seed) {
  Random r(seed);
  auto c = random_values<T>(r, s.n * s.cols(), 1, 0.3), wkv = random_values<T>(r, s.kv, 1, 1);
  auto wq = random_values<T>(r, s.queries, 1, 1), dlatent = random_values<T>(r, s.n * s.kv);
  auto dshared = random_values<T>(r, s.n * s.shared), dqueries = random_values<T>(r, s.n * s.queries);
  const int count = s.queries > 0 ? 2 : 1;
  Numbers64 latent, queries, rstd, dc(s.n * s.cols());
  for (int row = 0; row < s.n; ++row) {
    for (int norm = 0; norm < count; ++norm) {
      int dim = norm ? s.queries : s.kv, at = row * s.cols() + (norm ? 0 : s.queries);
      const auto &w = norm ? wq : wkv, &dy = norm ? dqueries : dlatent;
      double squares = 0, dot = 0;
      for (int i = 0; i < dim; ++i) squares += number(c[at + i]) * number(c[at + i]) / dim;
      double of = 1 / std::sqrt(squares + 1e-5);
      rstd.push_back(of);
      for (int i = 0; i < dim; ++i) {
        double x = number(c[at + i]), slope = number(dy[row * dim + i]) * number(w[i]);
        (norm ? queries : latent).push_back(x * of * number(w[i]));
        dot += slope * x * of / dim;
      }
      for (int i = 0; i < dim; ++i) {
        double x = number(c[at + i]), slope = number(dy[row * dim + i]) * number(w[i]);
        dc[at + i] = of * (slope - x * of * dot);
      }
    }
    for (int j = 0; j < s.shared; ++j) dc[row * s.cols() + s.queries + s.kv + j] = number(dshared[row * s.shared + j]);
  }
  Buffer<T> in(c), wk(wkv), w(wq), out(s.n * s.kv), shared(s.n * s.shared), deep(s.n * s.queries);
  Buffer<T> dl(dlatent), ds(dshared), dq(dqueries), back(s.n * s.cols());
  Buffer<float> kept(s.n * count);
  dim3 grid(s.n, count), block(threads_of(std::max(s.kv, s.queries)));
  Latents widths{s.queries, s.kv, s.shared};
  RUN(T, latent_norm, grid, block, in.ptr(), wk.ptr(), w.ptr(), out.ptr(), shared.ptr(), deep.ptr(), kept.ptr(), widths,
      1e-5f);
  auto is = name<T>("latent norm", s.n, s.cols(), seed);
  check(is, out.read(), latent, tolerance<T>());
  if (s.queries > 0) check(is + " queries", deep.read(), queries, tolerance<T>());
  check(is + " rstd", kept.read(), rstd, 1e-6);
  std::vector<T> copied;
  for (int row = 0; row < s.n; ++row) {
    copied.insert(copied.end(), c.begin() + (row + 1) * s.cols() - s.shared, c.begin() + (row + 1) * s.cols());
  }
  check_same(is + " shared", shared.read(), copied);
  RUN(T, latent_norm_dx, grid, block, dl.ptr(), ds.ptr(), dq.ptr(), in.ptr(), wk.ptr(), w.ptr(), kept.ptr(), back.ptr(),
      widths);
  check(is + " dx", back.read(), dc, tolerance<T>());
}

static std::vector<float> angles(Random& r, size_t count, bool sine) {
  std::vector<float> out;
  for (size_t i = 0; i < count; ++i) out.push_back(float(sine ? std::sin(6 * r.unit()) : std::cos(6 * r.unit())));
  return out;
}

template <class T> void ropes(int n, int sequence, LatentHeads h, uint64_t seed) {
  Random r(seed);
  int key = h.nope + h.rope, both = h.nope + h.value, packed = h.heads * (2 * key + h.value), half = h.rope / 2;
  auto q = random_values<T>(r, n * h.heads * key), kv = random_values<T>(r, n * h.heads * both);
  auto shared = random_values<T>(r, n * h.rope), dqkv = random_values<T>(r, n * packed);
  auto cosines = angles(r, sequence * half, false), sines = angles(r, sequence * half, true);
  Numbers64 qkv(n * packed), dq(n * h.heads * key), dkv(n * h.heads * both), dshared(n * h.rope);
  auto turned = [&](int row, int j, double own, double other, double way) {
    double c = cosines[row % sequence * half + j / 2], s = way * sines[row % sequence * half + j / 2];
    return j % 2 == 0 ? own * c - other * s : own * c + other * s;
  };
  for (int row = 0; row < n; ++row) {
    for (int head = 0; head < h.heads; ++head) {
      int at = row * packed + head * key, k = at + h.heads * key;
      int v = row * packed + 2 * h.heads * key + head * h.value, own = (row * h.heads + head) * both;
      int query = (row * h.heads + head) * key;
      for (int j = 0; j < h.nope; ++j) {
        qkv[at + j] = number(q[query + j]), dq[query + j] = number(dqkv[at + j]);
        qkv[k + j] = number(kv[own + j]), dkv[own + j] = number(dqkv[k + j]);
      }
      for (int j = 0; j < h.rope; ++j) {
        int mine = query + h.nope + j, other = query + h.nope + (j ^ 1), part = row * h.rope + j;
        qkv[at + h.nope + j] = turned(row, j, number(q[mine]), number(q[other]), 1);
        qkv[k + h.nope + j] = turned(row, j, number(shared[part]), number(shared[row * h.rope + (j ^ 1)]), 1);
        dq[mine] = turned(row, j, number(dqkv[at + h.nope + j]), number(dqkv[at + h.nope + (j ^ 1)]), -1);
        dshared[part] += turned(row, j, number(dqkv[k + h.nope + j]), number(dqkv[k + h.nope + (j ^ 1)]), -1);
      }
      for (int j = 0; j < h.value; ++j) {
        qkv[v + j] = number(kv[own + h.nope + j]), dkv[own + h.nope + j] = number(dqkv[v + j]);
      }
    }
  }
  Buffer<T> bq(q), bkv(kv), bs(shared), out(n * packed), grads(dqkv), oq(dq.size()), okv(dkv.size()), os(dshared.size());
  Buffer<float> c(cosines), s(sines);
  dim3 grid(n), block(threads_of(packed));
  RUN(T, latent_rope, grid, block, bq.ptr(), bkv.ptr(), bs.ptr(), c.ptr(), s.ptr(), out.ptr(), sequence, h);
  auto is = name<T>("latent rope", n, packed, seed);
  check(is, out.read(), qkv, tolerance<T>());
  RUN(T, latent_rope_dx, grid, block, grads.ptr(), c.ptr(), s.ptr(), oq.ptr(), okv.ptr(), os.ptr(), sequence, h);
  check(is + " dq", oq.read(), dq, tolerance<T>());
  check(is + " dkv", okv.read(), dkv, tolerance<T>());
  check(is + " dshared", os.read(), dshared, tolerance<T>());
  // Heads are added in their order.
  std::vector<T> ordered;
  for (int row = 0; row < n; ++row) {
    for (int j = 0; j < half; ++j) {
      float a = 0, b = 0, cosine = cosines[row % sequence * half + j], sine = sines[row % sequence * half + j];
      for (int head = 0; head < h.heads; ++head) {
        const T* of = &dqkv[row * packed + (h.heads + head) * key + h.nope + 2 * j];
        a += float(number(of[0])), b += float(number(of[1]));
      }
      for (float x : {a * cosine + b * sine, b * cosine - a * sine}) {
        T rounded;
        put_f32(&rounded, x);
        ordered.push_back(rounded);
      }
    }
  }
  if (!ON_DEVICE) check_same(is + " dshared in the order of heads", os.read(), ordered);
}

// Tokens one after another over a growing cache: as keys and values would have it.
template <class T> void decode(int length, int rank, LatentHeads h, int window, uint64_t seed) {
  Random r(seed);
  int key = h.nope + h.rope, both = h.nope + h.value, half = h.rope / 2;
  auto q = random_values<T>(r, length * h.heads * key), latent = random_values<T>(r, length * rank);
  auto shared = random_values<T>(r, length * h.rope), up = random_values<T>(r, h.heads * both * rank, 0.5);
  auto sinks = random_values<T>(r, window > 0 ? h.heads : 0, 2);
  auto cosines = angles(r, length * half, false), sines = angles(r, length * half, true);
  auto turned = [&](int at, int j, double own, double other) {
    double c = cosines[at * half + j / 2], s = sines[at * half + j / 2];
    return j % 2 == 0 ? own * c - other * s : own * c + other * s;
  };
  Numbers64 expected, keys(length * h.rope);
  for (int i = 0; i < length; ++i) {
    for (int j = 0; j < h.rope; ++j) {
      T rounded;
      put_f32(&rounded, float(turned(i, j, number(shared[i * h.rope + j]), number(shared[i * h.rope + (j ^ 1)]))));
      keys[i * h.rope + j] = number(rounded);
    }
  }
  double scale = 1 / std::sqrt(double(key));
  auto made = [&](int head, int row, int i) {  // a key's or a value's element
    double sum = 0;
    for (int j = 0; j < rank; ++j) sum += number(up[(head * both + row) * rank + j]) * number(latent[i * rank + j]);
    return sum;
  };
  for (int t = 0; t < length; ++t) {
    for (int head = 0; head < h.heads; ++head) {
      const T* query = &q[(t * h.heads + head) * key];
      Numbers64 p, o(h.value);
      double total = window > 0 ? std::exp(number(sinks[head])) : 0;
      int begin = window > 0 ? std::max(t + 1 - window, 0) : 0;
      for (int i = begin; i <= t; ++i) {
        double dot = 0;
        for (int j = 0; j < h.nope; ++j) dot += number(query[j]) * made(head, j, i);
        for (int j = 0; j < h.rope; ++j) {
          dot += turned(t, j, number(query[h.nope + j]), number(query[h.nope + (j ^ 1)])) * keys[i * h.rope + j];
        }
        p.push_back(std::exp(dot * scale)), total += p.back();
      }
      for (int i = begin; i <= t; ++i) {
        for (int j = 0; j < h.value; ++j) o[j] += p[i - begin] / total * made(head, h.nope + j, i);
      }
      expected.insert(expected.end(), o.begin(), o.end());
    }
  }
  Buffer<T> bq(q), bl(latent), bs(shared), bu(up), sink(sinks), latents(length * rank), kept(length * h.rope);
  Buffer<T> out(length * h.heads * h.value);
  Buffer<float> c(cosines), s(sines), scores(h.heads * length);
  for (int t = 0; t < length; ++t) {
    auto kernel = OF(T, latent_decode);
    LAUNCH(kernel, dim3(h.heads), dim3(256), size_t(4 * (2 * rank + h.rope)), bq + t * h.heads * key, bl + t * rank,
           bs + t * h.rope, bu.ptr(), window > 0 ? sink.ptr() : nullptr, c.ptr(), s.ptr(), latents.ptr(), kept.ptr(),
           out + t * h.heads * h.value, scores.ptr(), length, t, window, rank, h, float(scale));
  }
  auto is = name<T>("latent decode", length, rank, seed);
  check(is, out.read(), expected, tolerance<T>());
  check_same(is + " latents", latents.read(), latent);
  check(is + " keys", kept.read(), keys, 1e-2);
}

template <class T> void all() {
  norms<T>({5, 5, 0, 16, 8}, 1);
  norms<T>({3, 3, 24, 40, 8}, 2);
  norms<T>({3, 3, 20, 12, 4}, 3);
  norms<T>({2, 2, 1536, 512, 64}, 4);
  ropes<T>(6, 3, {2, 8, 8, 8}, 1);
  ropes<T>(5, 5, {3, 6, 4, 10}, 2);
  ropes<T>(2, 2, {4, 128, 64, 128}, 3);
  decode<T>(9, 12, {2, 6, 4, 10}, 0, 1);
  decode<T>(40, 40, {2, 16, 8, 16}, 7, 2);
}

int main() {
  all<bf16>();
  all<float>();
  for_seeds(3, [](uint64_t seed) { decode<float>(12, 40, {2, 8, 8, 8}, 0, 10 + seed); });
  return finish();
}
