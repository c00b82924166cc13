// causal_conv1d's kernels under the emulator: a function for ctypes, and under AddressSanitizer a program that reads
// its cases from a file, so that both builds run the same cases against the same oracle.
#include "ssm/causal_conv1d.cuh"

#include <cstdio>
#include <exception>
#include <string>

using layerzoo::CudaConvArgs;

extern "C" int causal_conv1d_tile_channels() { return layerzoo::kTileChannels; }
extern "C" int causal_conv1d_tile_steps() { return layerzoo::kTileSteps; }

static std::string message;

// Returns the error, or "".
extern "C" const char* causal_conv1d(const CudaConvArgs* a, int64_t max_blocks) {
  message.clear();
  try {
    LZ_DISPATCH_DTYPE(a->x.dtype, T, layerzoo::causal_conv1d_launch<T>(*a, max_blocks, nullptr))
    emu::check_written();
  } catch (const std::exception& e) {
    message = e.what();
  }
  return message.c_str();
}

#if defined(__SANITIZE_ADDRESS__)

// In the file, for each case: seed, the bytes of each array or -1 for none, the arguments, then the arrays. Written
// back to the second file: the two results.
int main(int, char** argv) {
  std::FILE* in = std::fopen(argv[1], "rb");
  std::FILE* out = std::fopen(argv[2], "wb");
  constexpr int kArrays = 7, kResults = 2;
  int64_t seed, sizes[kArrays];
  while (std::fread(&seed, sizeof seed, 1, in) == 1) {
    CudaConvArgs a;
    char* data[kArrays];
    bool whole = std::fread(sizes, sizeof sizes, 1, in) == 1 && std::fread(&a, sizeof a, 1, in) == 1;
    for (int i = 0; i < kArrays; ++i) {
      data[i] = sizes[i] < 0 ? nullptr : new char[sizes[i]];  // of exactly this size, so that ASan sees its end
      whole = whole && (sizes[i] <= 0 || std::fread(data[i], sizes[i], 1, in) == 1);
    }
    a.out.data = data[0], a.final_state = data[1], a.x.data = data[2], a.weight.data = data[3];
    a.bias.data = data[4], a.initial.data = data[5], a.seq_idx = data[6];
    emu::reset(seed);
    const char* error = whole ? causal_conv1d(&a, 3) : "the file is cut short";
    if (*error) return std::fprintf(stderr, "%s\n", error), 1;
    for (int i = 0; i < kResults; ++i) std::fwrite(data[i], 1, sizes[i], out);
    for (char* p : data) delete[] p;
  }
  return std::fclose(in) | std::fclose(out);
}

#endif
