// Times llama.cpp, or a fork of it, from C++: a model in memory, a command a line, an answer in JSON a line.
//
//   llama_decode MODEL.gguf THREADS [repack]     then on standard input:
//     decode ROWS TOKENS [PROMPT]    seconds of so many greedy steps of ROWS sequences, after prompts of PROMPT (16) tokens
//     prefill TOKENS        seconds until the logits behind a prompt are there
//     logits TOKENS         the first five logits behind a prompt
//     write FILE ID ...     the logits behind every token of a text, as floats
//   llama_decode quantize FROM.gguf TO.gguf FTYPE THREADS     writes a file in another format; FTYPE as in llama.h
//
// Only the public header is used. IK_LLAMA: ik_llama.cpp, where the cache and some options have other names.
#include <llama.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr int kPrompt = 16;
constexpr int kContext = 1024;
constexpr int kVocabulary = 50257;  // of the prompts; the model may have more

using Ids = std::vector<llama_token>;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "llama_decode: %s\n", message.c_str());
  std::exit(1);
}

/// The same as in worker.py: every implementation reads the same tokens.
Ids prompt(int row, int length) {
  Ids ids(length);
  for (int i = 0; i < length; ++i) ids[i] = (37 * i + 1009 * row) % kVocabulary;
  return ids;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Decoder {
 public:
  Decoder(const std::string& path, int threads, bool repack) : threads_(threads) {
    llama_model_params params = llama_model_default_params();
#ifdef IK_LLAMA
    params.repack_tensors = repack;
#else
    if (repack) fail("this llama.cpp repacks by itself");
#endif
    model_ = llama_model_load_from_file(path.c_str(), params);
    if (!model_) fail("cannot load " + path);
    vocabulary_ = llama_vocab_n_tokens(llama_model_get_vocab(model_));
  }

  double decode(int rows, int tokens, int length) {
    if (rows < 1 || length < 1 || length + tokens > room(rows)) fail("decode: no room for so many tokens");
    use(rows);
    std::vector<Ids> next;
    for (int n = 0; n < rows; ++n) next.push_back(prompt(n, length));
    run(next, 0, false);
    for (int n = 0; n < rows; ++n) next[n] = {best(logits_of_[n])};
    double start = now();
    for (int i = 0; i < tokens; ++i) {
      run(next, length + i, false);
      for (int n = 0; n < rows; ++n) next[n][0] = best(logits_of_[n]);
    }
    return now() - start;
  }

  double prefill(int tokens) {
    use(1);
    double start = now();
    run({prompt(0, tokens)}, 0, false);
    best(logits_of_[0]);
    return now() - start;
  }

  std::string logits(int tokens) {
    use(1);
    run({prompt(0, tokens)}, 0, false);
    const float* values = llama_get_logits_ith(context_, logits_of_[0]);
    char text[128];
    std::snprintf(text, sizeof text, "[%.6g, %.6g, %.6g, %.6g, %.6g]", values[0], values[1], values[2], values[3],
                  values[4]);
    return text;
  }

  void write(const std::string& path, const Ids& ids) {
    use(1);
    run({ids}, 0, true);
    std::ofstream out(path, std::ios::binary);
    for (size_t i = 0; i < ids.size(); ++i) {
      const float* values = llama_get_logits_ith(context_, static_cast<int>(i));
      out.write(reinterpret_cast<const char*>(values), sizeof(float) * vocabulary_);
    }
    if (!out.flush()) fail("cannot write " + path);
  }

  double megabytes() const { return llama_model_size(model_) / 1e6; }

 private:
  static int room(int rows) { return rows == 1 ? kContext : 128; }

  /// An empty context for so many sequences; each is made once.
  void use(int rows) {
    llama_context*& context = contexts_[rows];
    if (!context) {
      llama_context_params params = llama_context_default_params();
      params.n_ctx = rows * room(rows);
      params.n_batch = params.n_ubatch = 512;
      params.n_seq_max = rows;
      params.n_threads = params.n_threads_batch = threads_;
#ifdef IK_LLAMA
      params.flash_attn = true;
#else
      params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_AUTO;
#endif
      context = llama_init_from_model(model_, params);
      if (!context) fail("no context for " + std::to_string(rows) + " sequences");
    }
    context_ = context;
#ifdef IK_LLAMA
    llama_kv_cache_clear(context_);
#else
    llama_memory_clear(llama_get_memory(context_), true);
#endif
  }

  /// tokens[n] of sequence n from this position on; logits_of_[n] is where the logits of its last are.
  void run(const std::vector<Ids>& tokens, int position, bool every) {
    int total = 0;
    for (const Ids& row : tokens) total += static_cast<int>(row.size());
    llama_batch batch = llama_batch_init(total, 0, 1);
    batch.n_tokens = total;
    logits_of_.assign(tokens.size(), 0);
    int i = 0;
    for (size_t n = 0; n < tokens.size(); ++n) {
      for (size_t k = 0; k < tokens[n].size(); ++k, ++i) {
        batch.token[i] = tokens[n][k];
        batch.pos[i] = position + static_cast<int>(k);
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = static_cast<llama_seq_id>(n);
        batch.logits[i] = every || k + 1 == tokens[n].size();
        if (k + 1 == tokens[n].size()) logits_of_[n] = i;
      }
    }
    if (llama_decode(context_, batch)) fail("llama_decode failed");
    llama_batch_free(batch);
  }

  llama_token best(int i) {
    const float* values = llama_get_logits_ith(context_, i);
    if (!values) fail("no logits");
    float most = values[0];
#pragma omp simd reduction(max : most)
    for (int v = 1; v < vocabulary_; ++v) most = std::max(most, values[v]);
    return static_cast<llama_token>(std::find(values, values + vocabulary_, most) - values);
  }

  int threads_;
  llama_model* model_ = nullptr;
  int vocabulary_ = 0;
  std::map<int, llama_context*> contexts_;
  llama_context* context_ = nullptr;
  std::vector<int> logits_of_;
};

int quantize(const std::string& from, const std::string& to, int format, int threads) {
  llama_model_quantize_params params = llama_model_quantize_default_params();
  params.ftype = static_cast<llama_ftype>(format);
  params.nthread = threads;
  return llama_model_quantize(from.c_str(), to.c_str(), &params) ? 1 : 0;
}

std::string answer(Decoder& decoder, const std::string& line) {
  std::istringstream words(line);
  std::string command;
  words >> command;
  int a = 0, b = 0;
  if (command == "decode" && words >> a >> b) {
    int length = 0;
    if (!(words >> length)) length = kPrompt;
    return "{\"seconds\": " + std::to_string(decoder.decode(a, b, length)) + "}";
  }
  if (command == "prefill" && words >> a && a <= kContext)
    return "{\"seconds\": " + std::to_string(decoder.prefill(a)) + "}";
  if (command == "logits" && words >> a && a <= kContext) return "{\"logits\": " + decoder.logits(a) + "}";
  std::string path;
  if (command == "write" && words >> path) {
    Ids ids;
    for (int id; words >> id;) ids.push_back(id);
    decoder.write(path, ids);
    return "{}";
  }
  return "{\"error\": \"unknown command\"}";
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> words(argv + 1, argv + argc);
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  llama_backend_init();
  if (words.size() == 5 && words[0] == "quantize")
    return quantize(words[1], words[2], std::stoi(words[3]), std::stoi(words[4]));
  if (words.size() < 2) fail("usage: llama_decode MODEL.gguf THREADS [repack]");
  Decoder decoder(words[0], std::stoi(words[1]), words.size() > 2 && words[2] == "repack");
  std::cout << "{\"weights_mb\": " << decoder.megabytes() << ", \"version\": \"" << VERSION << "\"}" << std::endl;
  for (std::string line; std::getline(std::cin, line) && line != "quit";) std::cout << answer(decoder, line) << std::endl;
}
