// A GPT on the CPU: its packed weights, its threads, and the forward pass over any mixture of running sequences.
#pragma once
#include <atomic>
#include <mutex>
#include <vector>

#include "adapter.h"
#include "buffer.h"
#include "cache.h"
#include "kernels.h"
#include "model.h"
#include "pool.h"

namespace gptfast::engine {

// New tokens of one sequence in a pass: n from `first` on in the pass, at positions start, start + 1, …; the logits of
// the last `wanted` are asked for, as rows `row`, row + 1, … of the result.
struct Run {
  i64 first, n, start, wanted, row;
  char* const* pages;
  const Adapters* adapters;
  const float* vectors = nullptr;  // (n, C): instead of the embeddings of its tokens
  char* const* banded = nullptr;   // pages of the banded layers

  i64 unwanted() const { return n - wanted; }
};

// The rows of a pass under the same adapters, in ascending order, at least one.
struct Updated {
  std::vector<i64> rows;
  const Adapters* adapters;
};
// The rows of a product.
struct Rows {
  i64 count;
  const std::vector<Updated>* updated;
};

// How the tokens of one row are drawn (csrc/cpu/sample-inl.h).
struct Sampling {
  float temperature;
  i64 top_k;
  double top_p;
  uint64_t seed;
  i64 stream;
  i64 vocab;  // only the first `vocab` tokens may be drawn; 0: all
};

// `weights` is Model::bytes of memory, aligned to 64, that outlives the engine. Calls are serialised by a mutex.
class Engine {
 public:
  Engine(const Shape& shape, const Formats& formats, char* weights, int threads, DType cache, const Kernels& kernels);

  const Model& model() const { return model_; }
  int threads() const { return pool_.threads(); }
  Cache::Sizes cache_sizes() const;
  std::mutex& lock() { return mutex_; }

  // Packs fp32 values / factor, a power of two, as this weight: a vector, or rows [first, first + rows) of a matrix, ld apart.
  // `first` is the begin of a panel.
  void pack(const Weight& weight, const float* values, i64 ld, i64 first, i64 rows, float factor);
  // The fp32 values that the engine computes with: of a matrix (N, K), rows ld apart, or of a vector (N).
  void unpack(const Weight& weight, float* values, i64 ld);
  // Appends counts[i] tokens to rows[i]; logits of the last token of each row, or of all tokens, to `out`, rows ld >= V
  // rounded up to 32 apart. Rows and room are checked and memory is reserved before anything is computed: a failure
  // leaves the rows as they were. `tokens` are in the vocabulary.
  void extend(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& counts, const int* tokens,
              bool last_only, float* out, i64 ld);
  // Begins an empty row with a soft prompt: n vectors of C values in the places of token embeddings.
  void prefix(Cache& cache, i64 row, const float* vectors, i64 n);
  // Keeps the first tokens of a row. Where pages of banded layers that the next one sees are gone, these tokens are read again;
  // if memory for that is missing, the row is left without tokens.
  void truncate(Cache& cache, i64 row, i64 length);
  // One token for each row of logits, each drawn as it asks; -1 where the row holds nan, -2 where nothing but -inf.
  std::vector<i64> draw(const std::vector<Sampling>& samplings, const std::vector<i64>& positions, const float* logits,
                        i64 ld);
  // Draws `steps` tokens for each row, fewer where one of `ends` ends it, from the logits of its last position, and
  // appends all but the last of each. Row i of `logits` belongs to the i-th row that has not ended, before and after.
  // tokens[i]: what rows[i] got. A failed draw (see draw) ends all; `interrupted`, which another thread may set, ends
  // all after the next token of each.
  void decode(Cache& cache, const std::vector<i64>& rows, const std::vector<Sampling>& samplings,
              const std::vector<i64>& ends, i64 steps, std::atomic<bool>& interrupted, float* logits, i64 ld,
              std::vector<std::vector<int>>& tokens);
  // Bytes a second of reading the weights, all threads, and nothing else.
  double read_rate(int times);

 private:
  // Inputs of a product, and the memory for them.
  struct Inputs {
    Buffer<float> normed, scale;
    Buffer<uint16_t> bf16;
    Buffer<int8_t> q;
    Buffer<int32_t> acc_init;
  };
  struct Thread {
    Inputs inputs;  // of single rows, which every thread prepares for itself
    Buffer<float> scratch;
    Buffer<float> products;  // of many rows, kProductsRow apart
  };
  struct Range {
    i64 first, last;
  };
  static constexpr i64 kPanelsTogether = 4;  // of many rows
  static constexpr i64 kProductsRow = kPanelsTogether * kPanel + 16;

  void extend_locked(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& counts, const int* tokens,
                     bool last_only, float* out, i64 ld);
  void copy_head(const Cache::Copy& copy, i64 layer, i64 head) const;
  void copy_pages(const std::vector<Cache::Copy>& copies);
  void slide(Cache& cache, const std::vector<i64>& rows, std::vector<Run>& runs, bool keep);
  void reserve(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& counts);
  std::vector<i64> draw_locked(const std::vector<Sampling>& samplings, const std::vector<i64>& positions,
                               const float* logits, i64 ld);
  void reserve_workspace(i64 M, i64 longest);
  void run_chunk(const std::vector<Run>& runs, const int* tokens, float* out, i64 ld);
  void forward(int t, const int* tokens, float* out, i64 ld);
  void embed(int t, const int* tokens);
  void attention(int t, i64 layer);
  void store(i64 layer, const Run& run, i64 first, i64 heads);
  void attend(int t, i64 layer, const Run& run, i64 first, i64 heads);
  AttendParams pages_of(i64 layer, const Run& run, i64 first, i64 heads) const;
  void place_heads(const Weight& norm, float* x, i64 position, i64 heads);
  void experts(int t, i64 layer, Rows rows);
  void route(i64 rows);
  template <class Fill> Activations slot_inputs(int t, const Layer& layer, Linear Expert::* linear, i64 K, Fill fill);
  void expert_products(int t, i64 layer, Linear Expert::* linear, const Activations& x, bool few,
                       std::atomic<i64>& next, float* y, i64 ldy);
  void combine(int t, i64 rows);
  void keep_wanted();
  void head(int t, float* out, i64 ld);
  void normalise(const Norm& norm, const float* x, float* y);
  void normalise_in_place(int t, const Norm& norm, i64 rows);

  Activations inputs_of(int t, const Linear& linear, const float* x, i64 ld, i64 K, Rows rows);
  template <class Make> Activations made_inputs(int t, const Linear& linear, i64 K, Rows rows, Make make);
  Activations normed_inputs(int t, const Linear& linear, const Norm& norm, const float* x, i64 ld, Rows rows);
  Activations hidden_inputs(int t, const Linear& linear, Rows rows);
  void multiply(int t, const Linear& linear, const Activations& x, Rows rows, Epilogue epilogue, float* y, i64 ldy,
                float* out, i64 ldo);
  void note_adapters();
  bool has_updates(const Linear& linear, Rows rows) const;
  void share_inputs(int t, const Linear& linear, const Activations& x, i64 K, Rows rows);
  void update(const Linear& linear, Rows rows, i64 panel, i64 count, float* y, i64 ldy);

  Range share(i64 n, int t) const { return {n * t / threads(), n * (t + 1) / threads()}; }
  const float* floats(const Weight& w) const {
    return w.offset < 0 ? nullptr : reinterpret_cast<const float*>(weights_ + w.offset);
  }
  // Panel p, or panels [first, last), of the product with a matrix.
  void product(const Weight& w, i64 p, const Activations& x, i64 rows, float* y, i64 ldy) const;
  void products(const Weight& w, i64 first, i64 last, const Activations& x, i64 rows, float* y, i64 ldy) const;
  bool reads_f32(Format f) const { return f == Format::f32 || (f == Format::bf16 && !kernels_.bf16_pairs); }
  Activations view(Inputs& in, i64 K) const;

  const Model model_;
  char* const weights_;
  const Kernels& kernels_;
  Pool pool_;
  std::mutex mutex_;
  const DType cache_type_;
  const i64 key_bytes_, value_bytes_;  // of a page, for one head of one layer
  const i64 layer_bytes_;
  std::vector<i64> place_;  // of a layer among the dense or the banded ones
  // C, what c_attn gives, the heads together, what c_fc gives, rounded up to whole panels; and the widest input of a product
  const i64 Cp_, Qp_, Ap_, Fp_, stride_;

  i64 M_ = 0, wanted_ = 0;  // tokens of the running pass, and how many of them get logits
  i64 capacity_ = 0;        // tokens there is memory for
  std::vector<Run> runs_;
  std::vector<Updated> updated_, updated_wanted_;  // among all M_ rows, and among the wanted_ ones
  Buffer<float> down_;                             // (M, ldh): x A^T of these rows
  i64 ldh_ = 0;
  std::vector<std::atomic<i64>> next_;                  // item of attention and of both products of experts, per layer
  Buffer<float> x_, qkv_, attended_, hidden_, branch_;  // (M, C), (M, qkv), (M, heads D), (M, fc), (M, C)
  Buffer<float> zeros_;                                 // C, in the place of a position's embedding
  // The rows of a mixture of experts, one for each expert of a token ("slot"), those of an expert together.
  struct Routes {
    std::vector<i64> first, active;  // by expert, where its slots begin; and the experts that have some
    std::vector<i64> row, expert;    // by slot
    std::vector<i64> slot;           // by token, of its experts in their order
    std::vector<float> share;        // by token, of its experts
    Buffer<float> logits, answers;   // (M, experts), (slots, C)
    Inputs inputs;                   // of slots
  } routes_;
  const std::vector<Updated> none_;
  Inputs shared_;
  std::vector<Thread> own_;
};

}  // namespace gptfast::engine
