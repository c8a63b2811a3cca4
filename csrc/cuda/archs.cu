// What fastreg/_ext.py asks of the extension before a GPU gets its kernels.
#ifndef FASTREG_CUDA_ARCHS
#define FASTREG_CUDA_ARCHS ""  // the emulation
#define FASTREG_TORCH_VERSION ""
#endif

// Read from the file, before it is loaded.
__attribute__((used)) static const char fastreg_torch[] = "FASTREG_TORCH=" FASTREG_TORCH_VERSION;

// The architectures there is code for, the last one also as PTX for what comes after it: "80 90 100+ptx".
extern "C" __attribute__((visibility("default"))) const char* fastreg_cuda_archs() {
  return FASTREG_CUDA_ARCHS;
}
