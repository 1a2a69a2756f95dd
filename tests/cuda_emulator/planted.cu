// Mistakes of every kind that the emulator must catch, one a number; tests/cuda_emulator/test_emulator.py says what it must say of each.
//     planted NAME    prints "CAUGHT <message>" or "no complaint: <sum of the results>"
#include "../../csrc/cuda/common.cuh"
#include "../../csrc/cuda/hopper.cuh"
#include "../../csrc/cuda/overlap.cuh"
#include "../../csrc/cuda/wgmma.cuh"

using namespace gptfast::cuda;
using gptfast::DType;

namespace {

constexpr int kThreads = 64;

enum Fault {
  correct,
  no_barrier,
  only_syncwarp,
  overwritten_too_early,
  never_written,
  past_dynamic,
  past_global,
  divergent_barrier,
  divergent_shuffle,
  lanes_missing,
  lane_not_in_mask,
  trap,
  misaligned,
  stack_overflow,
  bad_block,
  too_much_shared,
  store_correct,
  store_without_fence,
  store_without_barrier,
  store_overwritten,
  store_at_exit,
  too_many_registers,
  products_correct,
  products_overwritten,
  products_not_committed,
  early_correct,
  early_reads,
  early_never_waits,
  early_lets_go,
  faults
};
const char* const names[faults] = {"correct",
                                   "no_barrier",
                                   "only_syncwarp",
                                   "overwritten_too_early",
                                   "never_written",
                                   "past_dynamic",
                                   "past_global",
                                   "divergent_barrier",
                                   "divergent_shuffle",
                                   "lanes_missing",
                                   "lane_not_in_mask",
                                   "trap",
                                   "misaligned",
                                   "stack_overflow",
                                   "bad_block",
                                   "too_much_shared",
                                   "store_correct",
                                   "store_without_fence",
                                   "store_without_barrier",
                                   "store_overwritten",
                                   "store_at_exit",
                                   "too_many_registers",
                                   "products_correct",
                                   "products_overwritten",
                                   "products_not_committed",
                                   "early_correct",
                                   "early_reads",
                                   "early_never_waits",
                                   "early_lets_go"};

float deep(int n) {
  volatile float local[1024];
  for (int i = 0; i < 1024; i++) local[i] = float(n + i);
  return n ? deep(n - 1) + local[n] : local[0];
}

// Every thread fills one value and reads one of the other warp's.
__global__ void faulty(float* out, int fault) {
  DYN_SMEM(smem);
  float* s = reinterpret_cast<float*>(smem);
  const int t = threadIdx.x;
  if (fault != never_written || t != 5) s[t] = float(t);
  if (fault == only_syncwarp) __syncwarp();
  else if (fault != no_barrier) __syncthreads();
  float v = s[t ^ 32];
  if (fault == overwritten_too_early) s[t] = -1.f;
  if (fault == past_dynamic) v += s[t + 1];
  if (fault == divergent_barrier) {
    if (t & 1) __syncthreads();
    else __syncthreads();
  }
  if (fault == divergent_shuffle) {
    if (t & 1) v += __shfl_xor_sync(kAllLanes, 1.f, 1);
    else v += __shfl_xor_sync(kAllLanes, 2.f, 1);
  }
  if (fault == lanes_missing && t < 8) v += __shfl_xor_sync(kAllLanes, 1.f, 1);
  if (fault == lane_not_in_mask) v += __shfl_xor_sync(0xffu, 1.f, 1);
  if (fault == lanes_missing || fault == lane_not_in_mask) __syncthreads();
  if (fault == trap && t == 3) __trap();
  if (fault == misaligned) {
    float four[4];
    load(four, s + 1);
    v += four[0];
  }
  if (fault == stack_overflow) v += deep(1000);
  out[t + (fault == past_global)] = v;
}

// The same values by TMA: two rows of 32, which thread 0 stores.
__global__ void faulty_store(const __grid_constant__ CUtensorMap map, int fault) {
  DYN_SMEM(smem);
  const int t = threadIdx.x, row = t / 32, chunk = t % 32 / 4 ^ row;
  float* mine = reinterpret_cast<float*>(smem) + row * 32 + chunk * 4 + t % 4;
  *mine = float(t);
  if (fault != store_without_fence || t == 0) fence_proxy_async();  // that of another thread does not count
  if (fault != store_without_barrier) __syncthreads();
  if (t == 0) {
    tma_store(&map, smem_u32(smem), 0, 0, 0, 0);
    tma_commit();
    if (fault != store_overwritten && fault != store_at_exit) tma_wait_read<0>();
  }
  __syncthreads();
  if (fault != store_at_exit) *mine = -1.f;
  __syncthreads();
  if (t == 0 && fault == store_overwritten) tma_wait_read<0>();
}
// Three warpgroups got 168 registers a thread.
__global__ void greedy(float*) {
  if (threadIdx.x < 128) setmaxnreg_dec<32>();
  else setmaxnreg_inc<240>();
}

// Two products of 64 x 64 x 16, a group each, of buffers of zeros. When all but the last group are done the first buffer may
// be written again, and no other.
__global__ void faulty_products(float* out, int fault) {
  DYN_SMEM(smem);
  constexpr int kBuffer = 64 * 128;
  for (int i = threadIdx.x; i < 2 * kBuffer / 4; i += 128) reinterpret_cast<float*>(smem)[i] = 0.f;
  fence_proxy_async();
  __syncthreads();
  float sums[8][4];
  wgmma_fence();
  for (int n = 0; n < 2; n++) {
    const uint64_t operand = smem_descriptor(smem_u32(smem) + n * kBuffer, 16, 1024);
    wgmma<__nv_bfloat16, 0, 0>(sums, operand, operand, n);
    if (n == 0 || fault != products_not_committed) wgmma_commit();
  }
  if (fault == products_not_committed) wgmma_wait<0>();
  else wgmma_wait<1>();
  __syncthreads();
  float* first = reinterpret_cast<float*>(smem + (fault == products_correct ? 0 : kBuffer));
  first[threadIdx.x] = 1.f;
  if (fault == products_not_committed) wgmma_commit();
  wgmma_wait<0>();
  if (threadIdx.x < kThreads) out[threadIdx.x] = sums[0][0];
}

// Starts before the kernel before it, which fills `in`, has ended.
__global__ void faulty_early(const float* in, float* out, int fault) {
  const int t = threadIdx.x;
  float v = fault == early_reads ? in[t] : 0.f;
  if (fault == early_lets_go) let_next_kernel_start();
  if (fault == early_never_waits && t == 5) return;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (fault != early_reads) v = in[t];
  out[t] = v;
}

void run(int fault, float* out) {
  if (fault >= early_correct) {
    float in[kThreads];
    for (int t = 0; t < kThreads; t++) in[t] = float(t);
    emu::opt().late = {{reinterpret_cast<char*>(in), sizeof in}};
    (void)launch_early<faulty_early>(dim3(1), dim3(kThreads), 0, nullptr, in, out, fault);
  } else if (fault == too_many_registers) {
    LAUNCH(greedy, dim3(1), dim3(384), 0, nullptr, out);
  } else if (fault >= products_correct) {
    LAUNCH(faulty_products, dim3(1), dim3(128), 2 * 64 * 128, nullptr, out, fault);
  } else if (fault >= store_correct) {
    CUtensorMap map;
    const TensorShape shape{out, {32, 2, 1, 1}, {128, 256, 256}, DType::f32};
    if (!tensor_map(&map, shape, 2)) throw std::runtime_error("no map");
    LAUNCH(faulty_store, dim3(1), dim3(kThreads), 256, nullptr, map, fault);
  } else {
    const int threads = fault == bad_block ? 2048 : kThreads;
    const size_t smem = fault == too_much_shared ? 300 << 10 : kThreads * sizeof(float);
    LAUNCH(faulty, dim3(1), dim3(threads), smem, nullptr, out, fault);
  }
}

}  // namespace

int main(int, char** arguments) {
  int fault = 0;
  while (fault < faults && strcmp(names[fault], arguments[1])) fault++;
  if (fault == faults) return 2;
  float* out = new float[kThreads];
  try {
    run(fault, out);
    float sum = 0;
    for (int t = 0; t < kThreads; t++) sum += out[t];
    printf("no complaint: %g\n", double(sum));
  } catch (const std::exception& error) {
    printf("CAUGHT %s\n", error.what());
  }
  delete[] out;
}
